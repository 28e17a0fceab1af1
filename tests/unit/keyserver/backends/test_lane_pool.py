"""Fair shares of threads. Threads run for real; what they work on is held by the test, so that nothing depends on the machine's speed."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any

import pytest
from keyreeve_keyserver.backends.lane_pool import SHARED_NICE, LanePool

WAIT_S = 20
Job = tuple[Future[Any], Callable[[], Any]]


class Jobs:
    """A pool whose items are functions; `pieces` are the lengths of the pieces that threads took."""

    def __init__(self, threads: int = 1, *, piece: int = 1, express: Collection[str] = ()) -> None:
        self.pieces: list[tuple[str, int]] = []
        self.pool: LanePool[str, Job] = LanePool(
            threads,
            {"short": 8.0, "long": 1.0},
            piece=lambda lane, waiting: min(waiting, piece),
            serve=self._serve,
            name="test",
            express=express,
        )

    def submit(self, lane: str, *works: Callable[[], Any]) -> Future[Any]:
        """The result of the last."""
        jobs: list[Job] = [(Future(), work) for work in works]
        self.pool.submit(lane, jobs)
        return jobs[-1][0]

    def _serve(self, lane: str, items: list[Job]) -> None:
        self.pieces.append((lane, len(items)))
        for future, work in items:
            future.set_result(work())

    def hold(self, begin: threading.Event) -> Future[Any]:
        """Occupies the one thread until `begin`."""
        held = threading.Event()

        def work() -> None:
            held.set()
            begin.wait(WAIT_S)

        future = self.submit("long", work)
        assert held.wait(WAIT_S)
        return future


def burn(seconds: float) -> None:
    """Uses processor time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_thread_survives_a_fault_of_its_work() -> None:
    jobs = Jobs()
    assert jobs.submit("short", lambda: 7).result(WAIT_S) == 7
    jobs.submit("short", lambda: 1 // 0)
    assert jobs.submit("long", lambda: "still there").result(WAIT_S) == "still there"
    assert jobs.pool.close() == []


def test_a_piece_is_what_waits_whoever_brought_it() -> None:
    jobs, begin = Jobs(piece=8), threading.Event()
    jobs.hold(begin)
    futures = [jobs.submit("short", *[lambda: None] * count) for count in (3, 4, 5)]
    begin.set()
    for future in futures:
        future.result(WAIT_S)
    assert jobs.pieces == [("long", 1), ("short", 8), ("short", 4)]
    jobs.pool.close()


def test_what_one_thread_leaves_the_next_takes() -> None:
    """Three pieces come at once, and each waits for the other two to be under way: all threads have to be woken."""
    jobs, all_there = Jobs(threads=3, piece=2), threading.Barrier(3)

    def wait() -> int:
        return all_there.wait(WAIT_S)

    jobs.submit("long", *[wait, lambda: None] * 3).result(WAIT_S)
    jobs.pool.close()
    assert jobs.pieces == [("long", 2)] * 3


def test_short_work_passes_a_queue_of_long_work() -> None:
    jobs, order, begin = Jobs(), list[str](), threading.Event()
    first = jobs.hold(begin)
    queue = [jobs.submit("long", lambda: (burn(0.002), order.append("long"))) for _ in range(50)]
    short = jobs.submit("short", lambda: order.append("short"))
    begin.set()
    short.result(WAIT_S)
    for future in [first, *queue]:
        future.result(WAIT_S)
    assert order.index("short") <= 1
    jobs.pool.close()


def test_while_both_have_work_they_share_by_weight() -> None:
    jobs, begin = Jobs(), threading.Event()
    used: Counter[str] = Counter()
    stop = threading.Event()

    def work(lane: str) -> None:
        if not stop.is_set():
            burn(0.001)
            used[lane] += 1
            if used.total() >= 180:
                stop.set()

    jobs.hold(begin)
    futures = [jobs.submit(lane, lambda lane=lane: work(lane)) for _ in range(200) for lane in ("short", "long")]  # type: ignore[misc]
    begin.set()
    for future in futures:
        future.result(WAIT_S)
    assert 140 <= used["short"] <= 175  # 160 of 180 by the weights
    jobs.pool.close()


def test_time_spent_idle_gives_no_claim() -> None:
    jobs, begin = Jobs(), threading.Event()
    for _ in range(50):
        jobs.submit("long", lambda: burn(0.001)).result(WAIT_S)
    jobs.hold(begin)
    order: list[str] = []
    futures = [jobs.submit("short", lambda: (burn(0.001), order.append("short"))) for _ in range(64)]
    futures += [jobs.submit("long", lambda: (burn(0.001), order.append("long"))) for _ in range(8)]
    begin.set()
    for future in futures:
        future.result(WAIT_S)
    assert order.index("long") <= 24  # and not after all 64
    jobs.pool.close()


def test_close_gives_back_what_waits_and_waits_for_what_runs() -> None:
    jobs, running, go_on = Jobs(), threading.Event(), threading.Event()

    def work() -> str:
        running.set()
        go_on.wait(WAIT_S)
        return "done"

    held = jobs.submit("long", work)
    assert running.wait(WAIT_S)
    waiting = jobs.submit("short", lambda: "never")
    left: list[Job] = []
    closing = threading.Thread(target=lambda: left.extend(jobs.pool.close()))
    closing.start()
    go_on.set()
    closing.join(WAIT_S)
    assert held.result(0) == "done"
    assert waiting.done() or [future for future, _ in left] == [waiting]
    with pytest.raises(RuntimeError):
        jobs.submit("short", lambda: None)


def test_express_work_does_not_wait_for_a_piece_under_way() -> None:
    jobs = Jobs(express=["short"])
    begin = threading.Event()
    held = jobs.hold(begin)
    waiting = jobs.submit("long", lambda: "later")
    assert [jobs.submit("short", lambda: "now").result(WAIT_S) for _ in range(3)] == ["now"] * 3
    assert not waiting.done()  # the express thread takes nothing else
    begin.set()
    held.result(WAIT_S)
    assert waiting.result(WAIT_S) == "later"
    jobs.pool.close()


def test_shared_threads_yield_the_processor_to_the_express_thread_and_the_event_loop() -> None:
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    jobs = Jobs(express=["short"])

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    begin = threading.Event()
    occupied = jobs.hold(begin)  # the shared thread: so the express thread is the free one
    assert jobs.submit("short", niceness).result(WAIT_S) == own
    begin.set()
    occupied.result(WAIT_S)
    assert jobs.submit("long", niceness).result(WAIT_S) == min(own + SHARED_NICE, 19)
    jobs.pool.close()
