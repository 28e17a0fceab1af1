"""A supervisor that root starts gives front end, signer and workers a user each: what one has the other cannot read, and signatures come."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest
from keyreeve_testing.keyserver import KeyServerRig, verify_p256
from keyreeve_testing.processes import children_of, command_line, descendants_of
from keyreeve_testing.softhsm import make_softhsm_token, softhsm_is_installed
from keyreeve_testing.users import directory_of, give, users_can_be_changed, with_open_home

pytestmark = [
    pytest.mark.softhsm,
    pytest.mark.skipif(not softhsm_is_installed(), reason="softhsm2 is not installed"),
    pytest.mark.skipif(not users_can_be_changed(), reason="needs root, to give the processes users of their own"),
]
USERS = {"signer": "daemon", "front_end": "games", "worker": "bin"}  # what every Debian has
STRAY = {"LD_LIBRARY_PATH": "/nowhere", "NOTIFY_SOCKET": "", "PYTHONSTARTUP": "/nowhere", "KEYREEVE_STRAY": "1"}
EXTRA = "\n".join(["[supervisor]", *(f'{role}_user = "{name}"' for role, name in USERS.items())])


@pytest.fixture
def rig() -> Iterator[KeyServerRig]:
    uids = {role: pwd.getpwnam(name).pw_uid for role, name in USERS.items()}
    with directory_of(0) as directory:
        token = make_softhsm_token(directory / "softhsm")
        rig = KeyServerRig(directory / "ks", extra=EXTRA, token=token, default_backend="hsm")
        for name, role in {"state": "front_end", "run": "front_end", "audit": "signer"}.items():
            (directory / "ks" / name).mkdir(mode=0o700)
            give(directory / "ks" / name, uids[role])
        for secret in ("passphrase", "passphrase.kdf"):
            os.chown(directory / "ks" / secret, uids["signer"], uids["signer"])
        give(directory / "softhsm", uids["worker"])
        for path in (directory / "ks", directory / "softhsm", rig.config, rig.signer_toml, token.conf):
            path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
        rig.process.args = with_open_home([str(each) for each in rig.process.args])
        rig.process.env = {name: value for name, value in STRAY.items() if name != "NOTIFY_SOCKET"}
        with rig.running():
            yield rig


def uids_of(pid: int) -> set[int]:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Uid:"))
    return {int(uid) for uid in line.split()[1:]}


def test_each_process_is_its_own_user_with_a_clean_environment_and_signatures_come(rig: KeyServerRig) -> None:
    programs = {
        "signer": "keyreeve_keyserver.signer",
        "front_end": "keyreeve_keyserver.frontend",
        "worker": "keyreeve_keyserver.backends.launcher",
    }
    children = children_of(rig.process.pid)
    for role, program in programs.items():
        (pid,) = (child for child in children if program in command_line(child))
        for each in (pid, *descendants_of(pid)):
            assert uids_of(each) == {pwd.getpwnam(USERS[role]).pw_uid}, role
        groups = next(
            line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Groups:")
        )
        assert "0" not in groups.split()[1:]
    assert (rig.token and rig.token.pin_file.stat().st_mode & 0o777) == 0o600
    agent = rig.pki.svid("keyreeve/agent/a")
    key = rig.create_key("own-users")
    rig.grant(key.key_id, agent.spiffe_id)
    with rig.caller(agent) as stubs:
        verify_p256(key.spki_der, stubs.sign(key.key_id))

    for pid in descendants_of(rig.process.pid):
        names = {entry.split(b"=")[0] for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if entry}
        assert b"PATH" in names
        assert not names & {name.encode() for name in STRAY}
