"""The rules of the balancer, as examples and as a state machine over any order of events."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from keyreeve_client.agent.balancer import _BURST, Balancer, Fault, Settings, State

P256, RSA = 0x0403, 0x0804


def balancer(count: int = 2, **settings: float) -> Balancer:
    return Balancer(count, Settings(**settings), jitter=lambda: 1.0)  # type: ignore[arg-type]


def serve(
    balance: Balancer, index: int, took_s: float, *, times: int = 1, scheme: int = P256, now: float = 0.0
) -> None:
    for _ in range(times):
        balance.began(index, scheme, now)
        balance.answered(index, scheme, now, took_s)


def lose(balance: Balancer, index: int, now: float = 0.0) -> None:
    balance.began(index, P256, now)
    balance.failed(index, P256, now, fault=Fault.LOST)


def test_the_one_with_less_outstanding_is_asked() -> None:
    balance = balancer(3)
    asked: Counter[int] = Counter()
    for _ in range(9):
        index = balance.choose(P256, 0.0)
        assert index is not None
        balance.began(index, P256, 0.0)
        asked[index] += 1
    assert asked == {0: 3, 1: 3, 2: 3}


def test_of_equals_the_faster_is_asked() -> None:
    balance = balancer()
    serve(balance, 0, 0.010)
    serve(balance, 1, 0.002)
    assert balance.choose(P256, 0.0) == 1


def test_what_was_given_up_weighs_until_an_answer_comes() -> None:
    balance = balancer()
    serve(balance, 1, 0.5)  # slower, so that 0 would be asked
    balance.began(0, P256, 0.0)
    balance.given_up(0)
    assert balance.choose(P256, 0.0) == 1
    serve(balance, 0, 0.001)
    assert balance.choose(P256, 0.0) == 0


def test_a_lost_replica_is_out_until_a_probe_succeeds() -> None:
    balance = balancer()
    lose(balance, 0)
    assert balance.replicas[0].state is State.EJECTED
    assert {balance.choose(P256, 0.0) for _ in range(5)} == {1}
    due = balance.next_probe()
    assert due is not None
    assert balance.probes(due - 0.01) == []
    assert balance.probes(due) == [0]
    assert balance.probes(due + 9) == []  # one at a time
    balance.probed(0, due, healthy=False)
    again = balance.next_probe()
    assert again is not None
    assert again - due > due  # the pause grows
    assert balance.probes(again) == [0]
    balance.probed(0, again, healthy=True)
    assert balance.replicas[0].state is State.READY


def test_one_that_breaks_right_after_each_probe_is_probed_less_and_less() -> None:
    balance = balancer()
    now, pauses = 0.0, []
    for _ in range(6):
        lose(balance, 0, now)
        due = balance.next_probe()
        assert due is not None
        pauses.append(due - now)
        assert balance.probes(due) == [0]
        balance.probed(0, due, healthy=True)
        now = due
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0])
    serve(balance, 0, 0.001, now=now)
    lose(balance, 0, now)
    assert balance.next_probe() == pytest.approx(now + 0.1)


def test_the_last_one_is_never_ejected_and_one_that_is_out_is_better_than_none() -> None:
    balance = balancer()
    lose(balance, 0)
    lose(balance, 1)
    assert [replica.state for replica in balance.replicas] == [State.EJECTED, State.READY]
    assert balance.choose(P256, 0.0) == 1
    assert balance.choose(P256, 0.0, avoid={1}) == 0
    assert balance.choose(P256, 0.0, avoid={0, 1}) is None


def test_errors_in_a_row_eject_and_an_answer_between_begins_anew() -> None:
    balance = balancer(errors=3)
    for between in (True, False):
        for _ in range(2):
            balance.began(0, P256, 0.0)
            balance.failed(0, P256, 0.0, fault=Fault.ERROR)
        if between:
            serve(balance, 0, 0.001)
    assert balance.replicas[0].state is State.READY
    balance.began(0, P256, 0.0)
    balance.failed(0, P256, 0.0, fault=Fault.ERROR)
    assert balance.replicas[0].state is State.EJECTED


@pytest.mark.parametrize("fault", [Fault.CLASS, Fault.SHED])
def test_what_a_replica_cannot_do_for_one_class_moves_that_class_alone(fault: Fault) -> None:
    balance = balancer()
    serve(balance, 1, 0.5)
    serve(balance, 1, 0.5, scheme=RSA)
    balance.began(0, RSA, 10.0)
    balance.failed(0, RSA, 10.0, fault=fault, retry_after_s=0.4)
    assert balance.choose(RSA, 10.3) == 1
    assert balance.choose(P256, 10.3) == 0
    assert balance.choose(RSA, 10.41) == 0
    assert balance.replicas[0].state is State.READY


def test_a_server_cannot_hold_a_class_for_ever() -> None:
    balance = balancer()
    serve(balance, 1, 0.5)
    balance.began(0, P256, 0.0)
    balance.failed(0, P256, 0.0, fault=Fault.SHED, retry_after_s=1e9)
    assert balance.choose(P256, 6.0) == 0


def test_the_hedge_waits_for_the_measured_p95() -> None:
    balance = balancer(hedge_floor_s=0.005)
    for number in range(100):
        serve(balance, 0, 0.010 if number % 10 else 0.200)
    after = balance.hedge_after(0, P256, 0.0, remaining_s=5.0)
    assert after == pytest.approx(0.200)
    serve(balance, 1, 0.0001, times=100)
    assert balance.hedge_after(1, P256, 0.0, remaining_s=5.0) == 0.005  # the floor
    assert balance.hedge_after(0, P256, 0.0, remaining_s=0.1) == pytest.approx(0.05)  # in time for a second answer


def test_hedges_have_a_budget() -> None:
    balance = balancer(hedge_share=0.02)
    hedges = 0
    for _ in range(1000):
        balance.began(0, P256, 0.0)
        if balance.take_hedge(P256, 0.0, avoid={0}) is not None:
            hedges += 1
            balance.began(1, P256, 0.0, hedge=True)
    assert 0.02 * 1000 - 1 <= hedges <= 0.02 * 1000 + _BURST


def test_no_hedge_while_a_replica_sheds_load() -> None:
    balance = balancer()
    balance.began(0, P256, 10.0)
    balance.failed(0, P256, 10.0, fault=Fault.SHED, retry_after_s=0.1)
    assert balance.hedge_after(1, P256, 10.5, remaining_s=5.0) is None
    assert balance.take_hedge(P256, 10.5, avoid={1}) is None
    assert balance.hedge_after(1, RSA, 10.5, remaining_s=5.0) is not None
    assert balance.hedge_after(1, P256, 11.5, remaining_s=5.0) is not None


def test_no_hedge_where_it_is_switched_off_or_alone() -> None:
    assert balancer(hedge_share=0).hedge_after(0, P256, 0.0, remaining_s=5.0) is None
    assert balancer(1).hedge_after(0, P256, 0.0, remaining_s=5.0) is None


def test_no_hedge_to_one_that_is_out() -> None:
    balance = balancer()
    lose(balance, 1)
    assert balance.take_hedge(P256, 0.0, avoid={0}) is None


def test_silence_is_suspicious_and_a_probe_decides() -> None:
    balance = balancer(silence_s=0.5)
    balance.began(0, P256, 0.0)
    balance.began(0, P256, 0.3)
    assert balance.next_probe() == 0.5
    assert balance.probes(0.4) == []
    assert balance.probes(0.5) == [0]
    assert balance.replicas[0].state is State.SUSPECT
    assert balance.choose(P256, 0.5) == 1  # nothing new goes there meanwhile
    assert balance.probed(0, 1.0, healthy=False)  # its requests are to be asked elsewhere
    assert balance.replicas[0].state is State.EJECTED


def test_a_slow_token_is_no_silence_when_the_probe_is_answered() -> None:
    balance = balancer(silence_s=0.5)
    balance.began(0, RSA, 0.0)
    assert balance.probes(0.5) == [0]
    assert not balance.probed(0, 0.51, healthy=True)
    assert balance.replicas[0].state is State.READY
    assert balance.next_probe() == pytest.approx(1.01)


def test_a_late_answer_ends_the_suspicion() -> None:
    balance = balancer(silence_s=0.5)
    balance.began(0, P256, 0.0)
    assert balance.probes(0.5) == [0]
    balance.answered(0, P256, 0.6, 0.6)
    assert not balance.probed(0, 1.0, healthy=False)
    assert balance.replicas[0].state is State.READY


def test_silence_is_seen_when_every_request_was_given_up() -> None:
    balance = balancer(silence_s=0.5)
    balance.began(0, P256, 0.0)
    balance.given_up(0)
    assert balance.probes(0.5) == [0]


def test_silence_is_seen_after_a_first_answer() -> None:
    balance = balancer(silence_s=0.5)
    balance.began(0, P256, 0.0)
    balance.began(0, P256, 0.0)
    balance.answered(0, P256, 0.1, 0.1)
    assert balance.probes(0.55) == []
    assert balance.probes(0.6) == [0]


def test_one_alone_is_never_probed_or_left_out() -> None:
    balance = balancer(1)
    balance.began(0, P256, 0.0)
    assert balance.next_probe() is None
    balance.failed(0, P256, 99.0, fault=Fault.LOST)
    assert balance.replicas[0].state is State.READY
    assert balance.choose(P256, 99.0) == 0


def test_one_far_slower_than_the_others_is_left_out_for_longer_each_time() -> None:
    balance = balancer()
    serve(balance, 1, 0.002, times=50)
    pauses = []
    now = 0.0
    for _ in range(3):
        serve(balance, 0, 0.9, times=50, now=now)
        assert balance.replicas[0].state is State.EJECTED
        due = balance.next_probe()
        assert due is not None
        pauses.append(due - now)
        now = due
        assert balance.probes(now) == [0]
        balance.probed(0, now, healthy=True)
    assert pauses == [1.0, 2.0, 4.0]


def test_one_a_little_slower_stays() -> None:
    balance = balancer()
    serve(balance, 1, 0.002, times=50)
    serve(balance, 0, 0.090, times=50)  # many times slower, and fast enough
    assert balance.replicas[0].state is State.READY


def test_another_round_is_worth_it_while_some_replica_answered_lately() -> None:
    balance = balancer()
    assert not balance.hopeful(0.0, 5.0)
    serve(balance, 0, 0.001, now=10.0)
    assert balance.hopeful(15.0, 5.0)
    assert not balance.hopeful(15.1, 5.0)


class AnyOrder(RuleBasedStateMachine):
    """Requests, answers, faults, probes and the clock in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.balance = balancer(3)
        self.now = 0.0
        self.flights: list[tuple[int, int]] = []  # replica, scheme
        self.probing: list[int] = []
        self.primary = self.hedges = 0

    @rule(scheme=st.sampled_from((P256, RSA)), avoid=st.sets(st.integers(0, 2), max_size=2))
    def ask(self, scheme: int, avoid: set[int]) -> None:
        index = self.balance.choose(scheme, self.now, avoid=avoid)
        assert index is not None  # whatever happened, somebody is asked
        assert index not in avoid
        others = [at for at in range(3) if at not in avoid]
        if self.balance.replicas[index].state is not State.READY:
            assert all(self.balance.replicas[at].state is not State.READY for at in others)
        self.balance.began(index, scheme, self.now)
        self.flights.append((index, scheme))
        self.primary += 1

    @precondition(lambda self: self.flights)
    @rule(at=st.integers(0, 999))
    def hedge(self, at: int) -> None:
        first, scheme = self.flights[at % len(self.flights)]
        index = self.balance.take_hedge(scheme, self.now, avoid={first})
        if index is not None:
            assert index != first
            assert self.balance.replicas[index].state is State.READY
            self.balance.began(index, scheme, self.now, hedge=True)
            self.flights.append((index, scheme))
            self.hedges += 1

    @precondition(lambda self: self.flights)
    @rule(at=st.integers(0, 999), took=st.floats(0.0001, 20))
    def answer(self, at: int, took: float) -> None:
        index, scheme = self.flights.pop(at % len(self.flights))
        self.balance.answered(index, scheme, self.now, took)

    @precondition(lambda self: self.flights)
    @rule(at=st.integers(0, 999), fault=st.sampled_from(Fault), retry=st.none() | st.floats(0, 100))
    def fail(self, at: int, fault: Fault, retry: float | None) -> None:
        index, scheme = self.flights.pop(at % len(self.flights))
        self.balance.failed(index, scheme, self.now, fault=fault, retry_after_s=retry)

    @precondition(lambda self: self.flights)
    @rule(at=st.integers(0, 999))
    def give_up(self, at: int) -> None:
        index, _ = self.flights.pop(at % len(self.flights))
        self.balance.given_up(index)

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def probe(self) -> None:
        due = self.balance.probes(self.now)
        assert not set(due) & set(self.probing)
        self.probing += due

    @precondition(lambda self: self.probing)
    @rule(healthy=st.booleans())
    def probed(self, healthy: bool) -> None:
        index = self.probing.pop(0)
        orphaned = self.balance.probed(index, self.now, healthy=healthy)
        if healthy:
            assert self.balance.replicas[index].state is State.READY
        if orphaned:
            assert self.balance.replicas[index].state is State.EJECTED

    @invariant()
    def somebody_is_left(self) -> None:
        assert any(replica.state is not State.EJECTED for replica in self.balance.replicas)

    @invariant()
    def outstanding_is_counted(self) -> None:
        held = Counter(index for index, _ in self.flights)
        assert [replica.outstanding for replica in self.balance.replicas] == [held[index] for index in range(3)]

    @invariant()
    def hedges_stay_within_the_budget(self) -> None:
        assert self.hedges <= 0.03 * self.primary + _BURST

    @invariant()
    def who_is_out_gets_a_probe(self) -> None:
        out = [at for at, each in enumerate(self.balance.replicas) if each.state is not State.READY]
        due = self.balance.next_probe()
        assert all(at in self.probing or (due is not None and due < self.now + 60) for at in out)


TestAnyOrder = AnyOrder.TestCase
