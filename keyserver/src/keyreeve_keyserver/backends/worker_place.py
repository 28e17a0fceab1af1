"""A worker's place in its pool: the questions that were sent to it and are not answered. What the pool is told by its configuration."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta

from keyreeve_common.errors import TokenPinIncorrect

from keyreeve_keyserver.backends import worker_frames as frames
from keyreeve_keyserver.backends.worker_queue import Job
from keyreeve_keyserver.domain.breaker import BreakerPolicy, Ticket

IN_LINE = 2  # questions at one worker: the one it works at, and the next


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """`call_timeout` bounds any question, `sign_timeout` a signature or sign of life: a worker that passes it is replaced.

    `keepalive` is how long a worker may idle (zero: for ever); `session_retry` the pause before another session is asked for.
    """

    call_timeout: timedelta = timedelta(seconds=30)
    sign_timeout: timedelta = timedelta(seconds=10)
    keepalive: timedelta = timedelta(seconds=30)
    session_retry: timedelta = timedelta(minutes=1)
    breaker: BreakerPolicy = field(default_factory=BreakerPolicy)

    def bound(self, question: frames.Question) -> timedelta:
        quick = isinstance(question, frames.TokenSign | frames.Ping)
        return min(self.sign_timeout, self.call_timeout) if quick else self.call_timeout


@dataclass(slots=True)
class Place:
    """One worker's place in the pool: what it is alone to be asked, and what was sent to it, the oldest first."""

    errands: deque[Job] = field(default_factory=deque)
    line: deque[list[Job]] = field(default_factory=deque)
    rung: asyncio.Event = field(default_factory=asyncio.Event)
    began: float = 0.0  # when the worker began the first of the line, of the monotonic clock
    pings: bool = False

    @property
    def is_free(self) -> bool:
        return not self.line and not self.pings

    @property
    def is_idle(self) -> bool:
        """Free, and not about to take what waits."""
        return self.is_free and not self.rung.is_set()

    @property
    def has_room(self) -> bool:
        """Only signatures wait behind one another: what makes or ends a key, or proves that the worker lives, goes alone."""
        return not self.line or (len(self.line) < IN_LINE and self.line[-1][0].lane is not None and not self.errands)


def give(job: Job, answer: frames.Answer) -> None:
    if job.timer is not None:
        job.timer.cancel()
    if not job.answer.done():
        job.answer.set_result(answer)


def end_errands(place: Place) -> None:
    """The worker is gone, and what it held with it."""
    while place.errands:
        give(place.errands.popleft(), frames.Done({}))


def newest_ticket(jobs: list[Job]) -> Ticket | None:
    """One question says one thing of the token, however many callers' it is: where one of them is the breaker's probe, it is the probe's."""
    tickets = [job.ticket for job in jobs if job.ticket is not None]
    return max(tickets, key=lambda ticket: ticket.era, default=None)


def pin_refusal(answer: frames.Answer) -> TokenPinIncorrect | None:
    outcomes = answer.outcomes if isinstance(answer, frames.TokenSigned) else ()
    failures = (answer.error,) if isinstance(answer, frames.Failed) else outcomes
    return next((failure for failure in failures if isinstance(failure, TokenPinIncorrect)), None)
