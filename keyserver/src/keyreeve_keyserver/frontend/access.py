"""Keys' facts and grants in memory, following the catalog: what each signature is judged by.

Own writes are applied at once; other processes' writes are found by the change counter, which says nothing of a database that was away:
then all is read anew. When the catalog has not been read for `max_staleness`, nothing is authorised any more: a revocation might have been
missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from enum import Enum
from functools import partial
from time import monotonic
from typing import ParamSpec, TypeVar

from keyreeve_common.errors import KeyreeveError, StorageBusy, Unavailable
from keyreeve_common.grpc_edge import LOCAL
from keyreeve_common.key_id import KeyId
from keyreeve_common.telemetry import log, log_exception, log_warning

from keyreeve_keyserver.catalog.catalog import Catalog
from keyreeve_keyserver.catalog.records import Changes, GrantEntry, KeyEntry, QuarantineEntry
from keyreeve_keyserver.domain.keys import KeyState
from keyreeve_keyserver.domain.policy import Grant, KeyFacts, authorize_holder, authorize_local
from keyreeve_keyserver.domain.quarantine import Quarantine

P = ParamSpec("P")
R = TypeVar("R")
_CURRENT_S = 2.0  # what was read longer ago may lack a grant that its holder knows of already
_NO_GRANTS: dict[str, tuple[Grant, int]] = {}


class Freshness(Enum):
    """How well a replica knows the catalog: read just now; within `max_staleness`, so it serves from memory; not even that, so it refuses."""

    CURRENT = "current"
    CACHED = "cached"
    STALE = "stale"


class CatalogThreads:
    """Runs the catalog's blocking methods off the event loop."""

    def __init__(self, catalog: Catalog, *, threads: int = 4) -> None:
        self.catalog = catalog
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="catalog")

    async def run(self, method: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(method, *args, **kwargs))

    def close(self) -> None:
        self._pool.shutdown()
        self.catalog.close()


class Access:
    """`authorize` is the hot path: two dictionary look-ups for a key that exists and for one that does not."""

    def __init__(self, threads: CatalogThreads, *, max_staleness: timedelta) -> None:
        self._threads = threads
        self.max_staleness_s = max_staleness.total_seconds()
        self._keys: dict[str, tuple[KeyFacts, int]] = {}
        self._grants: dict[str, dict[str, tuple[Grant, int]]] = {}
        self._quarantines: dict[str, tuple[Quarantine, int]] = {}
        self._was_restored = False
        self._seq = 0
        self._read_at = 0.0
        self._woken = asyncio.Event()
        self._reading = asyncio.Lock()
        self._lost_touch = False  # the database was away: what comes back may be another one's history
        self._written: list[Callable[[], None]] | None = None  # own writes during a read of all
        self.generation = (
            0  # changes whenever something that was known changes: what was judged before it is judged anew
        )
        self.on_disabled: Callable[[KeyId], None] = lambda _: None

    def authorize(self, holder: str, key_id: str, purpose: int, now: datetime) -> Grant | None:
        """The grant that allows it; None for the operator, who needs none.

        Raises: Quarantined, KeyNotFound, PurposeNotPermitted, KeyDisabled.
        """
        key = self._keys.get(key_id)
        facts = key[0] if key else None
        if holder == LOCAL:
            authorize_local(facts, purpose)
            return None
        if (quarantine := self._quarantines.get(holder)) is not None:
            quarantine[0].check(now)
        found = self._grants.get(holder, _NO_GRANTS).get(key_id)
        return authorize_holder(facts, found[0] if found else None, purpose, now)

    def require_admitted(self, caller: str, now: datetime) -> None:
        """What holds for all requests of a caller alike, looked at once for a batch. Raises: Unavailable, Quarantined."""
        self.require_fresh()
        if caller != LOCAL and (quarantine := self._quarantines.get(caller)) is not None:
            quarantine[0].check(now)

    def work_class(self, key_id: str) -> str:
        """What signatures of this key cost and where; empty for a key that is not known."""
        key = self._keys.get(key_id)
        return key[0].work_class if key else ""

    def require_fresh(self) -> None:
        """Raises: Unavailable."""
        if not self.is_fresh:
            raise Unavailable(
                f"the catalog was not read for {self.staleness_s:.1f} s, catalog.max_staleness allows {self.max_staleness_s:g} s, "
                "since revocations may be missed; check the database, or use another replica"
            )

    @property
    def is_fresh(self) -> bool:
        return self.staleness_s <= self.max_staleness_s

    @property
    def freshness(self) -> Freshness:
        staleness_s = self.staleness_s
        if staleness_s > self.max_staleness_s:
            return Freshness.STALE
        return Freshness.CURRENT if staleness_s <= _CURRENT_S else Freshness.CACHED

    @property
    def staleness_s(self) -> float:
        return monotonic() - self._read_at

    def apply_key(self, entry: KeyEntry) -> None:
        self._own_write(partial(self._put_key, entry.facts, entry.seq))

    def apply_grant(self, entry: GrantEntry) -> None:
        self._own_write(partial(self._put_grant, entry))

    def apply_quarantine(self, entry: QuarantineEntry) -> None:
        self._own_write(partial(self._put_quarantine, entry))

    def holders_in_quarantine(self, now: datetime) -> int:
        return sum(quarantine.holds(now) for quarantine, _ in list(self._quarantines.values()))

    def quarantine_here(self, quarantine: Quarantine) -> None:
        """In force at this replica at once; the next entry of the catalog replaces it."""
        known = self._quarantines.get(quarantine.holder)
        self._quarantines[quarantine.holder] = (quarantine, known[1] if known else 0)
        self.generation += 1

    def may_have_had(self, holder: str, key_id: str) -> bool:
        """Whether this holder has, had, or may for all we know be about to have a grant for this key: revoked and expired ones are known."""
        if self._was_restored or self.staleness_s > _CURRENT_S:
            return True
        return key_id in self._grants.get(holder, _NO_GRANTS)

    def ever_had_a_grant(self, holder: str) -> bool:
        """As far as this replica knows; revoked and expired ones count."""
        return holder in self._grants

    async def refresh(self) -> None:
        """Reads what changed; all of it after the database was away or went back: a standby that took over, or a backup, counts changes anew.

        Raises: the catalog's errors.
        """
        async with self._reading:  # of two reads at once the older would pass for a catalog that went back
            began = monotonic()
            try:
                await self._read_changes()
            except KeyreeveError as error:
                self._lost_touch |= not isinstance(error, StorageBusy)
                raise
            self._read_at = began

    async def _read_changes(self) -> None:
        changes_since = self._threads.catalog.changes_since
        changes = None if self._lost_touch else await self._threads.run(changes_since, self._seq)
        if not self._lost_touch and (changes is None or changes.seq >= self._seq):
            if changes is not None:
                self._apply(changes)
            return
        self._written = []
        try:
            changes = await self._threads.run(changes_since, -1)
            assert changes is not None  # noqa: S101 - no counter is -1
            if changes.seq < self._seq:
                log_warning(
                    "catalog_went_back", detail="the database was restored from a backup; all of it is read anew"
                )
                self._was_restored = True
            keys, grants = await self._threads.run(_tables, changes)
            self._replace(changes, keys, grants, self._written)
        finally:
            self._written = None
        self._lost_touch = False

    async def follow(self, interval: timedelta) -> None:
        """Refreshes for ever, each `interval` and whenever it is woken; an outage is logged when it begins and when it ends."""
        failing = False
        while True:
            await self._pause(interval.total_seconds())
            try:
                await self.refresh()
            except KeyreeveError as error:
                if not failing:
                    log_warning("catalog_not_readable", code=error.code.value, detail=error.detail)
                failing = True
                continue
            except Exception:
                if not failing:
                    log_exception("catalog_not_readable")
                failing = True
                continue
            if failing:
                log("catalog_readable_again")
            failing = False

    def wake(self) -> None:
        """Has `follow` look at once: somebody wrote."""
        self._woken.set()

    async def _pause(self, interval_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(interval_s):
                await self._woken.wait()
        self._woken.clear()

    def _own_write(self, write: Callable[[], None]) -> None:
        write()
        if self._written is not None:
            self._written.append(write)

    def _apply(self, changes: Changes) -> None:
        for facts, seq in changes.keys:
            self._put_key(facts, seq)
        for entry in changes.grants:
            self._put_grant(entry)
        for quarantined in changes.quarantines:
            self._put_quarantine(quarantined)
        self._seq = changes.seq

    def _replace(
        self,
        changes: Changes,
        keys: dict[str, tuple[KeyFacts, int]],
        grants: dict[str, dict[str, tuple[Grant, int]]],
        written: list[Callable[[], None]],
    ) -> None:
        """All that is known, but for quarantines: what the catalog lost of these holds on here."""
        known, self._keys, self._grants = self._keys, keys, grants
        self._quarantines = {name: (quarantine, 0) for name, (quarantine, _) in self._quarantines.items()}
        for quarantined in changes.quarantines:
            self._put_quarantine(quarantined)
        self._seq = changes.seq
        self.generation += 1
        for write in written:
            write()
        for key_id, (facts, _) in known.items():
            found = self._keys.get(key_id)
            if facts.state is KeyState.ENABLED and (found is None or found[0].state is not KeyState.ENABLED):
                self.on_disabled(facts.key_id)

    def _put_grant(self, entry: GrantEntry) -> None:
        of_holder = self._grants.setdefault(entry.grant.holder, {})
        known = of_holder.get(entry.grant.key_id)
        if known is None or known[1] <= entry.seq:
            of_holder[entry.grant.key_id] = (entry.grant, entry.seq)
            self.generation += known is not None and known[0] != entry.grant

    def _put_quarantine(self, entry: QuarantineEntry) -> None:
        known = self._quarantines.get(entry.quarantine.holder)
        if known is None or known[1] <= entry.seq:
            self._quarantines[entry.quarantine.holder] = (entry.quarantine, entry.seq)
            self.generation += 1

    def _put_key(self, facts: KeyFacts, seq: int) -> None:
        known = self._keys.get(facts.key_id)
        if known is not None and known[1] > seq:
            return
        self._keys[facts.key_id] = (facts, seq)
        self.generation += known is not None and known[0] != facts
        if known is not None and known[0].state is KeyState.ENABLED and facts.state is not KeyState.ENABLED:
            self.on_disabled(facts.key_id)


def _tables(changes: Changes) -> tuple[dict[str, tuple[KeyFacts, int]], dict[str, dict[str, tuple[Grant, int]]]]:
    """Keys and grants as Access looks them up; off the event loop, since there may be a million."""
    grants: dict[str, dict[str, tuple[Grant, int]]] = {}
    for entry in changes.grants:
        grants.setdefault(entry.grant.holder, {})[entry.grant.key_id] = (entry.grant, entry.seq)
    return {facts.key_id: (facts, seq) for facts, seq in changes.keys}, grants
