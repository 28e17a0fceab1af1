"""The front end's own events on their way into the signer's audit log: refusals that it makes, and changes of grants and keys.

`require` is for what gives power: it returns when the record is in the log, and raises where it cannot be. `note` is for what is refused or
taken away: it never waits and never fails. Noted events are kept while the signer or its log is away, so many of them; who floods us with
refused requests gets a count in place of one record each. A signer that records nothing makes both do nothing.
Spec: docs/protocol/audit-log.md; docs/protocol/signer-frames.md `record`.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from itertools import islice
from time import monotonic
from typing import Any

from keyreeve_common.errors import AuditUnavailable, InvalidRequest, KeyreeveError, Unavailable
from keyreeve_common.key_id import parse_key_id
from keyreeve_common.telemetry import log_error, log_warning
from keyreeve_common.trace import TRACE_BYTES, request_id_of
from keyreeve_common.transparency.records import MAX_DETAIL_BYTES, Event

from keyreeve_keyserver.frames import SignItem
from keyreeve_keyserver.frontend.signer_link import SignerLink

MAX_WAITING = 16_384
MAX_REFUSALS_PER_S = 64  # of one caller and code, each in a record of its own; more are counted
_BATCH = 256
_BATCH_BYTES = 524_288  # half of what a control frame holds, as JSON
_TIMEOUT_S = 10.0
_RETRY_S = 0.5
_LATE_S = 1.0
_MAX_NUMBERS = {"purpose": 0xFF, "scheme": 0xFFFF}
JsonEvent = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Noted:
    event: JsonEvent
    at: datetime
    at_s: float


class AuditTrail:
    """`run` sends what is noted, until it is cancelled; `flush` sends the rest. `clock` gives aware UTC."""

    def __init__(
        self, link: SignerLink | None = None, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._link = link
        self._clock = clock
        self._waiting: deque[_Noted] = deque()
        self._dropped = 0
        self._seen: Counter[tuple[str, int]] = Counter()
        self._window = 0.0
        self._any = asyncio.Event()
        self._sending = asyncio.Lock()
        self._failing = False
        self._singly = 0  # so many are sent one by one, since the signer refused them together

    async def require(self, event: Event | str, **fields: Any) -> None:
        """Raises: AuditUnavailable, Unavailable: then what was to be recorded is not to be done."""
        if self._link is None or not self._link.capabilities.get("audit"):
            return
        try:
            await self._link.control("record", timeout=_TIMEOUT_S, events=[_event(event, fields)])
        except AuditUnavailable:
            raise
        except Unavailable as error:
            raise AuditUnavailable(f"it could not be recorded: {error.detail}", retry_after=error.retry_after) from None

    @asynccontextmanager
    async def recorded(self, event: Event | str, **fields: Any) -> AsyncIterator[None]:
        """Records what is about to be done; if it fails, that it failed. Raises: as `require` does, before anything is done."""
        await self.require(event, **fields)
        try:
            yield
        except KeyreeveError as error:
            self.note(event, **fields, code=error.rendering.wire)
            raise

    def note(self, event: Event | str, **fields: Any) -> None:
        self._put(_event(event, fields))

    def refusal(
        self, caller: str, error: KeyreeveError, *, key_id: str, purpose: int, scheme: int, trace: bytes, message: bytes
    ) -> None:
        """A signature that the front end refused by itself."""
        if self._link is None:
            return
        kind = (caller, error.rendering.wire)
        self._begin_window()
        self._seen[kind] += 1
        if self._seen[kind] > MAX_REFUSALS_PER_S:
            return  # counted in the window's end
        self.note(
            Event.REFUSAL,
            caller=caller,
            key_id=key_id,
            purpose=purpose,
            scheme=scheme,
            code=error.rendering.wire,
            request_id=request_id_of(trace) if len(trace) == TRACE_BYTES else "",
            message_hash=sha256(message).hexdigest(),
        )

    def refused_item(self, caller: str, item: SignItem, error: KeyreeveError) -> None:
        """A signature that was on its way to the signer, or back from it."""
        self.refusal(
            caller,
            error,
            key_id=item.key_id,
            purpose=item.purpose,
            scheme=item.scheme,
            trace=item.trace,
            message=item.message,
        )

    def call_refused(self, method: str, caller: str, error: KeyreeveError) -> None:
        """A call that was refused before it was looked at."""
        kind = (caller, error.rendering.wire)
        self._begin_window()
        self._seen[kind] += 1
        if self._seen[kind] <= MAX_REFUSALS_PER_S:
            self.note(Event.CALL_REFUSED, caller=caller, code=error.rendering.wire, method=method)

    async def run(self) -> None:
        while True:
            await self._any.wait()
            if not await self._send():
                await asyncio.sleep(_RETRY_S)

    async def flush(self, *, within_s: float) -> None:
        """At the end: what can be sent in this time is."""
        self._close_window()
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._waiting and await self._send():
                    pass
        if self._waiting:
            log_error("audit_events_lost", count=len(self._waiting))

    def _put(self, event: JsonEvent) -> None:
        if self._link is None:
            return
        if len(self._waiting) >= MAX_WAITING:
            self._dropped += 1
            if self._dropped == 1:
                log_error("audit_events_dropped", detail="the signer takes no audit records; see its log")
            return
        self._waiting.append(_Noted(event, self._clock(), monotonic()))
        self._any.set()

    async def _send(self) -> bool:
        """Sends up to one batch; False when it is to be tried again later. A batch whose answer was lost is sent twice, never not at all."""
        async with self._sending:
            return await self._send_batch()

    async def _send_batch(self) -> bool:
        link = self._link
        if link is None or not self._waiting:
            self._any.clear()
            return True
        batch = self._next_batch()
        try:
            if link.capabilities.get("audit"):
                await link.control("record", timeout=_TIMEOUT_S, events=[_dated(noted) for noted in batch])
        except InvalidRequest as error:  # a fault of ours: it is neither to hold up the others nor to take them along
            if len(batch) > 1:
                self._singly = len(batch)
                return True
            log_error("audit_events_refused", detail=error.detail, count=len(batch))
        except KeyreeveError as error:
            if not self._failing:
                log_warning("audit_events_wait", code=error.code.value, detail=error.detail)
            self._failing = True
            return False
        self._failing = False
        for _ in batch:
            self._waiting.popleft()
        self._singly = max(self._singly - len(batch), 0)
        if self._dropped:
            count, self._dropped = self._dropped, 0
            self.note(Event.RECORDS_DROPPED, count=count)
        return True

    def _next_batch(self) -> list[_Noted]:
        batch: list[_Noted] = []
        size = 0
        for noted in islice(self._waiting, 1 if self._singly else _BATCH):
            size += len(json.dumps(noted.event))
            if batch and size > _BATCH_BYTES:
                break
            batch.append(noted)
        return batch

    def _begin_window(self) -> None:
        if monotonic() - self._window >= 1.0:
            self._close_window()
            self._window = monotonic()

    def _close_window(self) -> None:
        for (caller, code), count in self._seen.items():
            if count > MAX_REFUSALS_PER_S:
                self.note(Event.REFUSAL, caller=caller, code=code, count=count - MAX_REFUSALS_PER_S)
        self._seen.clear()


def _event(event: Event | str, fields: dict[str, Any]) -> JsonEvent:
    """The event as `record` takes it. What a caller made up is cut to the form: no request may spoil its own record."""
    made: JsonEvent = {"event": str(event)}
    details: dict[str, str] = {}
    for name, value in fields.items():
        if name in {"caller", "request_id", "message_hash", "code"}:
            made[name] = value
        elif name in _MAX_NUMBERS and 0 <= int(value) <= _MAX_NUMBERS[name]:
            made[name] = int(value)
        elif name == "key_id" and (not value or _is_key_id(value)):
            made[name] = value
        elif value not in (None, ""):
            details[name] = printable(str(value))
    if details:
        made["details"] = details
    return made


def _dated(noted: _Noted) -> JsonEvent:
    """An event that waited says when it was seen: its record has the time at which the signer took it."""
    if monotonic() - noted.at_s < _LATE_S:
        return noted.event
    seen_at = noted.at.astimezone(UTC).isoformat(timespec="milliseconds")
    return {**noted.event, "details": {**noted.event.get("details", {}), "seen_at": seen_at}}


def _is_key_id(text: str) -> bool:
    try:
        parse_key_id(text)
    except InvalidRequest:
        return False
    return True


def printable(text: str) -> str:
    """Printable ASCII, everything else escaped, cut to what a detail holds."""
    return text.encode("unicode_escape").decode("ascii")[:MAX_DETAIL_BYTES]
