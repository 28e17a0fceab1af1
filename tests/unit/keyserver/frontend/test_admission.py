"""The bounds of the queues, as examples and over any order of arrivals and answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import deepcopy

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from keyreeve_common.errors import DeadlineExceeded, ErrorCode, KeyNotFound
from keyreeve_common.key_id import KeyId
from keyreeve_keyserver.frames import Refused, Signed, SignItem, SignResult
from keyreeve_keyserver.frontend.admission import Admission, Ticket

FAST, SLOW = KeyId("k-fast"), KeyId("k-slow")
LONG_MS = 60_000


def admission(*, max_items: int = 100, max_wait_s: float = 1.0) -> Admission:
    return Admission(lambda key_id: key_id.removeprefix("k-"), max_items=max_items, max_wait_s=max_wait_s)


def items(count: int, key_id: KeyId = FAST, *, first: int = 0, deadline_ms: int = LONG_MS) -> list[SignItem]:
    return [SignItem(number, key_id, 0x0403, 1, deadline_ms, b"m") for number in range(first, first + count)]


def finish(ticket: Ticket, now: float, count: int | None = None) -> None:
    """Signs the first `count` of what was admitted, all without it."""
    done = ticket.admitted[:count]
    del ticket.admitted[: len(done)]
    ticket.finish([Signed(item.id, b"s") for item in done], now)


def test_a_class_holds_no_more_than_its_bound_and_half_of_it_for_one_caller() -> None:
    admit = admission(max_items=100)
    first = admit.admit("a", items(200), 0.0)
    assert len(first.admitted) == 50
    second = admit.admit("b", items(200), 0.0)
    assert len(second.admitted) == 33
    assert len(admit.admit("c", items(200), 0.0).admitted) == 17
    assert admit.outstanding() == {"fast": 100}
    assert admit.admit("d", items(1), 0.0).admitted == []
    finish(first, 0.1)
    assert len(admit.admit("d", items(1), 0.1).admitted) == 1


def test_one_class_takes_nothing_of_another() -> None:
    admit = admission(max_items=100)
    for caller in "abcdefgh":
        admit.admit(caller, items(200, SLOW), 0.0)
    assert len(admit.admit("a", items(10, FAST), 0.0).admitted) == 10


def test_what_is_refused_says_when_to_come_back() -> None:
    admit = admission(max_items=32, max_wait_s=10.0)
    ticket = admit.admit("a", items(100), 0.0)
    finish(ticket, 1.6, 16)  # nothing is known of the cost before: 0.1 s each
    admit.admit("a", items(100, first=200), 1.6)
    shed = admit.admit("a", items(1, first=900), 1.6).shed[0]
    assert shed.error.code is ErrorCode.OVERLOADED
    assert shed.error.retry_after is not None
    assert 0.02 <= shed.error.retry_after.total_seconds() <= 5.0


def test_the_bound_on_work_follows_what_a_request_costs() -> None:
    admit = admission(max_items=10_000, max_wait_s=1.0)
    ticket = admit.admit("a", items(200), 0.0)
    for number in range(1, 101):
        finish(ticket, number * 0.02, 1)  # 20 ms each: 50 make a second
    held = admit.outstanding()["fast"]
    assert held == 100
    assert admit.admit("b", items(10, first=500), 2.0).admitted == []
    finish(ticket, 2.02, 60)
    assert admit.outstanding()["fast"] < 50
    assert admit.admit("b", items(5, first=600), 2.02).admitted != []


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    admit = admission(max_items=10_000, max_wait_s=60.0)
    ticket = admit.admit("a", items(200), 0.0)
    for number in range(1, 101):
        finish(ticket, number * 0.02, 1)  # 100 left, 2 s of work
    assert admit.admit("b", items(1, first=500, deadline_ms=500), 2.0).admitted == []
    assert len(admit.admit("b", items(1, first=501, deadline_ms=10_000), 2.0).admitted) == 1


def test_a_class_that_answers_nothing_takes_no_deadline_shorter_than_its_silence() -> None:
    admit = admission()
    held = admit.admit("a", items(2, SLOW), 0.0)
    assert len(admit.admit("a", items(1, SLOW, first=10, deadline_ms=5_000), 4.0).admitted) == 1
    assert admit.admit("a", items(1, SLOW, first=11, deadline_ms=5_000), 5.0).admitted == []
    # The deadlines pass: that is no progress, but an empty queue takes one again.
    held.finish([Refused(item.id, DeadlineExceeded("late")) for item in held.admitted], 5.1)
    assert admit.admit("a", items(1, SLOW, first=12, deadline_ms=5_000), 5.1).admitted == []


def test_an_empty_queue_always_takes_one() -> None:
    admit = admission(max_wait_s=0.01)
    ticket = admit.admit("a", items(40), 0.0)
    finish(ticket, 400.0)
    assert len(admit.admit("a", items(1, deadline_ms=1), 400.0).admitted) == 1


def test_a_lonely_slow_answer_says_nothing_of_capacity() -> None:
    """One request at a time, 100 ms each, over a slow link: a burst after it is no overload."""
    admit = admission(max_items=1000, max_wait_s=1.0)
    for number in range(50):
        finish(admit.admit("a", items(1, first=number), number * 1.0), number * 1.0 + 0.001)
    assert len(admit.admit("a", items(400), 60.0).admitted) == 400


def test_results_of_several_classes_in_one_batch() -> None:
    admit = admission()
    ticket = admit.admit("a", [*items(2, FAST), *items(2, SLOW, first=10)], 0.0)
    ticket.finish([Signed(0, b"s"), Refused(10, KeyNotFound())], 0.1)
    assert admit.outstanding() == {"fast": 1, "slow": 1}
    ticket.finish([Signed(1, b"s"), Signed(11, b"s")], 0.2)
    assert admit.outstanding() == {"fast": 0, "slow": 0}


class AnyOrder(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.next_id = 0
        self.admit = admission(max_items=20, max_wait_s=0.5)
        self.open: list[tuple[Ticket, str, list[SignItem]]] = []

    @rule(
        caller=st.sampled_from("abc"),
        count=st.integers(1, 30),
        key_id=st.sampled_from((FAST, SLOW)),
        deadline=st.sampled_from((1, 500, LONG_MS)),
    )
    def arrive(self, caller: str, count: int, key_id: KeyId, deadline: int) -> None:
        batch = items(count, key_id, first=self.next_id, deadline_ms=deadline)
        self.next_id += count
        one_by_one = deepcopy(self.admit)
        singly = [item.id for item in batch if one_by_one.admit(caller, [item], self.now).admitted]
        ticket = self.admit.admit(caller, batch, self.now)
        assert [item.id for item in ticket.admitted] == singly
        assert {item.id for item in batch} == {item.id for item in ticket.admitted} | {each.id for each in ticket.shed}
        assert len(batch) == len(ticket.admitted) + len(ticket.shed)
        if ticket.admitted:
            self.open.append((ticket, caller, list(ticket.admitted)))

    @precondition(lambda self: self.open)
    @rule(at=st.integers(0, 99), share=st.floats(0, 1), late=st.booleans())
    def answer(self, at: int, share: float, late: bool) -> None:
        ticket, caller, left = self.open.pop(at % len(self.open))
        count = max(1, int(len(left) * share))
        results: Sequence[SignResult] = [
            Refused(item.id, DeadlineExceeded("late")) if late else Signed(item.id, b"s") for item in left[:count]
        ]
        ticket.finish(results, self.now)
        if left[count:]:
            self.open.append((ticket, caller, left[count:]))

    @rule(seconds=st.floats(0, 2))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def counts_are_those_of_what_is_open(self) -> None:
        held = Counter(item.key_id.removeprefix("k-") for _, _, left in self.open for item in left)
        assert {name: count for name, count in self.admit.outstanding().items() if count} == dict(held)

    @invariant()
    def no_class_is_over_its_bound(self) -> None:
        assert all(count <= 20 for count in self.admit.outstanding().values())

    @invariant()
    def an_empty_class_takes_a_request(self) -> None:
        for key_id in (FAST, SLOW):
            if not self.admit.outstanding().get(key_id.removeprefix("k-")):
                probe = self.admit.admit("z", items(1, key_id, first=10**9, deadline_ms=1), self.now)
                assert len(probe.admitted) == 1
                probe.finish([Refused(10**9, DeadlineExceeded("late"))], self.now)


TestAnyOrder = AnyOrder.TestCase
