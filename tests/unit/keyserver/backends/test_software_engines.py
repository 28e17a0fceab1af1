"""The software backend over engines of the test's own: who signs what, how pieces are filled, and that nobody is left waiting."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
)
from keyreeve_common.errors import Internal, KeyNotFound, TokenUnavailable
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import DEFAULT_SCHEMES, KeyType
from keyreeve_common.verification import verify_signature
from keyreeve_keyserver.backends.engine_choice import Engines
from keyreeve_keyserver.backends.engines import EngineHealth, Handle, KeyUnsuited, Work
from keyreeve_keyserver.backends.multibuffer_engine import EngineUnusable, MultiBufferEngine, open_multibuffer
from keyreeve_keyserver.backends.openssl_engine import OpenSslEngine
from keyreeve_keyserver.backends.ports import SignOutcome, SignRequest
from keyreeve_keyserver.backends.software import SoftwareBackend
from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_keyserver.domain.secret import Secret

WAIT_S = 20


class Lanes:
    """Takes eight or more; signs with OpenSSL, notes the size of each piece, and does what the test tells it to."""

    name = "lanes"

    def __init__(self, sign: Callable[[Sequence[Work]], Sequence[SignOutcome | None]] | None = None) -> None:
        self.pieces: list[int] = []
        self.unsuited: set[bytes] = set()
        self._openssl = OpenSslEngine()
        self._sign = sign

    def supports(self, key_type: KeyType) -> bool:
        return True

    def piece(self, key_type: KeyType, waiting: int) -> int:
        return min(waiting, 64) if waiting >= 8 else 0

    def load(self, key_type: KeyType, pkcs8: bytes) -> Handle:
        if pkcs8 in self.unsuited:
            raise KeyUnsuited("not in lanes")
        return self._openssl.load(key_type, pkcs8)

    def sign(self, key_type: KeyType, work: Sequence[Work]) -> Sequence[SignOutcome | None]:
        self.pieces.append(len(work))
        return self._sign(work) if self._sign else self._openssl.sign(key_type, work)

    def health(self) -> EngineHealth:
        return EngineHealth(True)


def backend_of(lanes: Lanes) -> SoftwareBackend:
    return SoftwareBackend("software", threads=1, engines=Engines([lanes, OpenSslEngine()]))


def record_of(key_id: str, key_type: KeyType, spki_der: bytes) -> KeyRecord:
    purposes = frozenset({Purpose.TLS13_SERVER_VERIFY})
    made = datetime(2026, 1, 1, tzinfo=UTC)
    return KeyRecord(KeyId(key_id), key_type, KeyRole.HANDSHAKE, purposes, "software", key_id, spki_der, "", made)


async def loaded(backend: SoftwareBackend, key_id: str, key_type: KeyType = KeyType.EC_P384) -> KeyRecord:
    created = await backend.create(KeyId(key_id), key_type)
    record = record_of(key_id, key_type, created.spki_der)
    await backend.load(record, created.secret)
    return record


def request_for(record: KeyRecord, message: bytes = b"message", seconds: float = 20) -> SignRequest:
    return SignRequest(record, DEFAULT_SCHEMES[record.key_type.family], message, time.monotonic() + seconds)


def verify(request: SignRequest, outcome: object) -> None:
    assert isinstance(outcome, bytes), outcome
    key = load_der_public_key(request.record.spki_der)
    verify_signature(key, request.scheme, request.message, signature=outcome)


class Held:
    """Occupies the one thread that serves this type (P-384 has no express thread), so that what comes meanwhile waits together."""

    def __init__(self, lanes: Lanes) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        openssl = OpenSslEngine()

        def sign(work: Sequence[Work]) -> Sequence[SignOutcome | None]:
            if not self.begun.is_set():
                self.begun.set()
                assert self.go_on.wait(WAIT_S)
            return openssl.sign(KeyType.EC_P384, work)

        lanes._sign = sign

    async def hold(self, backend: SoftwareBackend, record: KeyRecord) -> asyncio.Task[list[SignOutcome]]:
        task = asyncio.create_task(backend.sign([request_for(record)] * 8))
        assert await asyncio.to_thread(self.begun.wait, WAIT_S)
        return task


async def test_a_piece_is_filled_from_many_batches_and_keys() -> None:
    """Twenty callers with one request each, by two keys: one piece of twenty."""
    lanes = Lanes()
    held, backend = Held(lanes), backend_of(lanes)
    records = [await loaded(backend, "one"), await loaded(backend, "two")]
    first = await held.hold(backend, records[0])
    requests = [request_for(records[n % 2], str(n).encode()) for n in range(20)]
    tasks = [asyncio.create_task(backend.sign([request])) for request in requests]
    await asyncio.sleep(0)  # each has handed in its request
    held.go_on.set()
    for request, outcomes in zip(requests, await asyncio.gather(*tasks), strict=True):
        verify(request, outcomes[0])
    assert all(isinstance(outcome, bytes) for outcome in await first)
    assert lanes.pieces == [8, 20]
    await backend.close()


async def test_few_requests_are_signed_by_the_next_engine() -> None:
    lanes = Lanes()
    backend = backend_of(lanes)
    record = await loaded(backend, "k")
    for outcome in await backend.sign([request_for(record)] * 3):
        verify(request_for(record), outcome)
    assert lanes.pieces == []
    assert dict(backend.health().by_engine) == {"lanes": 0, "openssl": 3}
    await backend.close()


async def test_a_key_that_is_unsuited_is_signed_with_by_the_next_engine_beside_others() -> None:
    lanes = Lanes()
    backend = backend_of(lanes)
    fine = await loaded(backend, "fine")
    created = await backend.create(KeyId("odd"), KeyType.EC_P384)
    assert created.secret is not None
    lanes.unsuited.add(created.secret.reveal())
    odd = record_of("odd", KeyType.EC_P384, created.spki_der)
    await backend.load(odd, created.secret)
    requests = [request_for([fine, odd][n % 2], str(n).encode()) for n in range(16)]
    for request, outcome in zip(requests, await backend.sign(requests), strict=True):
        verify(request, outcome)
    assert dict(backend.health().by_engine) == {"lanes": 8, "openssl": 8}
    await backend.close()


async def test_what_an_engine_leaves_the_next_signs_with_the_same_key() -> None:
    """Though the key was meanwhile replaced: what is signed was judged by the record of the first."""
    lanes = Lanes()
    backend = backend_of(lanes)
    record = await loaded(backend, "same")
    created = await backend.create(KeyId("same"), KeyType.EC_P384)
    other = record_of("same", KeyType.EC_P384, created.spki_der)
    loop = asyncio.get_running_loop()

    def leave(work: Sequence[Work]) -> Sequence[SignOutcome | None]:
        asyncio.run_coroutine_threadsafe(backend.load(other, created.secret), loop).result(WAIT_S)
        return [None] * len(work)

    lanes._sign = leave
    for outcome in await backend.sign([request_for(record)] * 8):
        verify(request_for(record), outcome)
    assert isinstance((await backend.sign([request_for(record)]))[0], KeyNotFound)
    verify(request_for(other), (await backend.sign([request_for(other)]))[0])
    await backend.close()


async def test_an_engine_that_breaks_leaves_nobody_waiting() -> None:
    def fail(work: Sequence[Work]) -> Sequence[SignOutcome | None]:
        raise RuntimeError("a bug")

    lanes = Lanes(fail)
    backend = backend_of(lanes)
    record = await loaded(backend, "k")
    async with asyncio.timeout(WAIT_S):
        outcomes = await backend.sign([request_for(record)] * 9)
        assert {type(outcome) for outcome in outcomes} == {Internal}
        verify(request_for(record), (await backend.sign([request_for(record)]))[0])
    await backend.close()


async def test_a_caller_that_left_costs_no_signature_and_harms_no_neighbour() -> None:
    lanes = Lanes()
    held, backend = Held(lanes), backend_of(lanes)
    record = await loaded(backend, "k")
    first = await held.hold(backend, record)
    leaving = asyncio.create_task(backend.sign([request_for(record)] * 8))
    staying = asyncio.create_task(backend.sign([request_for(record)] * 8))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    held.go_on.set()
    for outcome in [*await first, *await staying]:
        verify(request_for(record), outcome)
    assert leaving.cancelled()
    assert lanes.pieces == [8, 8]
    assert backend.health().waiting == 0
    await backend.close()


async def test_close_answers_what_waits() -> None:
    lanes = Lanes()
    held, backend = Held(lanes), backend_of(lanes)
    record = await loaded(backend, "k")
    first = await held.hold(backend, record)
    waiting = asyncio.create_task(backend.sign([request_for(record)] * 3))
    await asyncio.sleep(0)
    closing = asyncio.create_task(backend.close())
    while not backend._lanes._closed:
        await asyncio.sleep(0.01)  # the pool takes no more from here on
    held.go_on.set()
    await closing
    assert {type(outcome) for outcome in await waiting} == {TokenUnavailable}
    assert {type(outcome) for outcome in await first} == {bytes}
    assert {type(outcome) for outcome in await backend.sign([request_for(record)])} == {TokenUnavailable}


async def test_no_requests_are_no_wait() -> None:
    backend = backend_of(Lanes())
    assert await backend.sign([]) == []
    await backend.close()


def lanes_are_unusable() -> str:
    try:
        open_multibuffer()
    except EngineUnusable as missing:
        return str(missing)
    return ""


@pytest.mark.skipif(bool(lanes_are_unusable()), reason=lanes_are_unusable())
async def test_rsa_keys_of_every_form_sign_in_one_batch() -> None:
    """With real lanes: an exponent that these do not have goes to OpenSSL, beside keys that they sign with."""
    engine = MultiBufferEngine(open_multibuffer()._module, least={KeyType.RSA_2048: 1})
    backend = SoftwareBackend("software", engines=Engines([engine, OpenSslEngine()]))
    records = []
    for name, exponent in (("usual", 65537), ("small", 3)):
        key = rsa.generate_private_key(exponent, 2048)
        spki_der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        records.append(record_of(name, KeyType.RSA_2048, spki_der))
        pkcs8 = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        await backend.load(records[-1], Secret(pkcs8))
    requests = [request_for(records[n % 2], str(n).encode()) for n in range(16)]
    for request, outcome in zip(requests, await backend.sign(requests), strict=True):
        verify(request, outcome)
    assert dict(backend.health().by_engine) == {"multibuffer": 8, "openssl": 8}
    await backend.close()
