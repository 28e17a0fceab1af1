"""Users of the supervisor's children: who is not there, and who may not give them, is said at the start."""

from __future__ import annotations

import os

import pytest
from keyreeve_common.errors import ConfigInvalid
from keyreeve_keyserver.hardening import environment
from keyreeve_keyserver.users import find_user


def test_no_name_is_no_other_user() -> None:
    assert find_user("", "supervisor.signer_user") is None


def test_a_user_of_this_host_is_found_with_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    user = find_user("daemon", "supervisor.signer_user")
    assert user is not None
    assert user.uid
    assert user.gid in user.groups


@pytest.mark.parametrize(
    ("uid", "name", "text"), [(0, "no-such-user", "has no user"), (1000, "daemon", "only a supervisor that root")]
)
def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, uid: int, name: str, text: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    with pytest.raises(ConfigInvalid, match=f"supervisor.worker_user: .*{text}"):
        find_user(name, "supervisor.worker_user")


def test_environments_are_allow_lists() -> None:
    given = {
        "PATH": "/bin",
        "LD_PRELOAD": "x",
        "PYTHONSTARTUP": "x",
        "SECRET": "x",
        "NOTIFY_SOCKET": "x",
        "GRPC_TRACE": "x",
        "SOFTHSM2_CONF": "c",
    }
    assert set(environment.worker_environment(given)) == {"PATH", "SOFTHSM2_CONF"}
    assert set(environment.signer_environment(given)) == {"PATH", "SOFTHSM2_CONF"}
    assert set(environment.front_end_environment(given)) == {"PATH", "GRPC_TRACE"}
