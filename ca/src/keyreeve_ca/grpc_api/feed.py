"""How watchers learn that something changed: a counter that this process moves at once and other CA instances move through the store."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from keyreeve_common.errors import KeyreeveError
from keyreeve_common.telemetry import log_warning

from keyreeve_ca.ports import Store


class ChangeFeed:
    """Belongs to one event loop. `nudge` may be called from anywhere in it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._stored = -1
        self._version = 0
        self._changed = asyncio.Event()

    @property
    def version(self) -> int:
        return self._version

    def nudge(self) -> None:
        """Something changed here."""
        self._version += 1
        event, self._changed = self._changed, asyncio.Event()
        event.set()

    async def wait_beyond(self, version: int, *, at_most: timedelta) -> None:
        """Returns when the version is newer than `version`, or after `at_most`."""
        if self._version > version:
            return
        event = self._changed
        try:
            async with asyncio.timeout(at_most.total_seconds()):
                await event.wait()
        except TimeoutError:
            return

    async def follow(self, interval: timedelta) -> None:
        """Looks at the store for what other instances changed, until it is cancelled."""
        while True:
            try:
                stored = await asyncio.to_thread(self._store.change_sequence)
                if stored != self._stored:
                    self._stored = stored
                    self.nudge()
            except KeyreeveError as error:
                log_warning("change_feed_waits", code=error.code.value, detail=error.detail)
            await asyncio.sleep(interval.total_seconds())
