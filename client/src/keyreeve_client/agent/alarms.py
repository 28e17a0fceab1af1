"""Many objects that want to be called at a time of their own, over one timer of the event loop.

Nearly every alarm is cleared before it rings (an answer came), so setting and clearing is what has to be cheap: a slot of GRAIN_S for each time,
and one timer for the first slot. An alarm rings within GRAIN_S after its time, never before it.
"""

from __future__ import annotations

import asyncio
import math
from typing import Protocol

from keyreeve_common.telemetry import log_exception

GRAIN_S = 0.004


class Sleeper(Protocol):
    """Whom an alarm wakes. Told apart by identity; `slot` is the alarms' own, and 0 while none is set."""

    slot: int

    def wake(self, now: float) -> None: ...


class Alarms:
    """Belongs to one event loop, that of the first `set`."""

    def __init__(self) -> None:
        self._slots: dict[int, dict[int, Sleeper]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = 0  # the timer's slot

    def set(self, sleeper: Sleeper, at: float) -> None:
        """Wakes it once at `at` of the loop's clock, and at no other time that was set before."""
        slot = math.ceil(at / GRAIN_S)
        if sleeper.slot:
            if sleeper.slot == slot:
                return
            self.clear(sleeper)
        sleeper.slot = slot
        waiting = self._slots.get(slot)
        if waiting is None:
            waiting = self._slots[slot] = {}
            if self._timer is None or slot < self._rings_at:
                self._arm(slot)
        waiting[id(sleeper)] = sleeper

    def clear(self, sleeper: Sleeper) -> None:
        if sleeper.slot:
            waiting = self._slots.get(sleeper.slot)
            if waiting is not None:
                waiting.pop(id(sleeper), None)
            sleeper.slot = 0

    def close(self) -> None:
        """Wakes nobody any more."""
        self._slots.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, slot: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at = slot
        self._timer = asyncio.get_running_loop().call_at(slot * GRAIN_S, self._ring)

    def _ring(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for slot in sorted(slot for slot in self._slots if slot * GRAIN_S <= now):
            for sleeper in list(self._slots.pop(slot, {}).values()):
                if sleeper.slot == slot:  # not cleared by one that was woken before it
                    sleeper.slot = 0
                    _wake(sleeper, now)
        # Slots whose alarms were all cleared go here, where it costs nothing for each request.
        self._slots = {slot: waiting for slot, waiting in self._slots.items() if waiting}
        if self._slots:
            self._arm(min(self._slots))


def _wake(sleeper: Sleeper, now: float) -> None:
    """A fault of one must not keep the others asleep."""
    try:
        sleeper.wake(now)
    except Exception:
        log_exception("alarm_failed")
