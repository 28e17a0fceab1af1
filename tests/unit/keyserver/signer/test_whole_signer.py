"""The signing service as it is, with a key of every role: it signs each good thing for its own purpose by its own key, and nothing else."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_public_key,
)
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import DeadlineExceeded, KeyreeveError
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import PURPOSES_OF_ROLE, KeyRole, Purpose, build_tls13_content
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.verification import verify_signature
from keyreeve_keyserver.backends.software import SoftwareBackend
from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_keyserver.domain.secret import Secret
from keyreeve_keyserver.frames import Refused, SignBatch, Signed, SignItem, SignResult, SignResults
from keyreeve_keyserver.signer.judging import KeyTable
from keyreeve_keyserver.signer.service import SigningService
from keyreeve_testing.statements import Crl, Ocsp, at_production, authority_record, jwt_record, token
from keyreeve_testing.tbs import AUTHORITY_KEY, LEAF, LEAF_KEY, NOW, certification_request_info, handshake_record
from keyreeve_testing.tls12 import Transcript, key_exchange

P256 = SignatureScheme.ECDSA_SECP256R1_SHA256
HANDSHAKE = handshake_record(*(PURPOSES_OF_ROLE[KeyRole.HANDSHAKE] - {Purpose.DIGEST}))
DIGESTS = replace(handshake_record(Purpose.DIGEST), key_id=KeyId("digests"))
RECORDS = {record.key_id: record for record in (HANDSHAKE, DIGESTS, authority_record(), jwt_record())}
GOOD: dict[tuple[str, Purpose], bytes] = {
    ("handshake", Purpose.TLS13_SERVER_VERIFY): build_tls13_content(Purpose.TLS13_SERVER_VERIFY, bytes(32)),
    ("handshake", Purpose.TLS13_CLIENT_VERIFY): build_tls13_content(Purpose.TLS13_CLIENT_VERIFY, bytes(48)),
    ("handshake", Purpose.TLS12_SERVER_KEY_EXCHANGE): key_exchange(),
    ("handshake", Purpose.TLS12_CLIENT_VERIFY): Transcript().to_bytes(),
    ("handshake", Purpose.CERTIFICATE_REQUEST): certification_request_info(LEAF_KEY),
    ("digests", Purpose.DIGEST): hashlib.sha256(b"something").digest(),
    ("authority", Purpose.X509_CERTIFICATE): LEAF.tbs(),
    ("authority", Purpose.X509_CRL): Crl().tbs(),
    ("authority", Purpose.OCSP_RESPONSE): at_production(Ocsp().tbs()),
    ("authority", Purpose.CERTIFICATE_REQUEST): certification_request_info(AUTHORITY_KEY),
    ("tokens", Purpose.JWT_SVID): token(),
}
MESSAGES = list(GOOD.values())
PURPOSES = [purpose for purpose in Purpose if purpose is not Purpose.UNSPECIFIED]


class Signer:
    """The service with software keys, on a loop of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.backend = SoftwareBackend("software", threads=1)
        keys = KeyTable()
        for record in RECORDS.values():
            key = LEAF_KEY if record.role is KeyRole.HANDSHAKE else AUTHORITY_KEY
            pkcs8 = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
            self.loop.run_until_complete(self.backend.load(record, Secret(pkcs8)))
            keys.put(record)
        self.service = SigningService({"software": self.backend}, keys, now=lambda: NOW, max_message=65_536)

    def sign(self, *items: SignItem) -> dict[int, SignResult]:
        async def collect() -> dict[int, SignResult]:
            batch = SignBatch(1, "spiffe://td.test/keyreeve/agent/a", items)
            frames = [frame async for frame in self.service.sign(batch)]
            return {result.id: result for frame in frames if isinstance(frame, SignResults) for result in frame.results}

        return self.loop.run_until_complete(collect())


@pytest.fixture(scope="module")
def signer() -> Iterator[Signer]:
    made = Signer()
    yield made
    made.loop.run_until_complete(made.backend.close())
    made.loop.close()


def item(number: int, key_id: str, purpose: int, message: bytes, scheme: int = P256) -> SignItem:
    return SignItem(number, KeyId(key_id), scheme, purpose, 20_000, message)


def check_signature(record: KeyRecord, purpose: int, message: bytes, result: SignResult) -> None:
    assert isinstance(result, Signed), result
    public_key = load_der_public_key(record.spki_der)
    prehashed = purpose == Purpose.DIGEST
    verify_signature(public_key, P256, message, signature=result.signature, prehashed=prehashed)


def test_every_message_is_signed_for_its_own_purpose_by_its_own_key_alone(signer: Signer) -> None:
    """All keys by all purposes by all good messages: what is signed is the table of good things, and not one thing more."""
    asked = [(key_id, purpose, message) for key_id in RECORDS for purpose in PURPOSES for message in MESSAGES]
    assert len(asked) == 4 * 10 * 11
    signed = set()
    for start in range(0, len(asked), 200):
        part = list(enumerate(asked[start : start + 200]))
        results = signer.sign(*(item(number, *each) for number, each in part))
        assert results.keys() == dict(part).keys()
        for number, (key_id, purpose, message) in part:
            if isinstance(results[number], Signed):
                check_signature(RECORDS[KeyId(key_id)], purpose, message, results[number])
                signed.add((key_id, purpose, message))
    assert signed == {(key_id, purpose, message) for (key_id, purpose), message in GOOD.items()}


_BYTES = st.binary(max_size=300) | st.builds(
    lambda message, at, change: message[:at] + change + message[at + len(change) :],
    st.sampled_from(MESSAGES).filter(lambda message: len(message) != 32),
    st.integers(0, 200),
    st.binary(min_size=1, max_size=3),
)


@given(
    st.lists(
        st.tuples(st.sampled_from([*RECORDS, "absent"]), st.integers(0, 255), _BYTES, st.integers(0, 0xFFFF)),
        max_size=8,
    )
)
def test_whatever_comes_is_answered_and_random_bytes_are_not_signed(
    signer: Signer, asked: list[tuple[str, int, bytes, int]]
) -> None:
    """No exception, one answer to each, our errors only. Signed is at most what another parser of the good thing would take as well."""
    items = [
        item(number, key_id, purpose, message, scheme)
        for number, (key_id, purpose, message, scheme) in enumerate(asked)
    ]
    results = signer.sign(*items)
    assert results.keys() == {each.id for each in items}
    for each in items:
        result = results[each.id]
        if isinstance(result, Refused):
            assert isinstance(result.error, KeyreeveError)
            assert result.error.code.value != "internal", result.error
            continue
        assert each.scheme == P256
        assert (each.key_id, Purpose(each.purpose)) in GOOD


@given(st.sampled_from(sorted(RECORDS)), st.sampled_from(PURPOSES), st.binary(max_size=400))
def test_random_bytes_are_signed_as_a_digest_of_their_length_or_not_at_all(
    signer: Signer, key_id: str, purpose: Purpose, message: bytes
) -> None:
    result = signer.sign(item(1, key_id, purpose, message))[1]
    is_digest = (key_id, purpose, len(message)) == ("digests", Purpose.DIGEST, 32)
    assert isinstance(result, Signed) is is_digest


@given(st.sampled_from(sorted(GOOD)), st.data())
def test_a_change_in_what_is_fixed_is_refused(signer: Signer, which: tuple[str, Purpose], data: st.DataObject) -> None:
    """The first bytes of every form are fixed, but for TLS 1.2's randoms and digests; so is the end of every length."""
    key_id, purpose = which
    message = GOOD[which]
    if purpose is Purpose.DIGEST:
        changed = data.draw(st.sampled_from([message[:-1], message + b"\x00", message + message]))
    elif purpose is Purpose.TLS12_SERVER_KEY_EXCHANGE:
        at = data.draw(st.integers(64, len(message) - 1))
        changed = message[:at] + bytes((message[at] ^ data.draw(st.integers(1, 255)),)) + message[at + 1 :]
    else:
        changed = data.draw(
            st.sampled_from([message[:-1], message[1:], message + b"\x00", b"\x00" + message, message * 2])
            | st.integers(1, 255).map(lambda change: bytes((message[0] ^ change,)) + message[1:])
        )
    assert isinstance(signer.sign(item(1, key_id, purpose, changed))[1], Refused)
    behind_a_good_one = signer.sign(item(0, key_id, purpose, message), item(1, key_id, purpose, changed))
    assert isinstance(behind_a_good_one[0], Signed)
    assert isinstance(behind_a_good_one[1], Refused)
    check_signature(RECORDS[KeyId(key_id)], purpose, message, signer.sign(item(1, key_id, purpose, message))[1])


_TLS13_MESSAGES = [
    build_tls13_content(purpose, bytes(length))
    for purpose in (Purpose.TLS13_SERVER_VERIFY, Purpose.TLS13_CLIENT_VERIFY)
    for length in (32, 48)
]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["handshake", "digests", "absent"]),
            st.sampled_from([Purpose.TLS13_SERVER_VERIFY, Purpose.TLS13_CLIENT_VERIFY]),
            st.sampled_from(_TLS13_MESSAGES).flatmap(
                lambda message: st.sampled_from(
                    [message, message, message[:-1], message + b"\x00", message[1:] + b"\x20"]
                )
            ),
            st.sampled_from([P256, SignatureScheme.RSA_PSS_RSAE_SHA256, 0]),
            st.sampled_from([0, 1, 20_000, 20_001]),
        ),
        min_size=2,
        max_size=12,
    )
)
def test_each_item_of_a_batch_is_judged_as_if_it_were_alone(
    signer: Signer, asked: list[tuple[str, Purpose, bytes, int, int]]
) -> None:
    """What is remembered of an item lets nothing through for the next one."""
    items = [
        SignItem(number, KeyId(key_id), scheme, purpose, deadline_ms, message)
        for number, (key_id, purpose, message, scheme, deadline_ms) in enumerate(asked)
    ]
    together = signer.sign(*items)
    for each in items:
        alone = signer.sign(each)[each.id]
        assert _end(together[each.id], each) == _end(alone, each)


def _end(result: SignResult, each: SignItem) -> str:
    """A millisecond is over before it is signed, or not: either is right."""
    if isinstance(result, Refused) and not (each.deadline_ms == 1 and isinstance(result.error, DeadlineExceeded)):
        return result.error.code.value
    return "passed"
