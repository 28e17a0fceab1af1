"""Puts a holder in quarantine that behaves as no agent does: counts at this replica, in force here at once, kept in the catalog for all.

ADR 13 says why each refusal counts or does not. Always true: key administrators are never quarantined by themselves, nor more than `max_holders`
holders with grants (and as many without) within one window: that many at once are rather a fault of ours, and stopping all nodes is what an
attacker would want.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from socket import gethostname
from time import monotonic_ns

from keyreeve_common.errors import ErrorCode, KeyreeveError
from keyreeve_common.telemetry import log_error, log_exception, log_warning

from keyreeve_keyserver.catalog.records import QuarantineEntry
from keyreeve_keyserver.config import QuarantineConfig
from keyreeve_keyserver.domain.quarantine import Cause, Conduct, Quarantine
from keyreeve_keyserver.frontend.access import Access, CatalogThreads
from keyreeve_keyserver.frontend.audit_trail import AuditTrail
from keyreeve_keyserver.frontend.rates import RateExceeded

Refusal = tuple[str, int, KeyreeveError]  # key id, purpose, error
_NEVER_OF_AN_AGENT = frozenset({ErrorCode.INVALID_REQUEST, ErrorCode.MESSAGE_TOO_LARGE})
_OF_WORKLOADS = frozenset(
    {
        ErrorCode.PURPOSE_MISMATCH,
        ErrorCode.PURPOSE_NOT_PERMITTED,
        ErrorCode.SCHEME_NOT_SUPPORTED,
        ErrorCode.PROFILE_VIOLATION,
    }
)
_PAUSES_S = (0.2, 1.0, 5.0)
_SWEEP_AT = 1024
_SECOND_NS = 1_000_000_000


class QuarantineWatch:
    def __init__(
        self,
        config: QuarantineConfig,
        access: Access,
        threads: CatalogThreads,
        *,
        exempt: frozenset[str],
        clock: Callable[[], datetime],
        clock_ns: Callable[[], int] = monotonic_ns,
    ) -> None:
        self._config = config
        self._access = access
        self._threads = threads
        self._exempt = exempt
        self._clock = clock
        self._clock_ns = clock_ns
        self._window_s = config.window.total_seconds()
        self._limits = {
            Cause.REFUSALS: config.refusals,
            Cause.RATE: config.rate_refusals,
            Cause.WORKLOADS: config.workload_refusals,
        }
        self._conduct: dict[str, Conduct] = {}
        self._sweep_at = _SWEEP_AT
        self._fired_ns: dict[bool, deque[int]] = {True: deque(), False: deque()}  # whether the holders ever had a grant
        self._tasks: set[asyncio.Task[None]] = set()
        self.trail = AuditTrail()

    def refused(self, holder: str, refusals: Sequence[Refusal], *, by_signer: bool = False) -> None:
        """Takes note of refusals that this holder got, from the front end or from the signer."""
        if not self._config.enabled:
            return
        now_ns = self._clock_ns()
        for key_id, _, error in refusals:
            cause = self._cause_of(holder, key_id, error, by_signer=by_signer)
            if cause is None or not self._limits[cause]:
                continue
            conduct = self._conduct_of(holder, now_ns)
            is_foreign = error.code is ErrorCode.KEY_NOT_FOUND
            count = conduct.add_foreign_key(key_id, now_ns) if is_foreign else conduct.add(cause, now_ns)
            if count >= self._limits[cause]:
                del self._conduct[holder]
                self._reached(holder, cause, count, now_ns)
                return

    def _cause_of(self, holder: str, key_id: str, error: KeyreeveError, *, by_signer: bool) -> Cause | None:
        code = error.code
        if code in _OF_WORKLOADS:
            return Cause.WORKLOADS
        if by_signer:
            return None
        if code is ErrorCode.KEY_NOT_FOUND:
            return None if self._access.may_have_had(holder, key_id) else Cause.REFUSALS
        if code in _NEVER_OF_AN_AGENT:
            return Cause.REFUSALS
        return Cause.RATE if isinstance(error, RateExceeded) else None

    def _conduct_of(self, holder: str, now_ns: int) -> Conduct:
        found = self._conduct.get(holder)
        if found is None:
            found = self._conduct[holder] = Conduct(self._window_s)
            if len(self._conduct) > self._sweep_at:
                self._conduct = {
                    name: conduct for name, conduct in self._conduct.items() if not conduct.is_forgotten(now_ns)
                }
                self._conduct[holder] = found
                self._sweep_at = max(_SWEEP_AT, 2 * len(self._conduct))
        return found

    def _reached(self, holder: str, cause: Cause, count: int, now_ns: int) -> None:
        if (why_not := self._why_not(holder, now_ns)) is not None:
            log_error("quarantine_withheld", holder=holder, cause=cause.value, count=count, detail=why_not)
            return
        self._fired_ns[self._access.ever_had_a_grant(holder)].append(now_ns)
        now = self._clock()
        quarantine = Quarantine(
            holder,
            cause,
            f"{count} refusals that count as {cause.value} within {self._window_s:g} s",
            f"replica {gethostname()}",
            since=now,
            until=now + self._config.duration if self._config.duration else None,
        )
        until = "lifted" if quarantine.until is None else quarantine.until.isoformat()
        log_error("holder_quarantined", holder=holder, cause=cause.value, count=count, until=until)
        self._access.quarantine_here(quarantine)
        self.trail.note("holder_quarantined", caller=quarantine.set_by, holder=holder, cause=cause.value, count=count)
        task = asyncio.get_running_loop().create_task(self._keep(quarantine))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _why_not(self, holder: str, now_ns: int) -> str | None:
        if holder in self._exempt:
            return (
                "it is a key administrator: if it is owned, take it out of callers.key_admins, or quarantine it by hand"
            )
        # Of their own: every SVID may call, and who has several of workloads shall not spend them to spare an agent's.
        fired_ns = self._fired_ns[self._access.ever_had_a_grant(holder)]
        while fired_ns and now_ns - fired_ns[0] > self._window_s * _SECOND_NS:
            fired_ns.popleft()
        if len(fired_ns) >= self._config.max_holders:
            return (
                "too many holders at once: look for a fault of ours, then quarantine by hand (quarantine.max_holders)"
            )
        return None

    async def _keep(self, quarantine: Quarantine) -> None:
        """Writes it to the catalog, however long that takes; here it holds meanwhile."""
        tries = 0
        while True:
            try:
                entry: QuarantineEntry = await self._threads.run(self._threads.catalog.put_quarantine, quarantine)
            except KeyreeveError as error:
                if not tries:
                    log_warning(
                        "quarantine_not_kept", holder=quarantine.holder, code=error.code.value, detail=error.detail
                    )
            except Exception:
                log_exception("quarantine_failed")
                return
            else:
                self._access.apply_quarantine(entry)
                return
            await asyncio.sleep(_PAUSES_S[min(tries, len(_PAUSES_S) - 1)])
            tries += 1
