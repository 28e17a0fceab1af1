"""Attestations: what was signed is what is told, and nothing else verifies."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import InvalidRequest
from keyreeve_common.key_attestation import _MEMBERS, check_nonce, sign_statement, verify_attestation

KEY, STRANGER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
NONCE = bytes(16)
STATEMENT: dict[str, Any] = {
    **dict.fromkeys(_MEMBERS, "x"),
    "version": 1,
    "nonce": NONCE.hex(),
    "token": {"extractable": False, "sensitive": True},
}
TEXT = sign_statement(STATEMENT, KEY).to_text()


def test_attestation_verifies_with_its_key_and_nonce_alone() -> None:
    assert verify_attestation(TEXT, KEY.public_key(), nonce=NONCE).statement == STATEMENT
    with pytest.raises(InvalidRequest, match="does not verify"):
        verify_attestation(TEXT, STRANGER.public_key())
    with pytest.raises(InvalidRequest, match="another nonce"):
        verify_attestation(TEXT, KEY.public_key(), nonce=bytes(17))


@pytest.mark.parametrize("member", sorted(_MEMBERS))
def test_no_changed_member_verifies(member: str) -> None:
    fields = json.loads(TEXT)
    for changed in (
        {**fields["statement"], member: "y"},
        {k: v for k, v in fields["statement"].items() if k != member},
    ):
        with pytest.raises(InvalidRequest):
            verify_attestation(json.dumps({**fields, "statement": changed}), KEY.public_key())


@given(st.data())
def test_no_changed_byte_tells_something_else(data: st.DataObject) -> None:
    text = bytearray(TEXT.encode())
    text[data.draw(st.integers(0, len(text) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        told = verify_attestation(bytes(text), KEY.public_key())
    except InvalidRequest:
        return
    assert told.statement == STATEMENT  # white space


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200)))
def test_noise_is_refused(noise: str | bytes) -> None:
    with pytest.raises(InvalidRequest):
        verify_attestation(noise, KEY.public_key())


@pytest.mark.parametrize("change", [{"version": 2}, {"version": True}, {"more": 1}], ids=str)
def test_statement_of_another_form_is_not_signed(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        sign_statement({**STATEMENT, **change}, KEY)


def test_length_of_nonces() -> None:
    for length in (0, 15, 65):
        with pytest.raises(InvalidRequest):
            check_nonce(bytes(length))
    assert check_nonce(bytes(64))
