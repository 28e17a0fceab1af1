"""How watchers learn that something changed for them: from the store, where every CA instance notes whom a change concerns."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from keyreeve_common.errors import KeyreeveError
from keyreeve_common.identity import SpiffeId
from keyreeve_common.telemetry import log_warning

from keyreeve_ca.domain.records import digest_of
from keyreeve_ca.ports import Store

_BEFORE_ALL = -1


class Watch:
    """One agent's stream. Begin each look with `begin_look`: what changes from then on ends the next wait."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    @property
    def changed(self) -> bool:
        """Whether something changed since the last look began."""
        return self._changed.is_set()

    def begin_look(self) -> None:
        self._changed.clear()

    def wake(self) -> None:
        self._changed.set()

    async def wait(self, *, at_most: timedelta) -> None:
        """Returns when something changed since the last look began, or after `at_most`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(at_most.total_seconds()):
                await self._changed.wait()


class ChangeFeed:
    """Belongs to one event loop; its methods may be called from anywhere in it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._stored = _BEFORE_ALL
        self._watches: dict[str, set[Watch]] = defaultdict(set)
        self._hurry = asyncio.Event()

    @contextmanager
    def watch(self, agent: SpiffeId) -> Iterator[Watch]:
        name, watch = digest_of(agent), Watch()
        self._watches[name].add(watch)
        try:
            yield watch
        finally:
            self._watches[name].discard(watch)
            if not self._watches[name]:
                del self._watches[name]

    @property
    def watched(self) -> int:
        """How many agents have a stream."""
        return len(self._watches)

    def nudge(self) -> None:
        """Something changed here: the store is looked at now, and not only after the interval."""
        self._hurry.set()

    def wake_everyone(self) -> None:
        for watches in self._watches.values():
            for watch in watches:
                watch.wake()

    async def start(self) -> None:
        """Remembers where the store is; before the first watch, so that those who come do not look twice. Raises: storage errors."""
        self._stored = (await asyncio.to_thread(self._store.changes_since, self._stored)).number

    async def follow(self, interval: timedelta) -> None:
        """Looks at the store for what changed, here or at other instances, until it is cancelled."""
        while True:
            self._hurry.clear()
            try:
                await self._look()
            except KeyreeveError as error:
                log_warning("change_feed_waits", code=error.code.value, detail=error.detail)
                await asyncio.sleep(interval.total_seconds())  # nudges do not hurry a store that is away
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(interval.total_seconds()):
                    await self._hurry.wait()

    async def _look(self) -> None:
        changes = await asyncio.to_thread(self._store.changes_since, self._stored)
        self._stored = changes.number
        if changes.agents is None:
            self.wake_everyone()
            return
        for name in changes.agents:
            for watch in self._watches.get(name, ()):
                watch.wake()
