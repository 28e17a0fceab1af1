"""Natural batching: who waits carries the next batch; what fails, fails for its batch alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import pytest
from keyreeve_ca.issuance_flow import Flow


def wait_until(condition: Callable[[], bool]) -> bool:
    ends = monotonic() + 20
    while not condition() and monotonic() < ends:
        threading.Event().wait(0.001)
    return condition()


def test_lone_caller_is_a_batch() -> None:
    flow: Flow[int, int] = Flow()
    assert flow.run([1, 2], lambda items: [each * 2 for each in items]) == [2, 4]
    assert flow.run([], list) == []


def test_those_who_come_meanwhile_leave_together() -> None:
    flow: Flow[int, int] = Flow(max_in_flight=1)
    batches: list[list[int]] = []
    entered, go_on = threading.Event(), threading.Event()

    def work(items: Sequence[int]) -> list[int]:
        batches.append(list(items))
        entered.set()
        go_on.wait(20)
        return [-each for each in items]

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(flow.run, [0], work)
        assert entered.wait(20)
        others = [pool.submit(flow.run, [number], work) for number in range(1, 7)]
        assert wait_until(lambda: len(flow._waiting) == 6)
        go_on.set()
        assert first.result(20) == [0]
        assert [each.result(20) for each in others] == [[-number] for number in range(1, 7)]
    assert batches[0] == [0]
    assert [sorted(each) for each in batches[1:]] == [[1, 2, 3, 4, 5, 6]]


def test_batch_is_bounded_and_every_caller_gets_its_own() -> None:
    flow: Flow[int, int] = Flow(max_batch=4)
    sizes: list[int] = []

    def work(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        return [each + 1 for each in items]

    with ThreadPoolExecutor(16) as pool:
        jobs = [pool.submit(flow.run, list(range(start, start + 10)), work) for start in range(0, 300, 10)]
        for start, job in zip(range(0, 300, 10), jobs, strict=True):
            assert job.result(20) == list(range(start + 1, start + 11))
    assert max(sizes) <= 4
    assert sum(sizes) == 300


def test_fault_is_raised_to_its_batch_and_the_next_goes_on() -> None:
    flow: Flow[int, int] = Flow(max_batch=2)

    def broken(items: Sequence[int]) -> list[int]:
        raise ValueError("a fault of ours")

    for _ in range(3):
        with pytest.raises(ValueError, match="a fault of ours"):
            flow.run([1, 2, 3], broken)
    with pytest.raises(ValueError, match="zip"):
        flow.run([1], lambda items: [])  # one result for each item, or it is a fault
    assert flow.run([1], lambda items: [7]) == [7]
