"""The Signing service: unary, and long streams of batches. Everything here is per batch where it can be.

A refused item never fails its batch, a lost signer never fails a stream. The caller's SVID is held against the clock for every batch.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from keyreeve_common.errors import (
    KeyreeveError,
    MessageTooLarge,
    Overloaded,
    RateLimited,
    SchemeNotSupported,
    Unavailable,
)
from keyreeve_common.grpc_edge import Peer, current_peer
from keyreeve_common.purposes import MAX_MESSAGE_BYTES
from keyreeve_common.sign_batch import (
    PACKED_METADATA,
    PackedItems,
    Refused,
    Signed,
    SignItem,
    SignResult,
    new_item,
    uses_of,
)
from keyreeve_common.trace import checked_trace
from keyreeve_common.v1 import keyserver_pb2, keyserver_pb2_grpc

from keyreeve_keyserver.config import Limits
from keyreeve_keyserver.domain.policy import Grant
from keyreeve_keyserver.frontend.access import Access
from keyreeve_keyserver.frontend.allowed_uses import AllowedUses
from keyreeve_keyserver.frontend.engine import SigningEngine
from keyreeve_keyserver.frontend.quarantine_watch import QuarantineWatch
from keyreeve_keyserver.frontend.rates import RateLimiter
from keyreeve_keyserver.frontend.refusal_log import RefusalLog
from keyreeve_keyserver.frontend.release import ReleaseGate
from keyreeve_keyserver.frontend.sign_stream import SignStream, log_local

# An agent has one for each replica. Each may hold a batch that waits for room, of 16 MiB.
MAX_STREAMS_PER_CALLER = 32
_MAX_SCHEME = 0xFFFF
_DRAIN_RETRY = timedelta(milliseconds=100)
_Request = keyserver_pb2.SignItem | keyserver_pb2.SignRequest | SignItem


class SigningServicer(keyserver_pb2_grpc.SigningServicer):
    def __init__(
        self,
        access: Access,
        engine: SigningEngine,
        limits: Limits,
        clock: Callable[[], datetime],
        watch: QuarantineWatch | None = None,
    ) -> None:
        self.access = access
        self.engine = engine
        self.limits = limits
        self.clock = clock
        self.gate = ReleaseGate(access, clock, engine.trail)
        self._watch = watch
        self.rates = RateLimiter(limits.rates)
        self._refusal_log = RefusalLog()
        self._bound_ms = int(limits.sign_timeout / timedelta(milliseconds=1))
        self._streams: set[SignStream] = set()
        engine.metrics.streams = self._streams
        self._draining = False

    async def Sign(self, request: keyserver_pb2.SignRequest, context: Any) -> keyserver_pb2.SignResponse:
        peer = current_peer()
        by_signer = False
        try:
            item = self._admitted(peer.name, request, self._deadline_ms(context.time_remaining()))
            by_signer = True
            result = await self._sign_one(peer, item)
        except KeyreeveError as error:
            self.refused(peer, [(request.key_id, request.purpose, error)], by_signer=by_signer)
            raise
        return keyserver_pb2.SignResponse(signature=result)

    async def SignStream(
        self, request_iterator: AsyncIterator[keyserver_pb2.SignBatch], context: Any
    ) -> AsyncIterator[keyserver_pb2.SignResultBatch]:
        peer = current_peer()
        if not peer.local and sum(stream.caller == peer.name for stream in self._streams) >= MAX_STREAMS_PER_CALLER:
            raise Overloaded(f"{MAX_STREAMS_PER_CALLER} streams of this caller are open, the most allowed; use those")
        stream = SignStream(self, peer)
        self._streams.add(stream)  # before anything is awaited: streams that open together are counted too
        reader = asyncio.create_task(stream.read(request_iterator))
        if self._draining:
            stream.end(_draining())
        try:
            await context.send_initial_metadata(((PACKED_METADATA, "1"),))
            while (answer := await stream.answers.get()) is not None:
                yield answer.message
                stream.release(answer.count)
        finally:
            self._streams.discard(stream)
            reader.cancel()
        if stream.ending is not None:
            raise stream.ending

    def drain(self) -> None:
        """Streams take no more batches, answer what they have, and end with `unavailable`."""
        self._draining = True
        for stream in self._streams:
            stream.end(_draining())

    def _admitted(self, caller: str, request: keyserver_pb2.SignRequest, deadline_ms: int) -> SignItem:
        now = self.clock()
        self.access.require_admitted(caller, now)
        uses = self.allowed_uses(caller, now)
        item = self.judge(uses, 0, request, deadline_ms)
        if late := self.admit(uses, [item])[1]:
            raise late[0].error
        return item

    def judge(self, uses: AllowedUses, number: int, request: _Request, deadline_ms: int) -> SignItem:
        """The signer's item for a request that this caller may make. Raises: the refusal."""
        try:
            return self._judged(uses, number, request, deadline_ms)
        except KeyreeveError as error:
            self._note_refusal(uses.caller, request, error)
            raise

    def admit(self, uses: AllowedUses, items: Sequence[SignItem]) -> tuple[Sequence[SignItem], list[Refused]]:
        """Those items that the rates let through, and the refusals of the others. A key's items take their tokens together where all fit."""
        late: dict[int, Refused] = {}
        counts = Counter([use[0] for use in uses_of(items)]) if uses.limited else {}
        for key_id, grant in uses.limited.items():
            try:
                self.rates.admit(grant, counts[key_id])
            except RateLimited:
                late.update(
                    {
                        item.id: refused
                        for item in items
                        if item.key_id == key_id and (refused := self._late(uses, grant, item))
                    }
                )
        if not late:
            return items, []
        return [item for item in items if item.id not in late], list(late.values())

    def _late(self, uses: AllowedUses, grant: Grant, item: SignItem) -> Refused | None:
        try:
            self.rates.admit(grant)
        except RateLimited as error:
            self._note_refusal(uses.caller, item, error)
            return Refused(item.id, error)
        return None

    def _note_refusal(self, caller: str, request: _Request, error: KeyreeveError) -> None:
        self.engine.metrics.refused(request.purpose, error.code.value)
        self.record_refusal(caller, request, error)

    def _judged(self, uses: AllowedUses, number: int, request: _Request, deadline_ms: int) -> SignItem:
        message = request.message
        if len(message) > MAX_MESSAGE_BYTES:
            raise MessageTooLarge(f"message has {len(message)} bytes, at most {MAX_MESSAGE_BYTES} are allowed")
        purpose, scheme = request.purpose, request.scheme
        key_id = uses.of(request.key_id, purpose)
        if scheme > _MAX_SCHEME:
            raise SchemeNotSupported("signature scheme is not a code point of the TLS SignatureScheme registry")
        trace = checked_trace(request.trace)
        return new_item((number, key_id, scheme, purpose, deadline_ms, message, trace))

    def lets_through(self, uses: AllowedUses, items: PackedItems) -> bool:
        """Whether every one of these may be signed as it stands; else they are to be judged one by one, each for its own refusal."""
        if min(items.deadlines_ms) == 0 or max(items.deadlines_ms) > self._bound_ms:
            return False
        try:
            for key_id, purpose, _ in set(items.uses):
                uses.of(key_id, purpose)
        except KeyreeveError:
            return False
        return True

    def allowed_uses(self, caller: str, now: datetime) -> AllowedUses:
        return AllowedUses(self.access, self.rates, caller, now)

    def record_refusal(self, caller: str, request: _Request, error: KeyreeveError) -> None:
        self.engine.trail.refusal(
            caller,
            error,
            key_id=request.key_id,
            purpose=request.purpose,
            scheme=request.scheme,
            trace=request.trace,
            message=request.message,
        )

    def refused(
        self, peer: Peer, refusals: Sequence[tuple[str, int, KeyreeveError]], *, by_signer: bool = False
    ) -> None:
        """Takes note of what a caller was refused: key id, purpose, why."""
        self._refusal_log.tell(peer.name, refusals)
        if self._watch is not None and not peer.local:
            self._watch.refused(peer.name, refusals, by_signer=by_signer)

    def bound_ms(self, asked_ms: int) -> int:
        return asked_ms if 0 < asked_ms < self._bound_ms else self._bound_ms

    def _deadline_ms(self, remaining_s: float | None) -> int:
        return self.bound_ms(max(1, int(min(remaining_s, 3600.0) * 1000)) if remaining_s is not None else 0)

    async def _sign_one(self, peer: Peer, item: SignItem) -> bytes:
        answer: asyncio.Future[SignResult] = asyncio.get_running_loop().create_future()

        def settle(results: Sequence[SignResult]) -> None:
            if not answer.done():
                answer.set_result(results[0])

        log_local(peer, [item])
        on_results = self.gate.guard(peer.name, [item], settle)
        self.engine.submit(peer.name, [item], on_results, timeout_s=item.deadline_ms / 1000)
        result = await answer
        if isinstance(result, Signed):
            return result.signature
        raise result.error


def _draining() -> Unavailable:
    return Unavailable("this key server is stopping; use another replica, or retry", retry_after=_DRAIN_RETRY)
