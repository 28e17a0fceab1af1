"""The breaker as a state machine, against a model that counts; then its rules one by one."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from keyreeve_keyserver.domain.breaker import Breaker, BreakerPolicy, BreakerState, Ticket

POLICY = BreakerPolicy(faults=3, pause=timedelta(seconds=1), longest_pause=timedelta(seconds=4))


class BreakerMachine(RuleBasedStateMachine):
    """The model: which tickets still count, and the time at which the breaker may let one through."""

    tickets: Bundle[Ticket] = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(POLICY)
        self.now = 100.0
        self.in_a_row = 0
        self.expected = BreakerState.CLOSED
        self.pause = 1.0
        self.until = 0.0
        self.current: set[int] = set()

    @rule(seconds=st.sampled_from([0.0, 0.4, 1.0, 2.5, 9.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=tickets)
    def ask(self) -> object:
        ticket = self.breaker.admit(self.now)
        if self.expected is BreakerState.CLOSED:
            assert ticket is not None
        elif self.now < self.until:
            assert ticket is None
            assert self.breaker.retry_after(self.now) == timedelta(seconds=self.until - self.now)
            return multiple()
        else:
            assert ticket is not None
            self.expected, self.current = BreakerState.HALF_OPEN, set()
            self.until = self.now + self.pause
        self.current.add(id(ticket))
        return ticket

    @rule(ticket=consumes(tickets))
    def success(self, ticket: Ticket) -> None:
        self.breaker.succeeded(ticket)
        if id(ticket) in self.current:
            self.in_a_row = 0
            if self.expected is BreakerState.HALF_OPEN:
                self.expected, self.pause, self.current = BreakerState.CLOSED, 1.0, set()

    @rule(ticket=consumes(tickets))
    def fault(self, ticket: Ticket) -> None:
        self.breaker.failed(ticket, self.now)
        if id(ticket) not in self.current:
            return
        self.in_a_row += 1
        if self.expected is BreakerState.HALF_OPEN:
            self.pause = min(self.pause * 2, 4.0)
            self._opened()
        elif self.in_a_row == POLICY.faults:
            self._opened()

    @rule(ticket=consumes(tickets))
    def give_up(self, ticket: Ticket) -> None:
        self.breaker.abandoned(ticket)
        if id(ticket) in self.current and self.expected is BreakerState.HALF_OPEN:
            self.expected, self.until, self.current = BreakerState.OPEN, 0.0, set()

    @rule()
    def sign_of_life(self) -> None:
        self.breaker.hurry()
        if self.expected is BreakerState.OPEN:
            self.until = 0.0

    @invariant()
    def states_agree(self) -> None:
        assert self.breaker.state is self.expected

    @invariant()
    def it_never_stays_shut(self) -> None:
        assert self.breaker.retry_after(self.now) <= POLICY.longest_pause

    def _opened(self) -> None:
        self.expected, self.until, self.current, self.in_a_row = BreakerState.OPEN, self.now + self.pause, set(), 0


TestBreaker = BreakerMachine.TestCase


def opened(breaker: Breaker, now: float) -> None:
    for _ in range(POLICY.faults):
        ticket = breaker.admit(now)
        assert ticket is not None
        breaker.failed(ticket, now)
    assert breaker.state is BreakerState.OPEN


def test_faults_that_are_not_in_a_row_do_not_open() -> None:
    breaker = Breaker(POLICY)
    for number in range(30):
        ticket = breaker.admit(0)
        assert ticket is not None
        breaker.succeeded(ticket) if number % 3 == 2 else breaker.failed(ticket, 0)
    assert breaker.state is BreakerState.CLOSED


def test_one_probe_at_a_time_and_success_closes() -> None:
    breaker = Breaker(POLICY)
    opened(breaker, 10)
    assert breaker.admit(10.9) is None
    probe = breaker.admit(11)
    assert probe is not None
    assert breaker.admit(11.5) is None
    breaker.succeeded(probe)
    assert breaker.state is BreakerState.CLOSED


def test_late_result_from_before_does_not_close_or_open() -> None:
    breaker = Breaker(POLICY)
    late = breaker.admit(0)
    assert late is not None
    opened(breaker, 0)
    breaker.succeeded(late)
    assert breaker.state is BreakerState.OPEN
    probe = breaker.admit(1)
    assert probe is not None
    breaker.failed(late, 1)
    assert breaker.state is BreakerState.HALF_OPEN
    breaker.succeeded(probe)


def test_probe_that_never_reports_is_replaced() -> None:
    breaker = Breaker(POLICY)
    opened(breaker, 0)
    assert breaker.admit(1) is not None
    assert breaker.admit(1.5) is None
    assert breaker.admit(2) is not None


@pytest.mark.parametrize(("faults", "pause", "longest"), [(0, 1, 1), (1, 0, 1), (1, 2, 1)])
def test_policy_without_sense_is_refused(faults: int, pause: int, longest: int) -> None:
    with pytest.raises(ValueError, match="breaker needs"):
        BreakerPolicy(faults, timedelta(seconds=pause), timedelta(seconds=longest))
