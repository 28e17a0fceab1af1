"""The circuit breaker of one backend's workers: what counts as a fault, what is logged, and what a caller hears meanwhile.

A fault is a worker that hung or died at a question, or an answer that says that the token or service cannot be used. What a worker says of the
request or the key (no such key, scheme not supported) is no fault: no caller can shut a backend for the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from keyreeve_common.errors import DeadlineExceeded, KeyreeveError, TokenUnavailable
from keyreeve_common.telemetry import log, log_warning

from keyreeve_keyserver.backends import worker_frames as frames
from keyreeve_keyserver.domain.breaker import Breaker, BreakerPolicy, BreakerState, Ticket


class WorkerGuard:
    def __init__(self, name: str, policy: BreakerPolicy, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._breaker = Breaker(policy)
        self._clock = clock
        self._last = ""

    @property
    def is_closed(self) -> bool:
        return self._breaker.state is BreakerState.CLOSED

    @property
    def is_probing(self) -> bool:
        return self._breaker.state is BreakerState.HALF_OPEN

    @property
    def refusal(self) -> TokenUnavailable | None:
        """What a caller hears now, or None where a question may go through: also while the next one will be the probe."""
        wait = self._breaker.retry_after(self._clock())
        if not wait:
            return None
        return TokenUnavailable(
            f"backend {self._name} rests after faults in a row; the last: {self._last}", retry_after=wait
        )

    def admit(self) -> Ticket:
        """Raises: TokenUnavailable with `retry_after`, while the breaker is open."""
        refusal = self.refusal
        ticket = self._breaker.admit(self._clock()) if refusal is None else None
        if ticket is None:
            raise refusal or TokenUnavailable(f"backend {self._name} is being tried by another request")
        return ticket

    def answered(self, ticket: Ticket | None, answer: frames.Answer) -> None:
        if ticket is None:
            return
        outcomes = answer.outcomes if isinstance(answer, frames.TokenSigned) else (answer,)
        errors = [_error(outcome) for outcome in outcomes]
        if all(isinstance(error, DeadlineExceeded) for error in errors):
            self._breaker.abandoned(ticket)
        elif any(not isinstance(error, TokenUnavailable) for error in errors):
            self._succeeded(ticket)
        else:
            self.failed(ticket, errors[-1] or TokenUnavailable("token unavailable"))

    def failed(self, ticket: Ticket | None, error: KeyreeveError) -> None:
        if ticket is None:
            return
        before = self._breaker.state
        self._last = error.detail
        self._breaker.failed(ticket, self._clock())
        if self._breaker.state is BreakerState.OPEN and before is not BreakerState.OPEN:
            pause = self._breaker.retry_after(self._clock()).total_seconds()
            log_warning("breaker_opened", backend=self._name, error=str(error), retry_after_s=round(pause, 3))

    def abandoned(self, ticket: Ticket | None) -> None:
        """The question was given up before a worker had it."""
        if ticket is not None:
            self._breaker.abandoned(ticket)

    def hurry(self) -> None:
        """Workers can be had again: the next question may go through."""
        self._breaker.hurry()

    def _succeeded(self, ticket: Ticket) -> None:
        was_closed = self.is_closed
        self._breaker.succeeded(ticket)
        if self.is_closed and not was_closed:
            log("breaker_closed", backend=self._name)


def _error(outcome: object) -> KeyreeveError | None:
    if isinstance(outcome, frames.Failed):
        return outcome.error
    return outcome if isinstance(outcome, KeyreeveError) else None
