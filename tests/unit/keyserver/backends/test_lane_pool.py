"""Fair shares of threads. Threads run for real; what they work on is held by the test, so that nothing depends on the machine's speed."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest
from keyreeve_keyserver.backends.lane_pool import SHARED_NICE, LanePool

WAIT_S = 20


def pool(threads: int = 1) -> LanePool[str]:
    return LanePool(threads, {"short": 8.0, "long": 1.0}, name="test")


def hold(lanes: LanePool[str], begin: threading.Event) -> Future[Any]:
    """Occupies the one thread until `begin`."""
    held = threading.Event()

    def work() -> None:
        held.set()
        begin.wait(WAIT_S)

    future = lanes.submit("long", work)
    assert held.wait(WAIT_S)
    return future


def burn(seconds: float) -> None:
    """Uses processor time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_results_and_failures_reach_who_waits() -> None:
    lanes = pool()
    assert lanes.submit("short", lambda: 7).result(WAIT_S) == 7
    failed: Future[int] = lanes.submit("short", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        failed.result(WAIT_S)
    assert lanes.submit("long", lambda: "still there").result(WAIT_S) == "still there"
    lanes.close()


def test_short_work_passes_a_queue_of_long_work() -> None:
    lanes, order, begin = pool(), list[str](), threading.Event()
    first = hold(lanes, begin)
    queue = [lanes.submit("long", lambda: (burn(0.002), order.append("long"))) for _ in range(50)]
    short = lanes.submit("short", lambda: order.append("short"))
    begin.set()
    short.result(WAIT_S)
    for future in [first, *queue]:
        future.result(WAIT_S)
    assert order.index("short") <= 1
    lanes.close()


def test_while_both_have_work_they_share_by_weight() -> None:
    lanes, begin = pool(), threading.Event()
    used: Counter[str] = Counter()
    stop = threading.Event()

    def work(lane: str) -> None:
        if not stop.is_set():
            burn(0.001)
            used[lane] += 1
            if used.total() >= 180:
                stop.set()

    hold(lanes, begin)
    futures = [lanes.submit(lane, lambda lane=lane: work(lane)) for _ in range(200) for lane in ("short", "long")]  # type: ignore[misc]
    begin.set()
    for future in futures:
        future.result(WAIT_S)
    assert 140 <= used["short"] <= 175  # 160 of 180 by the weights
    lanes.close()


def test_time_spent_idle_gives_no_claim() -> None:
    lanes, begin = pool(), threading.Event()
    for _ in range(50):
        lanes.submit("long", lambda: burn(0.001)).result(WAIT_S)
    hold(lanes, begin)
    order: list[str] = []
    futures = [lanes.submit("short", lambda: (burn(0.001), order.append("short"))) for _ in range(64)]
    futures += [lanes.submit("long", lambda: (burn(0.001), order.append("long"))) for _ in range(8)]
    begin.set()
    for future in futures:
        future.result(WAIT_S)
    assert order.index("long") <= 24  # and not after all 64
    lanes.close()


def test_close_cancels_what_waits_and_waits_for_what_runs() -> None:
    lanes, running, go_on = pool(), threading.Event(), threading.Event()

    def work() -> str:
        running.set()
        go_on.wait(WAIT_S)
        return "done"

    held = lanes.submit("long", work)
    assert running.wait(WAIT_S)
    waiting = lanes.submit("short", lambda: "never")
    closing = threading.Thread(target=lanes.close)
    closing.start()
    with pytest.raises(CancelledError):
        waiting.result(WAIT_S)
    go_on.set()
    closing.join(WAIT_S)
    assert held.result(0) == "done"
    with pytest.raises(RuntimeError):
        lanes.submit("short", lambda: None)


def test_a_cancelled_piece_is_skipped() -> None:
    lanes, begin = pool(), threading.Event()
    hold(lanes, begin)
    cancelled = lanes.submit("short", lambda: "never")
    assert cancelled.cancel()
    begin.set()
    assert lanes.submit("short", lambda: "next").result(WAIT_S) == "next"
    lanes.close()


def test_express_work_does_not_wait_for_a_piece_under_way() -> None:
    lanes: LanePool[str] = LanePool(1, {"short": 8.0, "long": 1.0}, name="test", express=["short"])
    begin = threading.Event()
    held = hold(lanes, begin)
    waiting = lanes.submit("long", lambda: "later")
    assert [lanes.submit("short", lambda: "now").result(WAIT_S) for _ in range(3)] == ["now"] * 3
    assert not waiting.done()  # the express thread takes nothing else
    begin.set()
    held.result(WAIT_S)
    assert waiting.result(WAIT_S) == "later"
    lanes.close()


def test_shared_threads_yield_the_processor_to_the_express_thread_and_the_event_loop() -> None:
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    lanes = LanePool(1, {"short": 8.0, "long": 1.0}, name="test", express=["short"])

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    begin = threading.Event()
    occupied = hold(lanes, begin)  # the shared thread: so the express thread is the free one
    assert lanes.submit("short", niceness).result(WAIT_S) == own
    begin.set()
    occupied.result(WAIT_S)
    assert lanes.submit("long", niceness).result(WAIT_S) == min(own + SHARED_NICE, 19)
    lanes.close()
