"""Software keys: in this process's memory while loaded, sealed outside it otherwise. Engines sign with them in worker threads, which the types
of key share fairly: P-256 does not wait for a queue of RSA-4096.

A thread takes what waits of a type, of whichever keys, connections and batches, and the first engine that wants so many signs it.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
)
from keyreeve_common.errors import (
    DeadlineExceeded,
    Internal,
    KeyNotFound,
    KeyreeveError,
    KeySelfTestFailed,
    SealedRecordInvalid,
    TokenUnavailable,
)
from keyreeve_common.key_id import KeyId
from keyreeve_common.schemes import KeyFamily, KeyType, SignatureScheme
from keyreeve_common.telemetry import log, log_exception, log_warning

from keyreeve_keyserver.backends.engine_choice import Engines, choose_engines
from keyreeve_keyserver.backends.engines import EngineChoice, Handle, KeyEngine, KeyUnsuited, Work
from keyreeve_keyserver.backends.lane_pool import LanePool
from keyreeve_keyserver.backends.openssl_engine import PrivateKey
from keyreeve_keyserver.backends.ports import (
    BackendHealth,
    BackendState,
    Capabilities,
    CreatedKey,
    SignOutcome,
    SignRequest,
)
from keyreeve_keyserver.domain.keys import Custody, KeyRecord
from keyreeve_keyserver.domain.secret import Secret

_GENERATORS: dict[KeyType, Callable[[], PrivateKey]] = {
    KeyType.EC_P256: lambda: ec.generate_private_key(ec.SECP256R1()),
    KeyType.EC_P384: lambda: ec.generate_private_key(ec.SECP384R1()),
    KeyType.ED25519: ed25519.Ed25519PrivateKey.generate,
    KeyType.RSA_2048: lambda: rsa.generate_private_key(65537, 2048),
    KeyType.RSA_3072: lambda: rsa.generate_private_key(65537, 3072),
    KeyType.RSA_4096: lambda: rsa.generate_private_key(65537, 4096),
}
# Shares of processor time while all types have work: a flood of large keys leaves most of it to handshakes with small ones.
_WEIGHTS = {
    KeyType.EC_P256: 8.0,
    KeyType.EC_P384: 4.0,
    KeyType.ED25519: 8.0,
    KeyType.RSA_2048: 4.0,
    KeyType.RSA_3072: 1.0,
    KeyType.RSA_4096: 1.0,
}
_EXPRESS = (KeyType.EC_P256, KeyType.ED25519)
# What is true of every software key: it was in this process's memory from the first.
_ATTRIBUTES: dict[str, str | bool] = {
    "token": "",
    "object_label": "",
    "extractable": True,
    "sensitive": False,
    "generated_in_token": False,
}
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Loaded:
    """`spki_der` stands in one sealed record only, so it says which record the key was loaded by. `handles` by the engine's place; None where
    the engine cannot sign with it."""

    spki_der: bytes
    handles: tuple[Handle | None, ...] = field(repr=False)


@dataclass(slots=True, eq=False)
class _Batch:
    """The requests of one call. Signing threads fill `outcomes`; only the event loop counts down `left` and sets `done`."""

    outcomes: list[SignOutcome]
    left: int
    done: asyncio.Future[None]


_Item = tuple[_Batch, int, SignRequest]


@dataclass(slots=True)
class _Lot:
    """What one engine signs of a piece: a request, its key, and what the engine is handed of both."""

    signing: list[tuple[_Item, _Loaded, Work]] = field(default_factory=list)

    @property
    def put(self) -> Callable[[tuple[_Item, _Loaded, Work]], None]:
        return self.signing.append


class SoftwareBackend:
    def __init__(
        self,
        name: str,
        *,
        threads: int = 0,
        engine: EngineChoice = EngineChoice.AUTO,
        engines: Engines | None = None,
    ) -> None:
        """Raises: ConfigInvalid where `engine` is one that cannot sign here."""
        self._name = name
        self._chosen = engines or choose_engines(engine)
        self._engines: tuple[KeyEngine, ...] = tuple(self._chosen.engines)
        self._keys: dict[KeyId, _Loaded] = {}
        self._threads = threads or len(os.sched_getaffinity(0))
        self._results = _Results()
        self._signed: Counter[str] = Counter()
        self._lanes: LanePool[KeyType, _Item] = LanePool(
            self._threads,
            _WEIGHTS,
            piece=lambda key_type, waiting: self._choose(key_type, waiting)[1],
            serve=self._serve,
            name=f"sign-{name}",
            express=_EXPRESS,
        )
        # Making an RSA key takes seconds: not in a thread that signs.
        self._making = ThreadPoolExecutor(1, thread_name_prefix=f"make-{name}")
        # Nor in the one that loads keys, which handshakes wait for.
        self._loading = ThreadPoolExecutor(1, thread_name_prefix=f"load-{name}")
        self._waiting = 0

    @property
    def name(self) -> str:
        return self._name

    async def start(self) -> None:
        said = log_warning if self._chosen.fallback else log
        said("signing_engine", backend=self._name, engine=self._engines[0].name, detail=self._chosen.fallback)

    async def close(self) -> None:
        for executor in (self._making, self._loading):
            executor.shutdown(wait=True, cancel_futures=True)
        for batch, index, _ in await asyncio.to_thread(self._lanes.close):
            batch.outcomes[index] = TokenUnavailable("the signer is stopping")
            _count_down(batch, 1)
        self._keys.clear()
        await asyncio.to_thread(self._chosen.close)

    def capabilities(self) -> Capabilities:
        return Capabilities(Custody.SEALED_SOFTWARE, tuple(KeyType), tuple(sorted(SignatureScheme)))

    def health(self) -> BackendHealth:
        preferred = self._engines[0]
        return BackendHealth(
            BackendState.UP,
            workers=self._threads,
            configured=self._threads,
            waiting=self._waiting,
            engine=preferred.name,
            engine_detail=self._chosen.fallback or preferred.health().detail,
            by_engine={engine.name: self._signed[engine.name] for engine in self._engines},
        )

    async def create(self, key_id: KeyId, key_type: KeyType) -> CreatedKey:
        executor = self._making if key_type.family is KeyFamily.RSA else self._loading
        key = await self._run(executor, _GENERATORS[key_type])
        pkcs8 = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        spki_der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return CreatedKey(spki_der, key_id, Secret(pkcs8), dict(_ATTRIBUTES))

    async def inspect(self, record: KeyRecord, secret: Secret | None) -> dict[str, str | bool]:
        return dict(_ATTRIBUTES)

    async def load(self, record: KeyRecord, secret: Secret | None) -> None:
        if not secret:
            raise SealedRecordInvalid("record of a software key holds no key")
        pkcs8 = secret.reveal()
        self._keys[record.key_id] = await self._run(self._loading, lambda: self._loaded(record, pkcs8))

    def _loaded(self, record: KeyRecord, pkcs8: bytes) -> _Loaded:
        key = load_der_private_key(pkcs8, None, unsafe_skip_rsa_key_validation=True)
        if key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != record.spki_der:
            raise KeySelfTestFailed("the sealed key is not the one of the record's header")
        return _Loaded(record.spki_der, tuple(_handle(engine, record.key_type, pkcs8) for engine in self._engines))

    def forget(self, key_id: KeyId) -> None:
        self._keys.pop(key_id, None)

    async def destroy(self, record: KeyRecord) -> None:
        """The sealed record is the only copy: who destroys the key erases that."""
        self.forget(record.key_id)

    async def sign(self, requests: Sequence[SignRequest]) -> list[SignOutcome]:
        if not requests:
            return []
        loop = asyncio.get_running_loop()
        self._results.loop = loop
        batch = _Batch([_NOT_REACHED] * len(requests), len(requests), loop.create_future())
        lanes: dict[KeyType, list[_Item]] = {}
        for index, request in enumerate(requests):
            lanes.setdefault(request.record.key_type, []).append((batch, index, request))
        self._waiting += len(requests)
        try:
            for key_type, items in lanes.items():
                self._lanes.submit(key_type, items)
            await batch.done
        except RuntimeError:  # closed meanwhile
            return [TokenUnavailable("the signer is stopping")] * len(requests)
        finally:
            self._waiting -= len(requests)
        return batch.outcomes

    def _choose(self, key_type: KeyType, waiting: int) -> tuple[int, int]:
        """The place of the engine that takes of so many, and how many it takes."""
        for place, engine in enumerate(self._engines):
            if engine.supports(key_type) and (count := engine.piece(key_type, waiting)):
                return place, count
        return len(self._engines) - 1, 1

    def _serve(self, key_type: KeyType, items: list[_Item]) -> None:
        """In a signing thread: signs a piece and hands it back to the event loop at once."""
        try:
            self._sign_piece(key_type, items)
        except Exception:  # a fault of ours: none of these callers is left waiting
            log_exception("signing_failed", key_type=key_type.value, items=len(items))
        counts: dict[_Batch, int] = {}
        for batch, _, _ in items:
            counts[batch] = counts.get(batch, 0) + 1
        self._results.hand_back(counts)

    def _sign_piece(self, key_type: KeyType, items: list[_Item]) -> None:
        preferred, _ = self._choose(key_type, len(items))
        now, keys = time.monotonic(), self._keys
        lots = [_Lot() for _ in self._engines]
        put, last, wanted = lots[preferred].put, None, True
        for item in items:
            batch, index, request = item
            if batch is not last:
                last, wanted = batch, not batch.done.cancelled()
            if not wanted:
                continue
            record = request.record
            loaded = keys.get(record.key_id)
            if now >= request.deadline:
                batch.outcomes[index] = DeadlineExceeded("deadline passed before the key was reached")
            # Another record of this id may have been loaded since the request was judged: it was not judged by that one.
            elif loaded is None or loaded.spki_der != record.spki_der:
                batch.outcomes[index] = KeyNotFound()
            elif (handle := loaded.handles[preferred]) is not None:
                put((item, loaded, (handle, request)))
            else:
                _put(lots, preferred + 1, item, loaded)
        for place, (engine, lot) in enumerate(zip(self._engines, lots, strict=True)):
            if not lot.signing:
                continue
            self._signed[engine.name] += len(lot.signing)
            outcomes = engine.sign(key_type, [work for _, _, work in lot.signing])
            for ((batch, index, request), loaded, _), outcome in zip(lot.signing, outcomes, strict=True):
                if outcome is not None:
                    batch.outcomes[index] = outcome
                elif place + 1 < len(lots):
                    _put(lots, place + 1, (batch, index, request), loaded)

    @staticmethod
    async def _run(executor: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(executor, work)


_NOT_REACHED: KeyreeveError = Internal("request was not reached")


class _Results:
    """From signing threads to the event loop: one wake-up for all that is done when it wakes."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._done: deque[dict[_Batch, int]] = deque()

    def hand_back(self, counts: dict[_Batch, int]) -> None:
        with self._lock:
            self._done.append(counts)
            first = len(self._done) == 1
        if first and self.loop is not None:
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            done, self._done = self._done, deque()
        for counts in done:
            for batch, count in counts.items():
                _count_down(batch, count)


def _put(lots: list[_Lot], place: int, item: _Item, loaded: _Loaded) -> None:
    """Into the lot of the first engine from `place` on that has the key; the last has every key."""
    while (handle := loaded.handles[place]) is None:
        place += 1
    lots[place].put((item, loaded, (handle, item[2])))


def _count_down(batch: _Batch, count: int) -> None:
    batch.left -= count
    if not batch.left and not batch.done.done():
        batch.done.set_result(None)


def _handle(engine: KeyEngine, key_type: KeyType, pkcs8: bytes) -> Handle | None:
    if not engine.supports(key_type):
        return None
    try:
        return engine.load(key_type, pkcs8)
    except KeyUnsuited as unsuited:
        log("key_unsuited", engine=engine.name, key_type=key_type.value, detail=str(unsuited))
        return None
