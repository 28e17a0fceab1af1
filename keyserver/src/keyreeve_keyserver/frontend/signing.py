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
    ErrorCode,
    Internal,
    InvalidRequest,
    KeyreeveError,
    MessageTooLarge,
    Overloaded,
    RateLimited,
    SchemeNotSupported,
    Unavailable,
)
from keyreeve_common.grpc_edge import Peer, current_peer, error_to_proto
from keyreeve_common.purposes import MAX_MESSAGE_BYTES, Purpose
from keyreeve_common.telemetry import log, log_exception
from keyreeve_common.trace import checked_trace
from keyreeve_common.v1 import keyserver_pb2, keyserver_pb2_grpc

from keyreeve_keyserver.config import Limits
from keyreeve_keyserver.domain.policy import Grant
from keyreeve_keyserver.frames import MAX_ITEMS, Refused, Signed, SignItem, SignResult, new_item
from keyreeve_keyserver.frontend.access import Access
from keyreeve_keyserver.frontend.allowed_uses import AllowedUses
from keyreeve_keyserver.frontend.engine import SigningEngine
from keyreeve_keyserver.frontend.quarantine_watch import QuarantineWatch
from keyreeve_keyserver.frontend.rates import RateLimiter
from keyreeve_keyserver.frontend.refusal_log import RefusalLog
from keyreeve_keyserver.frontend.release import ReleaseGate

# An agent has one for each replica. Each may hold a batch that waits for room, of 16 MiB.
MAX_STREAMS_PER_CALLER = 32
_MAX_SCHEME = 0xFFFF
_ITEMS_PER_BATCH = 64
_DRAIN_RETRY = timedelta(milliseconds=100)
_Request = keyserver_pb2.SignItem | keyserver_pb2.SignRequest


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
        self._streams: set[_Stream] = set()
        engine.metrics.streams = self._streams
        self._draining = False

    async def Sign(self, request: keyserver_pb2.SignRequest, context: Any) -> keyserver_pb2.SignResponse:
        peer = current_peer()
        item = None
        try:
            self.access.require_admitted(peer.name, self.clock())
            uses = self.allowed_uses(peer.name, self.clock())
            item = self.judge(uses, 0, request, self._deadline_ms(context.time_remaining()))
            if late := self.admit(uses, [item])[1]:
                raise late[0].error
            result = await self._sign_one(peer, item)
        except KeyreeveError as error:
            self.refused(peer, [(request.key_id, request.purpose, error)], by_signer=item is not None)
            raise
        return keyserver_pb2.SignResponse(signature=result)

    async def SignStream(
        self, request_iterator: AsyncIterator[keyserver_pb2.SignBatch], context: Any
    ) -> AsyncIterator[keyserver_pb2.SignResultBatch]:
        peer = current_peer()
        if not peer.local and sum(stream.caller == peer.name for stream in self._streams) >= MAX_STREAMS_PER_CALLER:
            raise Overloaded(f"{MAX_STREAMS_PER_CALLER} streams of this caller are open, the most allowed; use those")
        stream = _Stream(self, peer)
        self._streams.add(stream)
        reader = asyncio.create_task(stream.read(request_iterator))
        if self._draining:
            stream.end(_draining())
        try:
            while (answer := await stream.answers.get()) is not None:
                yield answer
                stream.release(len(answer.results))
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

    def judge(self, uses: AllowedUses, number: int, request: _Request, deadline_ms: int) -> SignItem:
        """The signer's item for a request that this caller may make. Raises: the refusal."""
        try:
            return self._judged(uses, number, request, deadline_ms)
        except KeyreeveError as error:
            self._note_refusal(uses.caller, request, error)
            raise

    def admit(self, uses: AllowedUses, items: list[SignItem]) -> tuple[list[SignItem], list[Refused]]:
        """Those items that the rates let through, and the refusals of the others. A key's items take their tokens together where all fit."""
        late: dict[int, Refused] = {}
        counts = Counter([item.key_id for item in items]) if uses.limited else {}
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

    def _note_refusal(self, caller: str, request: _Request | SignItem, error: KeyreeveError) -> None:
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

    def allowed_uses(self, caller: str, now: datetime) -> AllowedUses:
        return AllowedUses(self.access, self.rates, caller, now)

    def record_refusal(self, caller: str, request: _Request | SignItem, error: KeyreeveError) -> None:
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


class _Stream:
    """One SignStream: about `batches_per_stream` batches' worth of items between their reading and the sending of their results.

    Then reading waits, and HTTP/2 holds the client back: one that sends and never reads costs bounded memory. Items are counted, not
    batches: a batch with one slow item has most of its room back at once.
    """

    def __init__(self, service: SigningServicer, peer: Peer) -> None:
        self.answers: asyncio.Queue[keyserver_pb2.SignResultBatch | None] = asyncio.Queue()
        self.ending: KeyreeveError | None = None
        self._service = service
        self._peer = peer
        self.caller = peer.name
        self._outstanding: set[int] = set()
        self._room = service.limits.batches_per_stream * _ITEMS_PER_BATCH
        self._held = 0
        self._released = asyncio.Event()
        self._read_ended = False

    async def read(self, batches: AsyncIterator[keyserver_pb2.SignBatch]) -> None:
        try:
            async for batch in batches:
                while self._held >= self._room and not self._read_ended:
                    self._released.clear()
                    await self._released.wait()
                if self._read_ended:  # it ended while this batch waited
                    return
                self._take_guarded(batch)
            self.end(None)
        except KeyreeveError as error:
            self.end(error)
        except asyncio.CancelledError:
            self.end(None)
            raise
        except Exception:  # the client went away in the middle of a message
            self.end(None)

    def _take_guarded(self, batch: keyserver_pb2.SignBatch) -> None:
        """A fault of ours ends the stream by name: unanswered items in a stream that ended well would be waited for."""
        try:
            self._take(batch)
        except KeyreeveError:
            raise
        except Exception:
            log_exception("stream_failed", caller=self.caller)
            raise Internal("internal error; the server's log has the cause") from None

    def release(self, count: int) -> None:
        """So many results were sent."""
        self._held -= count
        self._released.set()

    def end(self, error: KeyreeveError | None) -> None:
        """No more batches are taken; the stream ends when the last result is out."""
        if self._read_ended:
            return
        self._read_ended = True
        self._released.set()
        self.ending = error
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._read_ended and not self._outstanding:
            self.answers.put_nowait(None)

    def _take(self, batch: keyserver_pb2.SignBatch) -> None:
        service, peer, caller = self._service, self._peer, self.caller
        now = service.clock()
        if not peer.local:
            peer.require_svid(now)
        requests = batch.items
        if len(requests) > MAX_ITEMS:
            raise InvalidRequest(f"batch has {len(requests)} items, at most {MAX_ITEMS} are allowed")
        if not requests:
            return
        self._held += len(requests)
        ids = [request.id for request in requests]
        try:
            service.access.require_admitted(caller, now)
            self._check_ids(ids)
        except KeyreeveError as error:
            self._refuse_all(requests, error)
            return
        accepted: list[SignItem] = []
        refused: list[tuple[int, str, int, KeyreeveError]] = []
        uses = service.allowed_uses(caller, now)
        for request, number in zip(requests, ids, strict=True):
            try:
                accepted.append(service.judge(uses, number, request, service.bound_ms(request.deadline_ms)))
            except KeyreeveError as error:
                refused.append((number, request.key_id, request.purpose, error))
        accepted, late = service.admit(uses, accepted)
        if late:
            asked = {request.id: request for request in requests}
            refused += [(each.id, asked[each.id].key_id, asked[each.id].purpose, each.error) for each in late]
        if refused:
            service.refused(peer, [entry[1:] for entry in refused])
            shown = [keyserver_pb2.SignResult(id=entry[0], error=error_to_proto(entry[3])) for entry in refused]
            self._answer(shown)
        if not accepted:
            return
        log_local(peer, accepted)
        self._outstanding.update([item.id for item in accepted])
        on_results = service.gate.guard(caller, accepted, self._collector(accepted))
        longest_ms = max([item.deadline_ms for item in accepted])
        service.engine.submit(caller, accepted, on_results, timeout_s=longest_ms / 1000)

    def _check_ids(self, ids: list[int]) -> None:
        if len(set(ids)) != len(ids) or not self._outstanding.isdisjoint(ids):
            raise InvalidRequest("an item id stands twice among the outstanding items of this stream")

    def _refuse_all(self, requests: Sequence[keyserver_pb2.SignItem], error: KeyreeveError) -> None:
        self._service.refused(self._peer, [("", 0, error)])
        for request in requests:
            self._service.engine.metrics.refused(request.purpose, error.code.value)
            self._service.record_refusal(self.caller, request, error)
        shown = error_to_proto(error)
        self._answer([keyserver_pb2.SignResult(id=request.id, error=shown) for request in requests])

    def _collector(self, items: Sequence[SignItem]) -> Callable[[Sequence[SignResult]], None]:
        def collect(results: Sequence[SignResult]) -> None:
            self._outstanding.difference_update([result.id for result in results])
            answer = keyserver_pb2.SignResultBatch()
            add = answer.results.add
            refused = False
            for result in results:
                if isinstance(result, Signed):
                    add(id=result.id, signature=result.signature)
                else:
                    add(id=result.id, error=error_to_proto(result.error))
                    refused = True
            self.answers.put_nowait(answer)
            if refused:
                self._log_signer_refusals(items, results)
            self._close_if_done()

        return collect

    def _answer(self, results: list[keyserver_pb2.SignResult]) -> None:
        self.answers.put_nowait(keyserver_pb2.SignResultBatch(results=results))

    def _log_signer_refusals(self, items: Sequence[SignItem], results: Sequence[SignResult]) -> None:
        refused = {result.id: result.error for result in results if not isinstance(result, Signed)}
        # What was shed is on record by class (`load_shed`): a line for each batch would make the load worse.
        refused = {item_id: error for item_id, error in refused.items() if error.code is not ErrorCode.OVERLOADED}
        if refused:
            shown = [(item.key_id, item.purpose, refused[item.id]) for item in items if item.id in refused]
            self._service.refused(self._peer, shown, by_signer=True)


def log_local(peer: Peer, items: Sequence[SignItem]) -> None:
    """Signatures asked for through the admin socket are rare and each is on record."""
    if peer.local:
        for item in items:
            log("local_signature", key_id=item.key_id, purpose=Purpose(item.purpose).label, scheme=item.scheme)


def _draining() -> Unavailable:
    return Unavailable("this key server is stopping; use another replica, or retry", retry_after=_DRAIN_RETRY)
