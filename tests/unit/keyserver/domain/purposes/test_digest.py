"""Digests: for keys created with the purpose, and of exactly the length of the scheme's hash."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import InvalidRequest, PurposeMismatch, PurposeNotPermitted, SchemeNotSupported
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType, SignatureScheme, schemes_of
from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_keyserver.domain.purposes import check_request
from keyreeve_keyserver.domain.purposes.digest import check_digest
from keyreeve_testing.statements import authority_record, jwt_record
from keyreeve_testing.tbs import LEAF_KEY, NOW, handshake_record

P256 = SignatureScheme.ECDSA_SECP256R1_SHA256
RECORD = handshake_record(Purpose.DIGEST)


def judge(message: bytes, record: KeyRecord = RECORD, scheme: SignatureScheme = P256) -> None:
    check_request(message, record, purpose=Purpose.DIGEST, scheme=scheme, now=NOW)


def test_rsa_digests_have_the_length_of_their_hash() -> None:
    record = handshake_record(Purpose.DIGEST, key=rsa.generate_private_key(65537, 2048), key_type=KeyType.RSA_2048)
    for scheme in schemes_of(KeyType.RSA_2048):
        size = hashlib.new(scheme.facts.hash_name).digest_size
        judge(bytes(size), record, scheme)
        for wrong in (0, 20, 36, size - 1, size + 1):
            with pytest.raises(PurposeMismatch, match=f"message has {wrong} bytes, a digest of .* has {size}"):
                judge(bytes(wrong), record, scheme)


@given(st.binary(max_size=100))
def test_only_the_length_counts(message: bytes) -> None:
    if len(message) == 32:
        judge(message)
        return
    with pytest.raises(PurposeMismatch, match="digest: message has"):
        judge(message)


def test_digest_is_opt_in_and_for_handshake_keys() -> None:
    with pytest.raises(PurposeNotPermitted, match="key was not created for digest"):
        judge(bytes(32), handshake_record())
    for record, role in ((authority_record(), KeyRole.AUTHORITY), (jwt_record(), KeyRole.JWT_AUTHORITY)):
        with pytest.raises(PurposeNotPermitted, match=f"{role.value} never signs for digest"):
            judge(bytes(32), record)


def test_ed25519_never_signs_a_digest() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    with pytest.raises(InvalidRequest, match="ed25519 cannot have purpose digest"):
        handshake_record(Purpose.DIGEST, key=key, key_type=KeyType.ED25519)
    with pytest.raises(SchemeNotSupported, match="takes the message whole"):
        check_digest(bytes(64), SignatureScheme.ED25519)
    with pytest.raises(SchemeNotSupported):
        judge(bytes(64), handshake_record(Purpose.DIGEST, key=LEAF_KEY), SignatureScheme.ED25519)
