"""What becomes of the tokens that the CA logs in with: each ends with its use, whatever came of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hvac", reason="the extra `vault` is not installed here")

from keyreeve_ca.config import VaultPkiConfig
from keyreeve_ca.upstream import vault_pki
from keyreeve_ca.upstream.vault_pki import VaultPki
from keyreeve_common.errors import FailedPrecondition, KeyNotFound, KeyreeveError, TokenUnavailable, VaultAccessDenied
from keyreeve_common.vault.config import VaultLogin


class PlayedSession:
    """A server that answers requests with `failure`; with `refuses` it lets nobody in."""

    failure: KeyreeveError = VaultAccessDenied("no")
    refuses = False
    log_ins = 0
    revoked = 0

    def __init__(self, _: object) -> None:
        self.logged_in = False

    def log_in(self) -> None:
        if not self.logged_in:
            PlayedSession.log_ins += 1
            if self.refuses:
                raise TokenUnavailable("sealed")
            self.logged_in = True

    def get(self, path: str, *, doing: str) -> dict[str, Any]:
        self.log_in()
        raise self.failure

    def post(self, path: str, body: dict[str, Any], *, doing: str) -> dict[str, Any]:
        self.log_in()
        assert path == "auth/token/revoke-self"
        PlayedSession.revoked += 1
        return {}

    def close(self) -> None:
        self.logged_in = False


@pytest.fixture
def pki(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VaultPki:
    monkeypatch.setattr(vault_pki, "VaultSession", PlayedSession)
    for name, value in (("log_ins", 0), ("revoked", 0), ("refuses", False)):
        monkeypatch.setattr(PlayedSession, name, value)
    secret = tmp_path / "secret_id"
    config = VaultPkiConfig(
        address="https://vault.example.org:8200", login=VaultLogin.APPROLE, role_id="keyreeve-ca", secret_id_file=secret
    )
    return VaultPki(config)


def test_token_is_revoked_where_the_request_failed_too(pki: VaultPki, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotation tries in every round: else each leaves a token that lives for as long as the role gives."""
    for failure, shown in ((VaultAccessDenied("no"), VaultAccessDenied), (KeyNotFound("gone"), FailedPrecondition)):
        monkeypatch.setattr(PlayedSession, "failure", failure)
        with pytest.raises(shown):
            pki.fetch_root()
    assert (PlayedSession.log_ins, PlayedSession.revoked) == (2, 2)


def test_who_is_not_let_in_knocks_once(pki: VaultPki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlayedSession, "refuses", True)
    with pytest.raises(TokenUnavailable):
        pki.fetch_root()
    assert (PlayedSession.log_ins, PlayedSession.revoked) == (1, 0)
