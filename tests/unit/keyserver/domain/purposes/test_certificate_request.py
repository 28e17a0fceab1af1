"""CertificationRequestInfo: a key asks for itself and for no other."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import PurposeMismatch
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_keyserver.domain.purposes import check_request
from keyreeve_testing.tbs import (
    AUTHORITY_KEY,
    LEAF,
    LEAF_KEY,
    NOW,
    authority_record,
    certification_request_info,
    handshake_record,
)

P256 = SignatureScheme.ECDSA_SECP256R1_SHA256
GOOD = certification_request_info(
    LEAF_KEY, x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://td.test/a")])
)


def judge(message: bytes, record: KeyRecord | None = None, scheme: SignatureScheme = P256) -> None:
    check_request(message, record or handshake_record(), purpose=Purpose.CERTIFICATE_REQUEST, scheme=scheme, now=NOW)


def test_own_requests_pass() -> None:
    judge(GOOD)
    judge(certification_request_info(LEAF_KEY))
    judge(certification_request_info(AUTHORITY_KEY), authority_record())
    key = ed25519.Ed25519PrivateKey.generate()
    judge(certification_request_info(key), handshake_record(key=key, key_type=KeyType.ED25519), SignatureScheme.ED25519)


def test_request_for_another_key_is_refused() -> None:
    stranger = ec.derive_private_key(99, ec.SECP256R1())
    with pytest.raises(PurposeMismatch, match="certificate_request: the public key in the request is not this key"):
        judge(certification_request_info(stranger))


@pytest.mark.parametrize(
    "message",
    [
        b"",
        bytes(32),
        GOOD[:-1],
        GOOD + b"\x00",
        LEAF.tbs(),
        build_tls13_content(Purpose.TLS13_SERVER_VERIFY, bytes(32)),
        GOOD.replace(b"\x02\x01\x00", b"\x02\x01\x01", 1),
        b"\x30\x80" + GOOD[4:] + b"\x00\x00",
    ],
)
def test_what_is_no_request_is_refused(message: bytes) -> None:
    judge(GOOD)
    with pytest.raises(PurposeMismatch, match="certificate_request: "):
        judge(message)


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_one_changed_byte_never_escapes(at: int, change: int) -> None:
    message = bytearray(GOOD)
    message[at] ^= change
    try:
        judge(bytes(message))
    except PurposeMismatch:
        pass
    else:
        assert LEAF_KEY.public_key().public_numbers().x.to_bytes(32, "big") in bytes(message)
