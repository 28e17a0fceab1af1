"""Signatures of authorised requests: hands batches to the signer, loads keys that it does not hold, and sends those items once more."""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from datetime import timedelta
from time import monotonic
from typing import Any

from keyreeve_common.errors import DeadlineExceeded, ErrorCode, KeyNotFound, KeyreeveError, KeySelfTestFailed
from keyreeve_common.key_id import KeyId
from keyreeve_common.sign_batch import all_signed, uses_of
from keyreeve_common.telemetry import log_error, log_exception
from keyreeve_common.tracing import Tracing
from keyreeve_common.transparency.records import Event

from keyreeve_keyserver.catalog.records import KeyEntry
from keyreeve_keyserver.domain.keys import KeyState
from keyreeve_keyserver.frames import Refused, Signed, SignItem, SignResult
from keyreeve_keyserver.frontend.access import CatalogThreads
from keyreeve_keyserver.frontend.admission import Admission
from keyreeve_keyserver.frontend.audit_trail import AuditTrail
from keyreeve_keyserver.frontend.metrics import FrontEndMetrics
from keyreeve_keyserver.frontend.signer_link import OnResults, SignerLink
from keyreeve_keyserver.frontend.traces import RequestTraces


class SigningEngine:
    """`signatures` counts by key since the process started."""

    def __init__(
        self,
        link: SignerLink,
        threads: CatalogThreads,
        *,
        control_timeout: timedelta,
        metrics: FrontEndMetrics,
        admission: Admission,
        traces: RequestTraces | None = None,
    ) -> None:
        self._link = link
        self._threads = threads
        self._control_timeout_s = control_timeout.total_seconds()
        self._loading: dict[KeyId, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.metrics = metrics
        self._traces = traces or RequestTraces(Tracing())
        self._admission = admission
        self.trail = AuditTrail()
        self.signatures: Counter[str] = Counter()
        self.on_faulty: Callable[[KeyEntry], None] = lambda _: (
            None
        )  # a key that was disabled since it failed its self-test

    def submit(self, caller: str, items: Sequence[SignItem], on_results: OnResults, *, timeout_s: float) -> None:
        """Every item's result reaches `on_results` exactly once; items have distinct ids. What is too much is refused at once."""
        items, on_results = self._traces.follow(items, on_results)
        began = monotonic()
        self.metrics.submitted()
        ticket = self._admission.admit(caller, items, began)

        def first_answer(results: Sequence[SignResult]) -> None:
            if all_signed(results):
                final_answer(results)
                return
            by_id = {item.id: item for item in items}
            unloaded = [by_id[result.id] for result in results if type(result) is Refused and _is_unloaded(result)]
            if not unloaded:
                final_answer(results)
                return
            if len(unloaded) < len(results):
                final_answer([result for result in results if type(result) is Signed or not _is_unloaded(result)])
            self._spawn(self._load_and_resend(caller, unloaded, final_answer, timeout_s))

        def final_answer(results: Sequence[SignResult]) -> None:
            now = monotonic()
            ticket.finish(results, now)
            self._count(items, results, now - began)
            on_results(results)

        if ticket.shed:
            self._count(items, ticket.shed, 0.0)
            on_results(ticket.shed)
        if ticket.admitted:
            self._link.submit(caller, ticket.admitted, first_answer, timeout_s=timeout_s)

    def _count(self, items: Sequence[SignItem], results: Sequence[SignResult], seconds: float) -> None:
        """`results` are of some of `items`, or of all."""
        if len(items) == len(results) and all_signed(results):
            signed = Counter(uses_of(items))
        else:
            by_id = {item.id: item for item in items}
            answered = [(by_id[result.id], result) for result in results]
            signed = Counter(
                [(item.key_id, item.purpose, item.scheme) for item, result in answered if type(result) is Signed]
            )
            self.metrics.refused_by_signer([(item.purpose, result) for item, result in answered])
        for (key_id, _, _), times in signed.items():
            self.signatures[key_id] += times
        self.metrics.signed(signed, seconds)

    def forget(self, key_id: KeyId) -> None:
        """Has the signer drop a key that was disabled or destroyed; it would refuse nothing by itself."""
        self._spawn(self._forget(key_id))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forget(self, key_id: KeyId) -> None:
        try:
            await self._link.control("forget_key", timeout=self._control_timeout_s, key_id=key_id)
        except KeyreeveError:
            return  # a signer that is gone holds no key

    async def _load_and_resend(
        self, caller: str, items: list[SignItem], on_results: OnResults, timeout_s: float
    ) -> None:
        began = monotonic()
        key_ids = list({item.key_id for item in items})
        loads = (self._load(key_id, within_s=timeout_s) for key_id in key_ids)
        outcomes = await asyncio.gather(*loads, return_exceptions=True)
        failures = {key_id: _shown(outcome) for key_id, outcome in zip(key_ids, outcomes, strict=True) if outcome}
        if failures:
            for item in items:
                if (failure := failures.get(item.key_id)) is not None:
                    self.trail.refused_item(caller, item, failure)
            on_results([Refused(item.id, failures[item.key_id]) for item in items if item.key_id in failures])
        spent_s = monotonic() - began
        again = [_later(item, spent_s) for item in items if item.key_id not in failures]
        if again:
            self._link.submit(caller, again, on_results, timeout_s=max(timeout_s - spent_s, 0))

    async def _load(self, key_id: KeyId, *, within_s: float) -> None:
        """Loads a key once, however many wait for it; who waits too long gives up alone. Raises: DeadlineExceeded."""
        task = self._loading.get(key_id)
        if task is None:
            task = asyncio.create_task(self._load_now(key_id))
            self._loading[key_id] = task
            task.add_done_callback(lambda done: self._loaded(key_id, done))
        try:
            async with asyncio.timeout(within_s):
                await asyncio.shield(task)
        except TimeoutError:
            raise DeadlineExceeded("deadline passed while the key was being loaded") from None

    def _loaded(self, key_id: KeyId, task: asyncio.Task[None]) -> None:
        self._loading.pop(key_id, None)
        if not task.cancelled():
            task.exception()  # looked at here, since everyone who waited may have given up

    async def _load_now(self, key_id: KeyId) -> None:
        states = (KeyState.ENABLED,)
        record = await self._threads.run(self._threads.catalog.sealed_record, key_id, states=states)
        if record is None:
            raise KeyNotFound()
        encoded = base64.b64encode(record).decode("ascii")
        try:
            await self._link.control("load_key", timeout=self._control_timeout_s, record=encoded)
        except KeySelfTestFailed as error:
            await self._disable_faulty(key_id, error)
            raise

    async def _disable_faulty(self, key_id: KeyId, error: KeySelfTestFailed) -> None:
        """The server goes on without this key; an operator looks into it, and enables it or makes another."""
        log_error("key_self_test_failed", key_id=key_id, detail=error.detail)
        try:
            entry = await self._threads.run(self._threads.catalog.disable_faulty, key_id, reason=error.detail)
        except KeyreeveError as failure:
            log_error("faulty_key_not_disabled", key_id=key_id, code=failure.code.value, detail=failure.detail)
            return
        if entry is not None:
            self.trail.note(Event.KEY_DISABLED, key_id=key_id, reason="self-test failed")
            self.on_faulty(entry)


def _later(item: SignItem, spent_s: float) -> SignItem:
    """`item` with what is left of its deadline; 1 ms at least, for the signer to refuse."""
    return item._replace(deadline_ms=max(item.deadline_ms - int(spent_s * 1000), 1))


def _is_unloaded(result: SignResult) -> bool:
    return type(result) is Refused and result.error.code is ErrorCode.KEY_NOT_FOUND


def _shown(outcome: BaseException) -> KeyreeveError:
    if isinstance(outcome, KeyreeveError):
        return outcome
    log_exception("key_load_failed", kind=type(outcome).__name__)
    return KeyreeveError("the key could not be loaded; the server's log has the cause")
