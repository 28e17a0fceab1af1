"""What the signer does: judges each item of a batch by the sealed record of its key, hands what passes to the backends, answers in few frames.

Judging is pure (`judging.py`). A refused item never touches its neighbours. No result leaves before the audit log has its record.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime

from keyreeve_common.errors import AuditUnavailable, Internal, KeyreeveError, TokenUnavailable
from keyreeve_common.telemetry import log_exception, log_warning
from keyreeve_common.transparency.records import microseconds

from keyreeve_keyserver.audit.events import SignRecords
from keyreeve_keyserver.audit.ports import AuditLog, NullAuditLog
from keyreeve_keyserver.backends.ports import Backend, SignRequest
from keyreeve_keyserver.frames import (
    Refused,
    SignBatch,
    Signed,
    SignItem,
    SignResult,
    SignResults,
    Spans,
    signed_results,
)
from keyreeve_keyserver.signer.judging import KeyTable, judge_item
from keyreeve_keyserver.signer.metrics import SignerMetrics
from keyreeve_keyserver.signer.spans import BACKEND, JUDGE, RECORD, SpanLog, now_us

_JUDGED_AT_ONCE = 16
_BYTES_AS_LONG_AS_AN_ITEM = 512


@dataclass(slots=True)
class _Lane:
    """Items of one batch that go to one backend together, as columns: their requests stand in the order of their ids."""

    backend: str
    ids: list[int] = field(default_factory=list)
    schemes: list[int] = field(default_factory=list)
    requests: list[SignRequest] = field(default_factory=list)


class SigningService:
    """`now` gives aware UTC, for the validity of certificates; deadlines run on the monotonic clock."""

    def __init__(
        self,
        backends: dict[str, Backend],
        keys: KeyTable,
        *,
        now: Callable[[], datetime],
        max_message: int,
        audit: AuditLog | None = None,
        metrics: SignerMetrics | None = None,
    ) -> None:
        self._backends = backends
        self._keys = keys
        self._now = now
        self._max_message = max_message
        self._audit = audit or NullAuditLog()
        self._metrics = metrics or SignerMetrics()

    async def sign(self, batch: SignBatch) -> AsyncIterator[SignResults | Spans]:
        """The results of a batch: the refusals first, then one frame for each lane as it is done; before each, the spans of what is traced."""
        spans, began_us = SpanLog.of(batch.items), now_us()
        refused: list[SignResult] = []
        lanes: dict[tuple[str, int], _Lane] = {}
        records = SignRecords(batch)
        await self._judge_all(batch.items, refused, lanes, records)
        _log_digests(batch, lanes.values())
        spans.step(JUDGE, spans.traces, began_us)
        if refused:
            for result in refused:
                if isinstance(result, Refused):
                    self._metrics.refused(result.error)
            self._log_refusals(batch, refused)
            for frame in await self._answers(batch, refused, records, spans):
                yield frame
        signing = [self._sign_lane(lane, spans) for lane in lanes.values()]
        # A batch is nearly always of one lane: no task for that.
        for done in asyncio.as_completed(signing) if len(signing) > 1 else signing:
            for frame in await self._answers(batch, await done, records, spans):
                yield frame

    async def _judge_all(
        self,
        items: Iterable[SignItem],
        refused: list[SignResult],
        lanes: dict[tuple[str, int], _Lane],
        records: SignRecords,
    ) -> None:
        received, now, since_pause = time.monotonic(), self._now(), 0
        for item in items:
            if since_pause >= _JUDGED_AT_ONCE:
                await asyncio.sleep(0)  # certificates and CRLs take long to judge: let other batches in
                now, since_pause = self._now(), 0
            loaded, quick = self._keys.loaded(item.key_id), False
            if loaded is not None:
                records.authorities[item.key_id] = loaded.is_authority
            try:
                request, quick = judge_item(item, loaded, received=received, now=now, max_message=self._max_message)
            except KeyreeveError as error:
                refused.append(Refused(item.id, error))
            except Exception:
                log_exception("judging_failed", purpose=item.purpose, message_bytes=len(item.message))
                refused.append(Refused(item.id, Internal("the signer failed to judge this message")))
            else:
                # Items of like deadlines and of one type of key go together, so that none is answered much after it is signed.
                kind = (loaded.lane if loaded else "", item.deadline_ms.bit_length())
                lane = lanes.get(kind)
                if lane is None:
                    lane = lanes[kind] = _Lane(request.record.backend)
                lane.ids.append(item.id)
                lane.schemes.append(item.scheme)
                lane.requests.append(request)
            if not quick:
                since_pause += 1 + len(item.message) // _BYTES_AS_LONG_AS_AN_ITEM

    async def _answers(
        self, batch: SignBatch, results: list[SignResult], records: SignRecords, spans: SpanLog
    ) -> list[SignResults | Spans]:
        began_us = now_us()
        answer = SignResults(batch.batch_id, await self._recorded(results, records))
        if not spans:
            return [answer]
        spans.step(RECORD, [result.id for result in results], began_us)
        taken = spans.taken()
        return [Spans(taken), answer] if taken else [answer]

    async def _recorded(self, results: list[SignResult], records: SignRecords) -> list[SignResult]:
        """These results once they are in the audit log; where they cannot be, none leaves and every item is refused."""
        if self._audit.enabled:
            entries = records.entries(results, time_us=microseconds(self._now()))
            try:
                await self._audit.append(entries)
            except AuditUnavailable as error:
                return [Refused(result.id, error) for result in results]
        return results

    async def _sign_lane(self, lane: _Lane, spans: SpanLog) -> list[SignResult]:
        backend = self._backends.get(lane.backend)
        if backend is None:
            error = TokenUnavailable(f"this signer has no backend {lane.backend}")
            return [Refused(item_id, error) for item_id in lane.ids]
        requests = spans.watched(lane.ids, lane.requests) if spans else lane.requests
        began, began_us = time.monotonic(), now_us()
        try:
            outcomes = await backend.sign(requests)
        except Exception:
            log_exception("backend_failed", backend=lane.backend)
            return [Refused(item_id, Internal("the backend failed")) for item_id in lane.ids]
        spans.step(BACKEND, lane.ids, began_us, lane.backend)
        self._metrics.lane_done(lane.backend, lane.schemes, outcomes, time.monotonic() - began)
        signatures = [outcome for outcome in outcomes if isinstance(outcome, bytes)]
        if len(signatures) == len(lane.ids):
            return signed_results(lane.ids, signatures)
        return [
            Signed(item_id, outcome) if isinstance(outcome, bytes) else Refused(item_id, outcome)
            for item_id, outcome in zip(lane.ids, outcomes, strict=True)
        ]

    @staticmethod
    def _log_refusals(batch: SignBatch, refused: list[SignResult]) -> None:
        codes = sorted({result.error.code.value for result in refused if isinstance(result, Refused)})
        if codes != ["key_not_found"]:
            log_warning("sign_refused", caller=batch.caller, items=len(refused), codes=",".join(codes))


def _log_digests(batch: SignBatch, lanes: Iterable[_Lane]) -> None:
    """Before anything is signed: nobody can tell afterwards what a signed digest was of."""
    counts = Counter(request.record.key_id for lane in lanes for request in lane.requests if request.prehashed)
    for key_id, count in counts.items():
        log_warning("signing_digest", caller=batch.caller, key_id=key_id, items=count)
