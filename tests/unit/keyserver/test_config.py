"""keyserver.toml: what is accepted, and what a wrong line says."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from keyreeve_common.errors import ConfigInvalid
from keyreeve_keyserver.config import load_keyserver_config

MINIMAL = 'trust_domain = "example.org"\nstate_dir = "state"\nadmin_socket = "run/admin.sock"\n'


def load(tmp_path: Path, text: str):  # type: ignore[no-untyped-def]
    path = tmp_path / "keyserver.toml"
    path.write_text(text)
    return load_keyserver_config(path)


def test_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    assert config.state_dir == tmp_path / "state"
    assert [str(admin) for admin in config.key_admins] == ["spiffe://example.org/keyreeve/ca"]
    assert config.catalog_url.render_as_string() == f"sqlite:///{tmp_path}/state/catalog.sqlite3"
    assert config.catalog.poll_interval == timedelta(milliseconds=200)


def test_postgres_url_gets_our_driver(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL + '[catalog]\nurl = "postgresql://k@db/keyreeve"\npassword_file = "pw"\n')
    assert config.catalog_url.drivername == "postgresql+psycopg"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MINIMAL + 'lisen = "x"\n', "lisen: unknown key"),
        (MINIMAL + '[callers]\nadmins = ["x"]\n', "callers.admins: unknown key"),
        (MINIMAL + '[callers]\nkey_admins = ["spiffe://other.org/x"]\n', "not a SPIFFE ID with a path in trust domain"),
        (MINIMAL + '[callers]\nkey_admins = ["https://x"]\n', "ID-01"),
        (MINIMAL + 'listen = "8443"\n', "listen"),
        (MINIMAL + 'listen = "a:99999"\n', "listen"),
        (MINIMAL + f'signer_socket = "/{"x" * 120}"\n', "signer_socket"),
        (MINIMAL + '[catalog]\npoll_interval = "2s"\n', "poll_interval"),
        (MINIMAL + "[catalog]\npoll_interval = 2\n", "poll_interval"),
        (MINIMAL + '[catalog]\nurl = "postgresql://k:secret@db/k"\n', "holds a password"),
        (MINIMAL + '[catalog]\nurl = "mysql://db/k"\n', "only postgresql"),
        (MINIMAL + '[catalog]\nurl = "postgresql://db/k"\npath = "x"\n', "one of them"),
        (MINIMAL + '[limits]\nsign_timeout = "2h"\n', "sign_timeout"),
        ('state_dir = "state"\nadmin_socket = "a"\n', "trust_domain: missing"),
        ("= nonsense", "not TOML"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigInvalid, match=says) as refused:
        load(tmp_path, text)
    assert "secret" not in refused.value.detail
    assert "keyserver.toml" in refused.value.detail
