"""Alarms: each rings once, after its time, unless it was cleared or set anew."""

from __future__ import annotations

import asyncio
import logging

import pytest
from keyreeve_client.agent.alarms import GRAIN_S, Alarms


class Sleeper:
    def __init__(self, alarms: Alarms, *, fails: bool = False) -> None:
        self.slot = 0
        self.woken: list[float] = []
        self.rang = asyncio.Event()
        self.clears: list[Sleeper] = []
        self._alarms, self._fails = alarms, fails

    def wake(self, now: float) -> None:
        self.woken.append(now)
        self.rang.set()
        for other in self.clears:
            self._alarms.clear(other)
        if self._fails:
            raise RuntimeError("this sleeper has a fault")


def now() -> float:
    return asyncio.get_running_loop().time()


async def rings(sleeper: Sleeper) -> None:
    async with asyncio.timeout(10):
        await sleeper.rang.wait()


async def test_it_rings_after_its_time_and_once() -> None:
    alarms = Alarms()
    sleeper, later = Sleeper(alarms), Sleeper(alarms)
    at = now() + 0.02
    alarms.set(sleeper, at)
    alarms.set(later, at + 2 * GRAIN_S)
    await rings(later)
    assert len(sleeper.woken) == 1
    assert at <= sleeper.woken[0]
    assert sleeper.slot == 0
    assert alarms._timer is None


async def test_an_earlier_alarm_is_not_held_up_by_a_later_one() -> None:
    alarms = Alarms()
    far, near = Sleeper(alarms), Sleeper(alarms)
    alarms.set(far, now() + 3600)
    alarms.set(near, now() + 0.01)
    await rings(near)
    assert far.woken == []
    alarms.close()


async def test_cleared_and_moved_alarms_do_not_ring_at_their_former_time() -> None:
    alarms = Alarms()
    cleared, moved, last = Sleeper(alarms), Sleeper(alarms), Sleeper(alarms)
    at = now() + 0.01
    for sleeper in (cleared, moved, last):
        alarms.set(sleeper, at)
    alarms.clear(cleared)
    alarms.clear(cleared)
    alarms.set(moved, at + 3600)
    await rings(last)
    assert cleared.woken == moved.woken == []
    assert moved.slot
    alarms.close()


async def test_one_that_is_woken_may_clear_others_of_the_same_time() -> None:
    alarms = Alarms()
    first, second, after = Sleeper(alarms), Sleeper(alarms), Sleeper(alarms)
    first.clears, at = [second], now() + 0.01
    alarms.set(first, at)
    alarms.set(second, at)
    alarms.set(after, at + 2 * GRAIN_S)
    await rings(after)
    assert second.woken == []


async def test_a_fault_of_one_wakes_the_others_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    alarms = Alarms()
    faulty, good = Sleeper(alarms, fails=True), Sleeper(alarms)
    at = now() + 0.01
    alarms.set(faulty, at)
    alarms.set(good, at)
    with caplog.at_level(logging.ERROR):
        await rings(good)
    assert len(faulty.woken) == 1
    assert "alarm_failed" in caplog.text


async def test_cleared_alarms_leave_nothing_behind() -> None:
    alarms = Alarms()
    for number in range(100):
        sleeper = Sleeper(alarms)
        alarms.set(sleeper, now() + 0.001 * number)
        alarms.clear(sleeper)
    last = Sleeper(alarms)
    alarms.set(last, now() + 0.15)
    await rings(last)
    assert alarms._slots == {}
    assert alarms._timer is None
