"""What the signer does: judges each item of a batch by the sealed record of its key, hands what passes to the backends, answers in few frames.

Judging is pure; the clock and the table of loaded keys come in. A refused item never touches its neighbours. No result leaves before the audit
log has its record.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from datetime import datetime

from keyreeve_common.errors import (
    AuditUnavailable,
    DeadlineExceeded,
    Internal,
    KeyNotFound,
    KeyreeveError,
    TokenUnavailable,
)
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType
from keyreeve_common.telemetry import log_exception, log_warning
from keyreeve_common.transparency.records import microseconds

from keyreeve_keyserver.audit.events import sign_records
from keyreeve_keyserver.audit.ports import AuditLog, NullAuditLog
from keyreeve_keyserver.backends.ports import Backend, SignRequest
from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_keyserver.domain.purposes import check_length, check_request
from keyreeve_keyserver.frames import Refused, SignBatch, Signed, SignItem, SignResult, SignResults, Spans
from keyreeve_keyserver.signer.metrics import SignerMetrics
from keyreeve_keyserver.signer.spans import BACKEND, JUDGE, RECORD, SpanLog, now_us

_JUDGED_AT_ONCE = 16
_BYTES_AS_LONG_AS_AN_ITEM = 512
_Lane = tuple[str, KeyType, int]


@dataclass(frozen=True, slots=True)
class JudgedItem:
    id: int
    request: SignRequest


class KeyTable:
    """The loaded keys: their records only. What is secret of them is in their backend."""

    def __init__(self) -> None:
        self._records: dict[KeyId, KeyRecord] = {}

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key_id: KeyId) -> KeyRecord | None:
        return self._records.get(key_id)

    def put(self, record: KeyRecord) -> None:
        self._records[record.key_id] = record

    def remove(self, key_id: KeyId) -> KeyRecord | None:
        return self._records.pop(key_id, None)


def judge_item(
    item: SignItem, record: KeyRecord | None, *, received: float, now: datetime, max_message: int
) -> SignRequest:
    """The request to hand to a backend. Order: length, key, role and purpose, scheme, form.

    Raises: MessageTooLarge, KeyNotFound, PurposeNotPermitted, SchemeNotSupported, PurposeMismatch, ProfileViolation, DeadlineExceeded.
    """
    check_length(item.message, max_message)
    if record is None:
        raise KeyNotFound
    scheme = check_request(item.message, record, purpose=item.purpose, scheme=item.scheme, now=now)
    if item.deadline_ms == 0:
        raise DeadlineExceeded("deadline_ms is 0")
    prehashed = item.purpose == Purpose.DIGEST
    return SignRequest(record, scheme, item.message, received + item.deadline_ms / 1000, prehashed)


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
        received = time.monotonic()
        spans, began_us = SpanLog.of(batch.items), now_us()
        refused: list[SignResult] = []
        lanes: dict[_Lane, list[JudgedItem]] = {}
        roles: dict[KeyId, KeyRole] = {}  # of the keys as they were judged: one may be forgotten before it is recorded
        since_pause = 0
        for item in batch.items:
            if since_pause >= _JUDGED_AT_ONCE:
                await asyncio.sleep(0)  # certificates and CRLs take long to judge: let other batches in
                since_pause = 0
            if (record := self._keys.get(item.key_id)) is not None:
                roles[item.key_id] = record.role
            self._judge(item, record, received, refused, lanes)
            since_pause += 1 + len(item.message) // _BYTES_AS_LONG_AS_AN_ITEM
        _log_digests(batch, lanes.values())
        spans.step(JUDGE, spans.traces, began_us)
        if refused:
            for result in refused:
                if isinstance(result, Refused):
                    self._metrics.refused(result.error)
            self._log_refusals(batch, refused)
            for frame in await self._answers(batch, refused, roles, spans):
                yield frame
        for done in asyncio.as_completed([self._sign_lane(name, lane, spans) for (name, *_), lane in lanes.items()]):
            for frame in await self._answers(batch, await done, roles, spans):
                yield frame

    async def _answers(
        self, batch: SignBatch, results: list[SignResult], roles: dict[KeyId, KeyRole], spans: SpanLog
    ) -> list[SignResults | Spans]:
        began_us = now_us()
        answer = await self._recorded(batch, results, roles)
        spans.step(RECORD, [result.id for result in results], began_us)
        taken = spans.taken()
        return [Spans(taken), answer] if taken else [answer]

    async def _recorded(self, batch: SignBatch, results: list[SignResult], roles: dict[KeyId, KeyRole]) -> SignResults:
        """The frame with these results once they are in the audit log; where they cannot be, none leaves and every item is refused."""
        if self._audit.enabled:
            records = sign_records(batch, results, roles, time_us=microseconds(self._now()))
            try:
                await self._audit.append(records)
            except AuditUnavailable as error:
                results = [Refused(result.id, error) for result in results]
        return SignResults(batch.batch_id, tuple(results))

    def _judge(
        self,
        item: SignItem,
        record: KeyRecord | None,
        received: float,
        refused: list[SignResult],
        lanes: dict[_Lane, list[JudgedItem]],
    ) -> None:
        try:
            request = judge_item(item, record, received=received, now=self._now(), max_message=self._max_message)
        except KeyreeveError as error:
            refused.append(Refused(item.id, error))
        except Exception:
            log_exception("judging_failed", purpose=item.purpose, message_bytes=len(item.message))
            refused.append(Refused(item.id, Internal("the signer failed to judge this message")))
        else:
            # Items of like deadlines and of one type of key go together, so that none is answered much after it is signed.
            kind = (request.record.backend, request.record.key_type, item.deadline_ms.bit_length())
            lane = lanes.setdefault(kind, [])
            lane.append(JudgedItem(item.id, request))

    async def _sign_lane(self, backend_name: str, lane: list[JudgedItem], spans: SpanLog) -> list[SignResult]:
        backend = self._backends.get(backend_name)
        if backend is None:
            error = TokenUnavailable(f"this signer has no backend {backend_name}")
            return [Refused(judged.id, error) for judged in lane]
        requests, began, began_us = (
            [spans.watched(judged.id, judged.request) for judged in lane],
            time.monotonic(),
            now_us(),
        )
        try:
            outcomes = await backend.sign(requests)
        except Exception:
            log_exception("backend_failed", backend=backend_name)
            return [Refused(judged.id, Internal("the backend failed")) for judged in lane]
        spans.step(BACKEND, [judged.id for judged in lane], began_us, backend_name)
        self._metrics.lane_done(backend_name, requests, outcomes, time.monotonic() - began)
        return [
            Refused(judged.id, outcome) if isinstance(outcome, KeyreeveError) else Signed(judged.id, outcome)
            for judged, outcome in zip(lane, outcomes, strict=True)
        ]

    @staticmethod
    def _log_refusals(batch: SignBatch, refused: list[SignResult]) -> None:
        codes = sorted({result.error.code.value for result in refused if isinstance(result, Refused)})
        if codes != ["key_not_found"]:
            log_warning("sign_refused", caller=batch.caller, items=len(refused), codes=",".join(codes))


def _log_digests(batch: SignBatch, lanes: Iterable[list[JudgedItem]]) -> None:
    """Before anything is signed: nobody can tell afterwards what a signed digest was of."""
    counts = Counter(judged.request.record.key_id for lane in lanes for judged in lane if judged.request.prehashed)
    for key_id, count in counts.items():
        log_warning("signing_digest", caller=batch.caller, key_id=key_id, items=count)
