"""The supervisor: keeps one pair of signer and front end, or several that share the listening address (ADR 0031).

It holds no key and no socket of the network. Children are spawned as fresh programs, never forked. Pairs are first started one after the other:
the first makes what all of them use, and a token that logs in one caller at a time is asked by one.
"""

from __future__ import annotations

import asyncio
import resource
import signal
from contextlib import suppress
from pathlib import Path

from keyreeve_common.telemetry import log

from keyreeve_keyserver.config import KeyServerConfig
from keyreeve_keyserver.domain.pair import Pair
from keyreeve_keyserver.pair_keeper import PairKeeper


class Supervisor:
    """Raises: ConfigInvalid."""

    def __init__(self, config: KeyServerConfig, config_path: Path) -> None:
        self._stopping = asyncio.Event()
        count = config.supervisor.pairs
        for number in range(1, count + 1):
            config.of_pair(Pair(number, count))  # what cannot be is said before anything is started
        self.keepers: list[PairKeeper] = [
            PairKeeper(
                config,
                config_path,
                Pair(number, count),
                stopping=self._stopping,
                others_serve=lambda number=number: self._serves_beside(number),  # type: ignore[misc]
            )
            for number in range(1, count + 1)
        ]

    async def run(self) -> int:
        """Supervises until SIGTERM or SIGINT; the exit code. SIGHUP starts the pairs anew, one at a time, where there are several."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        renewal: set[asyncio.Task[None]] = set()
        if len(self.keepers) > 1:
            loop.add_signal_handler(signal.SIGHUP, self._renew, renewal)
        with suppress(OSError, ValueError):  # for the signer to lock its memory, where we may: mlockall needs no limit
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        afters = [None, *(keeper.ready for keeper in self.keepers)]
        running = [asyncio.create_task(keeper.run(after)) for keeper, after in zip(self.keepers, afters, strict=False)]
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        asked = self._stopping.is_set()
        self._stopping.set()  # one that is not to be started again is no use to the others either: they have its configuration and its PIN
        await asyncio.gather(*running, *renewal, return_exceptions=True)
        code = max(task.result() for task in done)
        if asked and code == 0:
            log("supervisor_stopped")
        return code

    def _serves_beside(self, number: int) -> bool:
        return any(keeper.ready.is_set() for at, keeper in enumerate(self.keepers, start=1) if at != number)

    def _renew(self, renewal: set[asyncio.Task[None]]) -> None:
        if renewal:
            return  # it is going on

        async def one_by_one() -> None:
            for keeper in self.keepers:
                await keeper.renew()
            log("pairs_renewed", pairs=len(self.keepers))

        task = asyncio.create_task(one_by_one())
        renewal.add(task)
        task.add_done_callback(renewal.discard)
