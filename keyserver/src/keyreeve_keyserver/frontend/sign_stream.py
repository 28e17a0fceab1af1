"""One stream of batches from one agent: takes them in, holds back who does not read, answers in the form in which it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from keyreeve_common.errors import ErrorCode, Internal, InvalidRequest, KeyreeveError
from keyreeve_common.grpc_edge import Peer, error_to_proto
from keyreeve_common.purposes import Purpose
from keyreeve_common.sign_batch import (
    MAX_ITEMS,
    PackedItems,
    PackedResults,
    Refused,
    Signed,
    SignItem,
    SignResult,
    all_signed,
    deadlines_of,
    ids_of,
    open_items,
    pack_results,
    with_count,
)
from keyreeve_common.telemetry import log, log_exception
from keyreeve_common.v1 import keyserver_pb2

from keyreeve_keyserver.frontend.allowed_uses import AllowedUses

if TYPE_CHECKING:
    from keyreeve_keyserver.frontend.signing import SigningServicer

ITEMS_PER_BATCH = 64
Requests = Sequence[keyserver_pb2.SignItem] | PackedItems


@dataclass(frozen=True, slots=True)
class Answer:
    message: keyserver_pb2.SignResultBatch
    count: int


class SignStream:
    """One SignStream: about `batches_per_stream` batches' worth of items between their reading and the sending of their results.

    Then reading waits, and HTTP/2 holds the client back: one that sends and never reads costs bounded memory. Items are counted, not
    batches: a batch with one slow item has most of its room back at once.
    """

    def __init__(self, service: SigningServicer, peer: Peer) -> None:
        self.answers: asyncio.Queue[Answer | None] = asyncio.Queue()
        self.ending: KeyreeveError | None = None
        self._service = service
        self._peer = peer
        self.caller = peer.name
        self._outstanding: set[int] = set()
        self._room = service.limits.batches_per_stream * ITEMS_PER_BATCH
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
        now = self._service.clock()
        if not self._peer.local:
            self._peer.require_svid(now)
        if batch.packed:
            if batch.items:
                raise InvalidRequest("a batch has items or packed items, never both")
            self._take_items(open_items(batch.packed), now)
            return
        if len(batch.items) > MAX_ITEMS:
            raise InvalidRequest(f"batch has {len(batch.items)} items, at most {MAX_ITEMS} are allowed")
        if batch.items:
            self._take_items(batch.items, now)

    def _take_items(self, requests: Requests, now: datetime) -> None:
        service, peer, caller = self._service, self._peer, self.caller
        packed = isinstance(requests, PackedItems)
        self._held += len(requests)
        ids = ids_of(requests)
        try:
            service.access.require_admitted(caller, now)
            self._check_ids(ids)
        except KeyreeveError as error:
            self._refuse_all(requests, error, packed=packed)
            return
        uses = service.allowed_uses(caller, now)
        accepted, refused = self._judged(uses, requests)
        accepted, late = service.admit(uses, accepted)
        if refused or late:
            refused += late
            asked = {request.id: request for request in requests}
            service.refused(peer, [(asked[number].key_id, asked[number].purpose, error) for number, error in refused])
            self._answer(refused, packed=packed)
        if not accepted:
            return
        log_local(peer, accepted)
        self._outstanding.update(ids_of(accepted))
        on_results = service.gate.guard(caller, accepted, self._collector(accepted, packed=packed))
        service.engine.submit(caller, accepted, on_results, timeout_s=max(deadlines_of(accepted)) / 1000)

    def _judged(self, uses: AllowedUses, requests: Requests) -> tuple[Sequence[SignItem], list[Refused]]:
        """The items that may go on, and the refusals of the others. A packed batch that is good throughout goes on as it came."""
        service = self._service
        if isinstance(requests, PackedItems) and service.lets_through(uses, requests):
            return requests, []
        accepted: list[SignItem] = []
        refused: list[Refused] = []
        for request in requests:
            try:
                accepted.append(service.judge(uses, request.id, request, service.bound_ms(request.deadline_ms)))
            except KeyreeveError as error:
                refused.append(Refused(request.id, error))
        return accepted, refused

    def _check_ids(self, ids: list[int]) -> None:
        if len(set(ids)) != len(ids) or not self._outstanding.isdisjoint(ids):
            raise InvalidRequest("an item id stands twice among the outstanding items of this stream")

    def _refuse_all(self, requests: Requests, error: KeyreeveError, *, packed: bool) -> None:
        self._service.refused(self._peer, [("", 0, error)])
        for request in requests:
            self._service.engine.metrics.refused(request.purpose, error.code.value)
            self._service.record_refusal(self.caller, request, error)
        self._answer([Refused(request.id, error) for request in requests], packed=packed)

    def _collector(self, items: Sequence[SignItem], *, packed: bool) -> Callable[[Sequence[SignResult]], None]:
        def collect(results: Sequence[SignResult]) -> None:
            self._outstanding.difference_update(ids_of(results))
            self._answer(results, packed=packed)
            if not all_signed(results):
                self._log_signer_refusals(items, results)
            self._close_if_done()

        return collect

    def _answer(self, results: Sequence[SignResult], *, packed: bool) -> None:
        """In the form in which it was asked."""
        message = keyserver_pb2.SignResultBatch()
        if packed:
            data = results.data if isinstance(results, PackedResults) else pack_results(results)
            message.packed = with_count(len(results), data)
        else:
            for result in results:
                if isinstance(result, Signed):
                    message.results.add(id=result.id, signature=result.signature)
                else:
                    message.results.add(id=result.id, error=error_to_proto(result.error))
        self.answers.put_nowait(Answer(message, len(results)))

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
