"""Open-loop load: requests leave at a fixed rate whether or not earlier ones were answered, and latency counts from when each was to leave.

A load generator that waits for an answer before the next request omits just the requests that a stall would have hit (coordinated
omission). Here a stall, of the server or of the generator itself, lengthens every latency that it touches.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from keyreeve_bench.histogram import Histogram


@dataclass(frozen=True, slots=True)
class LoopClock:
    """The time in seconds, and how to wait for it; tests give their own."""

    now: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]]


@dataclass(slots=True)
class OpenLoopResult:
    latencies: Histogram = field(default_factory=Histogram)
    codes: Counter[str] = field(default_factory=Counter)


async def run_open_loop(
    send: Callable[[int], Awaitable[str]], *, rate: float, seconds: float, clock: LoopClock
) -> OpenLoopResult:
    """Sends `rate` requests a second for `seconds`; `send` gets the request's number and gives `ok` or an error's code.

    Latencies of refused requests are not recorded: they are counted by code.
    """
    result = OpenLoopResult()

    async def request(number: int, due: float) -> None:
        code = await send(number)
        result.codes[code] += 1
        if code == "ok":
            result.latencies.record(clock.now() - due)

    began = clock.now()
    tasks = []
    for number in range(round(rate * seconds)):
        due = began + number / rate
        if (early := due - clock.now()) > 0:
            await clock.sleep(early)
        tasks.append(asyncio.create_task(request(number, due)))
    await asyncio.gather(*tasks)
    return result
