"""Threads that serve several lanes of work by fair shares of processor time, so that short work never waits for a queue of long work.

Always true: a free thread takes from the lane that used least of its share; a lane that was idle has no claim to the time before. So the wait
of a lane's first piece is bounded by the longest piece of any other lane, and lanes share the threads by their weights while all have work.
One thread more than asked for serves the express lanes alone: their work waits for the processor at most, never for another lane's piece. The
others yield the processor to it and to the event loop, so that long pieces on all cores hold up neither.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

SHARED_NICE = 5  # a third of the weight of a thread that is not nice. Spec: sched(7)
L = TypeVar("L", bound=Hashable)
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Lane:
    weight: float
    used_s: float = 0.0  # processor time divided by the weight
    work: deque[tuple[Future[Any], Callable[[], Any]]] = field(default_factory=deque)


class LanePool(Generic[L]):
    """`weights` names the lanes; a lane of weight 8 gets eight times the time of one of weight 1."""

    def __init__(self, threads: int, weights: Mapping[L, float], *, name: str, express: Collection[L] = ()) -> None:
        self._lanes = {lane: _Lane(weight) for lane, weight in weights.items()}
        self._express = [self._lanes[lane] for lane in express]
        self._lock = threading.Lock()
        self._any_work = threading.Condition(self._lock)
        self._express_work = threading.Condition(self._lock)
        self._closed = False
        self._clock_s = 0.0  # the share that the lane served last had used
        serve_all = (list(self._lanes.values()), self._any_work)
        self._threads = [
            threading.Thread(target=self._serve_nicely, args=serve_all, name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        if express:
            serve_express = (self._express, self._express_work)
            thread = threading.Thread(target=self._serve, args=serve_express, name=f"{name}-express", daemon=True)
            self._threads.append(thread)
        for thread in self._threads:
            thread.start()

    def submit(self, lane: L, work: Callable[[], T]) -> Future[T]:
        """Raises: RuntimeError when closed."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed")
            state = self._lanes[lane]
            if not state.work:
                state.used_s = max(state.used_s, self._clock_s)
            state.work.append((future, work))
            self._any_work.notify()
            if state in self._express:
                self._express_work.notify()
        return future

    def close(self) -> None:
        """Cancels what was not begun and waits for what was."""
        with self._lock:
            self._closed = True
            for lane in self._lanes.values():
                for future, _ in lane.work:
                    future.cancel()
                lane.work.clear()
            self._any_work.notify_all()
            self._express_work.notify_all()
        for thread in self._threads:
            thread.join()

    def _serve_nicely(self, lanes: list[_Lane], work_came: threading.Condition) -> None:
        with suppress(OSError):  # a sandbox may forbid it: then all threads are equal
            own = threading.get_native_id()  # on Linux each thread has a nice value of its own
            os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + SHARED_NICE)
        self._serve(lanes, work_came)

    def _serve(self, lanes: list[_Lane], work_came: threading.Condition) -> None:
        while (taken := self._take(lanes, work_came)) is not None:
            lane, future, work = taken
            if not future.set_running_or_notify_cancel():
                continue
            began_s = time.thread_time()
            try:
                result = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            with self._lock:
                lane.used_s += (time.thread_time() - began_s) / lane.weight

    def _take(
        self, lanes: list[_Lane], work_came: threading.Condition
    ) -> tuple[_Lane, Future[Any], Callable[[], Any]] | None:
        with self._lock:
            while not self._closed:
                busy = [lane for lane in lanes if lane.work]
                if busy:
                    lane = min(busy, key=lambda lane: (lane.used_s, -lane.weight))
                    self._clock_s = max(self._clock_s, lane.used_s)
                    return lane, *lane.work.popleft()
                work_came.wait()
        return None
