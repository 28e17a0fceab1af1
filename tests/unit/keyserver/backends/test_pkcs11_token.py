"""What a worker does when its session is lost, against a token that the test plays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from keyreeve_common.errors import TokenUnavailable
from keyreeve_keyserver.backends.pkcs11_token import Token, TokenSettings
from keyreeve_keyserver.domain.secret import Secret
from pkcs11 import exceptions as p11


class PlayedSession:
    def close(self) -> None:
        return

    def generate_random(self, _bits: int) -> bytes:
        raise p11.SessionHandleInvalid


def played(now_in_the_slot: Any, pins: list[str]) -> Token:
    """A token that was opened; its session is lost, and the slot holds `now_in_the_slot`."""

    def open_session(*, rw: bool, user_pin: str) -> Any:
        pins.append(user_pin)
        return SimpleNamespace(generate_random=lambda _bits: b"")

    token: Any = object.__new__(Token)
    token._settings = TokenSettings("module", "pkcs11:slot-id=1", "")
    token._pin, token._pin_refusal, token._label = Secret(b"1234"), None, "ours"
    slot = SimpleNamespace(get_token=lambda: now_in_the_slot)
    token._token = SimpleNamespace(label="ours", serial=b"0001", slot=slot, open=open_session)
    token._session, token._keys, token._wrapped = PlayedSession(), {}, SimpleNamespace(clear=lambda: None)
    return token  # type: ignore[no-any-return]  # played


def test_lost_session_is_opened_again_at_the_same_token() -> None:
    pins: list[str] = []
    played(SimpleNamespace(label="ours", serial=b"0001"), pins).ping()
    assert pins == ["1234"]


@pytest.mark.parametrize("label", ["ours", "another"])
def test_pin_is_not_shown_to_another_token_in_the_slot(label: str) -> None:
    pins: list[str] = []
    with pytest.raises(TokenUnavailable, match="another token is in the slot"):
        played(SimpleNamespace(label=label, serial=b"0002"), pins).ping()
    assert pins == []
