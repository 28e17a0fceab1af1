"""Threads that serve several lanes of work by fair shares of processor time, so that short work never waits for a queue of long work.

Always true: a free thread takes from the lane that used least of its share; a lane that was idle has no claim to the time before. So the wait
of a lane's first item is bounded by the longest piece of any other lane, and lanes share the threads by their weights while all have work.
A piece is what waits in a lane when a thread comes, whoever brought it, up to what `piece` says: there is no timer, and an item that comes alone
is served alone.

One thread more than asked for serves the express lanes alone: their work waits for the processor at most, never for another lane's piece. The
others yield the processor to it and to the event loop, so that long pieces on all cores hold up neither.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from keyreeve_common.telemetry import log_exception

SHARED_NICE = 5  # a third of the weight of a thread that is not nice. Spec: sched(7)
L = TypeVar("L", bound=Hashable)
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Lane(Generic[L, T]):
    name: L
    weight: float
    used_s: float = 0.0  # processor time divided by the weight
    work: deque[T] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class _Crew(Generic[L, T]):
    """Threads that serve the same lanes; `idle` of them wait for work."""

    lanes: list[_Lane[L, T]]
    work_came: threading.Condition
    idle: int = 0

    def wake_one(self) -> bool:
        """Whether there was one to wake; it counts as busy from now on. With the lock held."""
        if not self.idle:
            return False
        self.idle -= 1
        self.work_came.notify()
        return True


class LanePool(Generic[L, T]):
    """`weights` names the lanes; a lane of weight 8 gets eight times the time of one of weight 1.

    `piece` says how many of the items that wait in a lane (one at least) a thread takes; it is called with the lock held. `serve` works on them
    in that thread; what it raises is logged, and the thread goes on.
    """

    def __init__(
        self,
        threads: int,
        weights: Mapping[L, float],
        *,
        piece: Callable[[L, int], int],
        serve: Callable[[L, list[T]], None],
        name: str,
        express: Collection[L] = (),
    ) -> None:
        self._lanes = {lane: _Lane[L, T](lane, weight) for lane, weight in weights.items()}
        self._piece, self._serve_piece = piece, serve
        self._lock = threading.Lock()
        self._shared = _Crew(list(self._lanes.values()), threading.Condition(self._lock))
        self._express = _Crew([self._lanes[lane] for lane in express], threading.Condition(self._lock))
        self._closed = False
        self._clock_s = 0.0  # the share that the lane served last had used
        self._threads = [
            threading.Thread(target=self._serve_nicely, name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        if express:
            thread = threading.Thread(target=self._serve, args=(self._express,), name=f"{name}-express", daemon=True)
            self._threads.append(thread)
        for thread in self._threads:
            thread.start()

    def submit(self, lane: L, items: Iterable[T]) -> None:
        """Raises: RuntimeError when closed."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed")
            state = self._lanes[lane]
            if not state.work:
                state.used_s = max(state.used_s, self._clock_s)
            state.work.extend(items)
            self._wake_for(state)

    def close(self) -> list[T]:
        """Waits for what was begun, and gives back what was not."""
        with self._lock:
            self._closed = True
            never_begun = [item for lane in self._lanes.values() for item in lane.work]
            for lane in self._lanes.values():
                lane.work.clear()
            for crew in (self._shared, self._express):
                crew.work_came.notify_all()
        for thread in self._threads:
            thread.join()
        return never_begun

    def _wake_for(self, lane: _Lane[L, T]) -> None:
        """One thread: who takes a piece and leaves some wakes the next."""
        if not (lane in self._express.lanes and self._express.wake_one()):
            self._shared.wake_one()

    def _serve_nicely(self) -> None:
        with suppress(OSError):  # a sandbox may forbid it: then all threads are equal
            own = threading.get_native_id()  # on Linux each thread has a nice value of its own
            os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + SHARED_NICE)
        self._serve(self._shared)

    def _serve(self, crew: _Crew[L, T]) -> None:
        while (taken := self._take(crew)) is not None:
            lane, items = taken
            began_s = time.thread_time()
            try:
                self._serve_piece(lane.name, items)
            except Exception:
                log_exception("lane_failed", items=len(items))
            del taken, items  # else an idle thread keeps the last requests, and their keys, alive
            with self._lock:
                lane.used_s += (time.thread_time() - began_s) / lane.weight

    def _take(self, crew: _Crew[L, T]) -> tuple[_Lane[L, T], list[T]] | None:
        with self._lock:
            while not self._closed:
                busy = [lane for lane in crew.lanes if lane.work]
                if busy:
                    lane = min(busy, key=lambda lane: (lane.used_s, -lane.weight))
                    self._clock_s = max(self._clock_s, lane.used_s)
                    count = min(max(self._piece(lane.name, len(lane.work)), 1), len(lane.work))
                    items = [lane.work.popleft() for _ in range(count)]
                    for other in crew.lanes:
                        if other.work:
                            self._wake_for(other)
                    return lane, items
                crew.idle += 1
                crew.work_came.wait()
        return None
