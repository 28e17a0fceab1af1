"""A circuit breaker: it stops asking a service that fails, and finds out with one question when it works again. Pure: the clock is an argument.

Closed, it lets all through and counts faults in a row. Open, it refuses at once. When its pause is over it is half-open: one question (the
probe) goes through, and its result closes the breaker or opens it anew with twice the pause. What was let through before a change of state
says nothing afterwards. A probe that never reports is given up after one pause, so the breaker never stays shut by an accident.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """`faults` in a row open the breaker, for `pause` at first and `longest_pause` at most."""

    faults: int = 5
    pause: timedelta = timedelta(seconds=1)
    longest_pause: timedelta = timedelta(seconds=30)

    def __post_init__(self) -> None:
        if self.faults < 1 or not timedelta(0) < self.pause <= self.longest_pause:
            raise ValueError("a breaker needs one fault or more, and a pause that is not longer than the longest")


@dataclass(frozen=True, slots=True)
class Ticket:
    """Leave to ask once; it goes back with the result. `era` is the change of state that it was given after."""

    era: int


class Breaker:
    """`now` is seconds of a monotonic clock, and never goes back."""

    def __init__(self, policy: BreakerPolicy) -> None:
        self._policy = policy
        self._state = BreakerState.CLOSED
        self._era = 0
        self._faults = 0
        self._pause = policy.pause
        self._until = 0.0

    @property
    def state(self) -> BreakerState:
        return self._state

    def admit(self, now: float) -> Ticket | None:
        """Leave to ask, or None: see `retry_after`."""
        if self._state is BreakerState.CLOSED:
            return Ticket(self._era)
        if now < self._until:
            return None
        self._enter(BreakerState.HALF_OPEN, until=now + self._pause.total_seconds())
        return Ticket(self._era)

    def retry_after(self, now: float) -> timedelta:
        """How long until a question may be let through; zero where one may be now."""
        waits = self._state is not BreakerState.CLOSED
        return timedelta(seconds=max(self._until - now, 0)) if waits else timedelta(0)

    def succeeded(self, ticket: Ticket) -> None:
        if ticket.era != self._era:
            return
        self._faults = 0
        if self._state is BreakerState.HALF_OPEN:
            self._pause = self._policy.pause
            self._enter(BreakerState.CLOSED, until=0)

    def failed(self, ticket: Ticket, now: float) -> None:
        if ticket.era != self._era:
            return
        self._faults += 1
        if self._state is BreakerState.HALF_OPEN:
            self._pause = min(self._pause * 2, self._policy.longest_pause)
            self._open(now)
        elif self._faults >= self._policy.faults:
            self._open(now)

    def abandoned(self, ticket: Ticket) -> None:
        """The question was given up before it said anything of the service: the next one may be the probe."""
        if ticket.era == self._era and self._state is BreakerState.HALF_OPEN:
            self._enter(BreakerState.OPEN, until=0)

    def hurry(self) -> None:
        """There is a sign of life (a worker could connect): the next question may be the probe at once."""
        if self._state is BreakerState.OPEN:
            self._until = 0

    def _open(self, now: float) -> None:
        self._enter(BreakerState.OPEN, until=now + self._pause.total_seconds())

    def _enter(self, state: BreakerState, *, until: float) -> None:
        self._state, self._until, self._faults = state, until, 0
        self._era += 1
