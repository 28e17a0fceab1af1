"""What the signer does: judges each item of a batch by the sealed record of its key, hands what passes to the backends, answers in few frames.

Judging is pure (`judging.py`). A refused item never touches its neighbours. No result leaves before the audit log has its record.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from keyreeve_common.errors import AuditUnavailable, Internal, KeyreeveError, TokenUnavailable
from keyreeve_common.key_id import KeyId
from keyreeve_common.telemetry import log_exception, log_warning
from keyreeve_common.transparency.records import microseconds

from keyreeve_keyserver.audit.events import SignRecords
from keyreeve_keyserver.audit.ports import AuditLog, NullAuditLog
from keyreeve_keyserver.backends.ports import Backend, SignOutcome, SignRequest, new_request
from keyreeve_keyserver.domain.purposes import Rule
from keyreeve_keyserver.domain.purposes.tls13 import FixedForm
from keyreeve_keyserver.frames import (
    Refused,
    SignBatch,
    SignItem,
    SignResult,
    SignResults,
    Spans,
    signed_results,
)
from keyreeve_keyserver.signer.judging import KeyTable, LoadedKey, judge_item
from keyreeve_keyserver.signer.metrics import SignerMetrics
from keyreeve_keyserver.signer.spans import BACKEND, JUDGE, RECORD, SpanLog, now_us

_JUDGED_AT_ONCE = 16
_BYTES_AS_LONG_AS_AN_ITEM = 512
_Use = tuple[KeyId, int, int, int]  # key, purpose, scheme, bits of the deadline in milliseconds


@dataclass(slots=True)
class _Lane:
    """Items of one batch that go to one backend together; their requests stand in their order."""

    backend: str
    items: list[SignItem] = field(default_factory=list)
    requests: list[SignRequest] = field(default_factory=list)


@dataclass(slots=True)
class _Judged:
    """What became of the items of a batch. Items of like deadlines and of one type of key go together in a lane, so that none is answered
    much after it is signed.
    """

    records: SignRecords
    refused: list[tuple[SignItem, KeyreeveError]] = field(default_factory=list)
    lanes: dict[tuple[str, int], _Lane] = field(default_factory=dict)

    def lane(self, loaded: LoadedKey, deadline_ms: int) -> _Lane:
        kind = (loaded.lane, deadline_ms.bit_length())
        found = self.lanes.get(kind)
        if found is None:
            found = self.lanes[kind] = _Lane(loaded.record.backend)
        return found


@dataclass(frozen=True, slots=True)
class _Results:
    """`signatures` are those of `signed`, in order."""

    backend: str = ""
    signed: Sequence[SignItem] = ()
    signatures: list[bytes] = field(default_factory=list)
    refused: Sequence[tuple[SignItem, KeyreeveError]] = ()


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
        judged = _Judged(SignRecords(batch.caller))
        await self._judge_all(batch.items, judged)
        _log_digests(batch, judged.lanes.values())
        spans.step(JUDGE, spans.traces, began_us)
        if judged.refused:
            for _, error in judged.refused:
                self._metrics.refused(error)
            self._log_refusals(batch, judged.refused)
            for frame in await self._answers(batch, _Results(refused=judged.refused), judged.records, spans):
                yield frame
        signing = [self._sign_lane(batch, lane, judged.records, spans) for lane in judged.lanes.values()]
        # A batch is nearly always of one lane: no task for that.
        for done in asyncio.as_completed(signing) if len(signing) > 1 else signing:
            for frame in await done:
                yield frame

    async def _judge_all(self, items: Iterable[SignItem], judged: _Judged) -> None:
        """A use whose form is fixed is looked up once: of its other items only the message is held against the form."""
        received, now, since_pause = time.monotonic(), self._now(), 0
        fixed: dict[_Use, tuple[Rule, FixedForm, _Lane]] = {}
        for item in items:
            if since_pause >= _JUDGED_AT_ONCE:
                await asyncio.sleep(0)  # certificates and CRLs take long to judge: let other batches in
                now, since_pause = self._now(), 0
                fixed.clear()  # a key may be gone
            _, key_id, scheme, purpose, deadline_ms, message, _ = item
            use = (key_id, purpose, scheme, deadline_ms.bit_length())
            if (found := fixed.get(use)) is not None:
                rule, form, lane = found
                if len(message) in form.lengths and message.startswith(form.head):
                    deadline = received + deadline_ms / 1000
                    lane.items.append(item)
                    lane.requests.append(new_request((rule.record, rule.scheme, message, deadline, False, None)))
                    continue
            passed = self._judge(item, judged, received, now)
            if passed is not None and (known := passed[0].fixed) is not None and known.lengths[-1] <= self._max_message:
                fixed[use] = (passed[0], known, passed[1])
            else:
                since_pause += 1 + len(message) // _BYTES_AS_LONG_AS_AN_ITEM

    def _judge(self, item: SignItem, judged: _Judged, received: float, now: datetime) -> tuple[Rule, _Lane] | None:
        """Puts the item into its lane, or among the refused; the rule that let it through, and the lane."""
        loaded = self._keys.loaded(item.key_id)
        if loaded is not None:
            judged.records.authorities[item.key_id] = loaded.is_authority
        try:
            request, rule = judge_item(item, loaded, received=received, now=now, max_message=self._max_message)
        except KeyreeveError as error:
            judged.refused.append((item, error))
            return None
        except Exception:
            log_exception("judging_failed", purpose=item.purpose, message_bytes=len(item.message))
            judged.refused.append((item, Internal("the signer failed to judge this message")))
            return None
        assert loaded is not None  # noqa: S101 - judge_item refused it else
        lane = judged.lane(loaded, item.deadline_ms)
        lane.items.append(item)
        lane.requests.append(request)
        return rule, lane

    async def _sign_lane(
        self, batch: SignBatch, lane: _Lane, records: SignRecords, spans: SpanLog
    ) -> list[SignResults | Spans]:
        """The frames with the results of a lane, once they are in the audit log."""
        outcomes = await self._outcomes(lane, spans)
        signatures = [outcome for outcome in outcomes if isinstance(outcome, bytes)]
        if len(signatures) == len(outcomes):
            return await self._answers(batch, _Results(lane.backend, lane.items, signatures), records, spans)
        pairs = list(zip(lane.items, outcomes, strict=True))
        refused = [(item, outcome) for item, outcome in pairs if isinstance(outcome, KeyreeveError)]
        signed = [item for item, outcome in pairs if isinstance(outcome, bytes)]
        for _, error in refused:
            self._metrics.refused(error)
        return await self._answers(batch, _Results(lane.backend, signed, signatures, refused), records, spans)

    async def _outcomes(self, lane: _Lane, spans: SpanLog) -> Sequence[SignOutcome]:
        backend = self._backends.get(lane.backend)
        if backend is None:
            return [TokenUnavailable(f"this signer has no backend {lane.backend}")] * len(lane.items)
        ids = [item.id for item in lane.items] if spans else []
        requests = spans.watched(ids, lane.requests) if spans else lane.requests
        began, began_us = time.monotonic(), now_us()
        try:
            outcomes = await backend.sign(requests)
        except Exception:
            log_exception("backend_failed", backend=lane.backend)
            return [Internal("the backend failed")] * len(lane.items)
        spans.step(BACKEND, ids, began_us, lane.backend)
        self._metrics.lane_done(lane.backend, time.monotonic() - began)
        return outcomes

    async def _answers(
        self, batch: SignBatch, found: _Results, records: SignRecords, spans: SpanLog
    ) -> list[SignResults | Spans]:
        """The frame with these results once they are in the audit log; where they cannot be, none leaves and every item is refused."""
        began_us = now_us()
        if self._audit.enabled:
            time_us = microseconds(self._now())
            entries = records.of_signatures(found.signed, found.signatures, time_us=time_us) if found.signed else []
            entries += records.of_refusals(found.refused, time_us=time_us)
            try:
                await self._audit.append(entries)
            except AuditUnavailable as error:
                found = _Results(
                    refused=[(item, error) for item in (*found.signed, *(item for item, _ in found.refused))]
                )
        self._metrics.signed(found.backend, [item.scheme for item in found.signed])
        results: Sequence[SignResult] = signed_results([item.id for item in found.signed], found.signatures)
        if found.refused:
            results = [*results, *(Refused(item.id, error) for item, error in found.refused)]
        answer = SignResults(batch.batch_id, results)
        if not spans:
            return [answer]
        spans.step(RECORD, [result.id for result in results], began_us)
        taken = spans.taken()
        return [Spans(taken), answer] if taken else [answer]

    @staticmethod
    def _log_refusals(batch: SignBatch, refused: Sequence[tuple[SignItem, KeyreeveError]]) -> None:
        codes = sorted({error.code.value for _, error in refused})
        if codes != ["key_not_found"]:
            log_warning("sign_refused", caller=batch.caller, items=len(refused), codes=",".join(codes))


def _log_digests(batch: SignBatch, lanes: Iterable[_Lane]) -> None:
    """Before anything is signed: nobody can tell afterwards what a signed digest was of."""
    counts = Counter(request.record.key_id for lane in lanes for request in lane.requests if request.prehashed)
    for key_id, count in counts.items():
        log_warning("signing_digest", caller=batch.caller, key_id=key_id, items=count)
