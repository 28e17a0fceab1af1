"""The self-test at load: a key that is not its record's is refused, a backend that fails says nothing of the key, the message is no oracle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import cast

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from keyreeve_common.errors import KeyreeveError, KeySelfTestFailed, SchemeNotSupported, TokenUnavailable
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import DEFAULT_SCHEMES, KeyType, SignatureScheme
from keyreeve_keyserver.backends.ports import Backend, Capabilities, SignatureMismatch, SignOutcome, SignRequest
from keyreeve_keyserver.backends.software import SoftwareBackend
from keyreeve_keyserver.domain.keys import Custody, KeyRecord
from keyreeve_keyserver.domain.purposes import check_request
from keyreeve_keyserver.domain.secret import Secret
from keyreeve_keyserver.signer.self_test import SELF_TEST_MESSAGE, load_tested
from keyreeve_testing.tbs import authority_record, handshake_record

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def record_of(key_type: KeyType, spki_der: bytes) -> KeyRecord:
    purposes = frozenset({Purpose.TLS13_SERVER_VERIFY})
    return KeyRecord(KeyId("k"), key_type, KeyRole.HANDSHAKE, purposes, "soft", "k", spki_der, "", NOW)


class PlayedToken:
    """Answers each self-test with the next of `outcomes`."""

    def __init__(self, *outcomes: SignOutcome, schemes: tuple[SignatureScheme, ...] = ()) -> None:
        self.outcomes = list(outcomes)
        self.schemes = schemes
        self.asked: list[SignRequest] = []
        self.loaded: set[KeyId] = set()

    def capabilities(self) -> Capabilities:
        return Capabilities(Custody.TOKEN_RESIDENT, (), self.schemes)

    async def load(self, record: KeyRecord, secret: Secret | None) -> None:
        self.loaded.add(record.key_id)

    def forget(self, key_id: KeyId) -> None:
        self.loaded.discard(key_id)

    async def sign(self, requests: Sequence[SignRequest]) -> list[SignOutcome]:
        self.asked += requests
        return [self.outcomes.pop(0)]


async def load(token: PlayedToken, record: KeyRecord) -> None:
    await load_tested(cast("Backend", token), record, None)


KEY = ec.generate_private_key(ec.SECP256R1())
STRANGER = ec.generate_private_key(ec.SECP256R1())
SPKI = KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def signed_by(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.sign(SELF_TEST_MESSAGE, ec.ECDSA(SHA256()))


@pytest.mark.parametrize("key_type", KeyType)
async def test_every_key_type_passes(key_type: KeyType) -> None:
    backend = SoftwareBackend("soft", threads=1)
    created = await backend.create(KeyId("k"), key_type)
    record = record_of(key_type, created.spki_der)
    await load_tested(backend, record, created.secret)
    request = SignRequest(record, DEFAULT_SCHEMES[key_type.family], b"m", float("inf"))
    assert isinstance((await backend.sign([request]))[0], bytes)
    await backend.close()


async def test_box_with_another_key_is_refused_and_not_loaded() -> None:
    backend = SoftwareBackend("soft", threads=1)
    record = record_of(KeyType.EC_P256, SPKI)
    foreign = STRANGER.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(KeySelfTestFailed):
        await load_tested(backend, record, Secret(foreign))
    request = SignRequest(record, SignatureScheme.ECDSA_SECP256R1_SHA256, b"m", float("inf"))
    assert isinstance((await backend.sign([request]))[0], KeyreeveError)
    await backend.close()


@pytest.mark.parametrize(
    "wrong", [signed_by(STRANGER), b"\x00", b"no signature", SignatureMismatch("it does not verify")], ids=repr
)
async def test_two_wrong_signatures_fail_the_key_and_one_does_not(wrong: SignOutcome) -> None:
    record = record_of(KeyType.EC_P256, SPKI)
    token = PlayedToken(wrong, wrong)
    with pytest.raises(KeySelfTestFailed):
        await load(token, record)
    assert not token.loaded
    token = PlayedToken(wrong, signed_by(KEY))
    await load(token, record)
    assert token.loaded


async def test_token_that_is_away_says_nothing_of_the_key() -> None:
    token = PlayedToken(TokenUnavailable("removed"))
    with pytest.raises(TokenUnavailable):
        await load(token, record_of(KeyType.EC_P256, SPKI))
    assert not token.loaded


async def test_scheme_is_one_that_the_token_has() -> None:
    backend = SoftwareBackend("soft", threads=1)
    created = await backend.create(KeyId("k"), KeyType.RSA_2048)
    token = PlayedToken(SchemeNotSupported("stop here"), schemes=(SignatureScheme.RSA_PKCS1_SHA256,))
    with pytest.raises(SchemeNotSupported):
        await load(token, record_of(KeyType.RSA_2048, created.spki_der))
    assert [request.scheme for request in token.asked] == [SignatureScheme.RSA_PKCS1_SHA256]
    await backend.close()


@pytest.mark.parametrize("purpose", sorted(set(Purpose)))
@pytest.mark.parametrize("record", [handshake_record(), authority_record()], ids=["handshake", "authority"])
def test_no_purpose_accepts_the_message(record: KeyRecord, purpose: Purpose) -> None:
    """Whatever a key may sign: what it signs at load is none of it."""
    scheme = DEFAULT_SCHEMES[record.key_type.family]
    with pytest.raises(KeyreeveError):
        check_request(SELF_TEST_MESSAGE, record, purpose=purpose, scheme=scheme, now=NOW)


def test_message_is_of_no_form_that_is_signed_anywhere() -> None:
    """The rules behind the test above, for purposes of keys that this suite makes no record of."""
    assert not SELF_TEST_MESSAGE.startswith((b" " * 64, b"0", b"\x01", b"\x30"))  # TLS 1.3, JSON or DER, ClientHello
    assert b"." not in SELF_TEST_MESSAGE  # a JOSE signing input has one
    assert len(SELF_TEST_MESSAGE) not in (20, 28, 32, 36, 48, 64)  # digests
    assert SELF_TEST_MESSAGE[64] != 3  # named_curve, behind the two randoms of a ServerKeyExchange
    with pytest.raises(ValueError, match="Expecting"):
        json.loads(SELF_TEST_MESSAGE)
