"""Approvals: they hold for their exact request, and for no other spelling, member, key or name of it."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.approvals import (
    ApprovalRequest,
    Operation,
    PrivateKey,
    describe_request,
    is_approver_key,
    parse_approval,
    parse_request,
    sign_request,
    verify_approval,
)
from keyreeve_common.errors import ApprovalInvalid

KEYS: list[PrivateKey] = [
    ed25519.Ed25519PrivateKey.generate(),
    ec.generate_private_key(ec.SECP256R1()),
    ec.generate_private_key(ec.SECP384R1()),
]
REQUEST = ApprovalRequest(
    Operation.DESTROY_KEY,
    "r1",
    datetime(2030, 1, 1, tzinfo=UTC),
    {"key_id": "k-1", "spki_sha256": "ab", "role": "handshake", "label": "web ü", "wait_s": 86_400},
)


@pytest.mark.parametrize("key", KEYS)
def test_approval_goes_through_a_file_and_holds(key: PrivateKey) -> None:
    approval = sign_request(REQUEST, "alice", key)
    read = parse_approval(approval.to_text())
    assert read == approval
    verify_approval(read, key.public_key())
    for other in KEYS:
        if other is not key:
            with pytest.raises(ApprovalInvalid, match="alice"):
                verify_approval(read, other.public_key())


CHANGES: list[dict[str, Any]] = [
    {"operation": Operation.CREATE_KEY},
    {"request_id": "r2"},
    {"expires": datetime(2030, 1, 2, tzinfo=UTC)},
    {"key": {**REQUEST.key, "key_id": "k-2"}},
    {"key": {**REQUEST.key, "wait_s": 0}},
    {"key": {**REQUEST.key, "more": 1}},
    {"key": {}},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_signature_holds_for_no_changed_request(change: dict[str, Any]) -> None:
    approval = sign_request(REQUEST, "alice", KEYS[0])
    with pytest.raises(ApprovalInvalid):
        verify_approval(replace(approval, request=replace(REQUEST, **change)), KEYS[0].public_key())


@given(st.data())
def test_no_changed_byte_of_a_file_holds_for_something_else(data: st.DataObject) -> None:
    text = bytearray(sign_request(REQUEST, "alice", KEYS[0]).to_text().encode())
    text[data.draw(st.integers(0, len(text) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        read = parse_approval(bytes(text))
        verify_approval(read, KEYS[0].public_key())
    except ApprovalInvalid:
        return
    assert read.request == REQUEST  # white space, or the approver's name, which the signer looks its key up by


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200)))
def test_noise_is_refused(noise: str | bytes) -> None:
    for parse in (parse_approval, parse_request):
        with pytest.raises(ApprovalInvalid):
            parse(noise)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": True},
        {"operation": "sign"},
        {"expires": "2030-1-1T00:00:00Z"},
        {"expires": "2030-01-01"},
        {"expires": 7},
        {"request_id": 7},
        {"key": []},
        {"key": {"a": 1.5}},
        {"surprise": 1},
    ],
    ids=str,
)
def test_request_with_a_fault_is_refused(change: dict[str, Any]) -> None:
    fields = {**json.loads(REQUEST.to_bytes()), **change}
    with pytest.raises(ApprovalInvalid):
        parse_request(json.dumps(fields))


def test_name_that_stands_twice_is_refused() -> None:
    text = REQUEST.to_bytes().decode().replace('"request_id":"r1"', '"request_id":"r1","request_id":"r2"')
    with pytest.raises(ApprovalInvalid):
        parse_request(text)


def test_layout_of_a_file_does_not_count() -> None:
    assert parse_request(json.dumps(json.loads(REQUEST.to_bytes()), indent=4)) == REQUEST


def test_people_read_lives_and_names_in_words() -> None:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root of example.org")])
    encoded = base64.b64encode(name.public_bytes()).decode()
    key = {
        "role": "authority",
        "purposes": ["x509_certificate"],
        "authority_profile": {"subject_der": encoded, "max_validity_s": 90_000},
    }
    told = dict(describe_request(replace(REQUEST, operation=Operation.CREATE_KEY, key=key)))
    assert told["authority_profile.max_validity"] == "1 day, 1:00:00"
    assert told["authority_profile.subject"] == f"CN=root of example.org ({encoded})"
    assert told["approval ends"] == "2030-01-01T00:00:00Z"
    broken = dict(describe_request(replace(REQUEST, key={"subject_der": "%%"})))
    assert broken["subject"] == "CANNOT BE READ (%%)"


def test_which_keys_approve() -> None:
    assert all(is_approver_key(key) for key in KEYS)
    assert not is_approver_key(ec.generate_private_key(ec.SECP521R1()))
    assert not is_approver_key(b"")
