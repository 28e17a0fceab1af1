"""Many callers, few batches: orders that come while a batch is under way leave together in the next one.

There is no timer and no thread of its own: the first order leaves at once, and whoever waits carries the next batch. So a lone order waits for
nothing, and a storm is issued in as few transactions and signing calls as there is room for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

MAX_BATCH = 256  # bounds how long one batch holds the database's one writer
MAX_IN_FLIGHT = 2  # one computes while the other waits for the key cluster or the database


@dataclass(slots=True, eq=False)
class _Waiting(Generic[T, R]):
    item: T
    result: R | None = None
    failure: BaseException | None = None
    done: bool = False


class Flow(Generic[T, R]):
    """Safe to share among threads. `max_batch` is of items, not of callers: one caller's many items may leave in several batches."""

    def __init__(self, *, max_batch: int = MAX_BATCH, max_in_flight: int = MAX_IN_FLIGHT) -> None:
        self._max_batch = max_batch
        self._max_in_flight = max_in_flight
        self._waiting: deque[_Waiting[T, R]] = deque()
        self._in_flight = 0
        self._changed = threading.Condition()

    def run(self, items: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
        """The results of `work`, which is called with these items and perhaps others', in this thread or another one.

        Every caller gives the same `work`: one result for each item, in order. What it raises, all callers in the batch get.
        """
        mine = [_Waiting[T, R](item) for item in items]
        with self._changed:
            self._waiting.extend(mine)
        while (batch := self._next_batch(mine)) is not None:
            self._carry(batch, work)
        for each in mine:
            if each.failure is not None:
                raise each.failure
        return [each.result for each in mine]  # type: ignore[misc]  # done without failure: there is a result

    def _next_batch(self, mine: Sequence[_Waiting[T, R]]) -> list[_Waiting[T, R]] | None:
        """A batch for this thread to carry; None when all of `mine` is done."""
        with self._changed:
            while True:
                if all(each.done for each in mine):
                    return None
                if self._waiting and self._in_flight < self._max_in_flight:
                    self._in_flight += 1
                    return [self._waiting.popleft() for _ in range(min(self._max_batch, len(self._waiting)))]
                self._changed.wait()

    def _carry(self, batch: Sequence[_Waiting[T, R]], work: Callable[[Sequence[T]], Sequence[R]]) -> None:
        try:
            results = work([each.item for each in batch])
            for each, result in zip(batch, results, strict=True):
                each.result = result
        except BaseException as error:
            for each in batch:
                each.failure = error
        finally:
            with self._changed:
                for each in batch:
                    each.done = True
                self._in_flight -= 1
                self._changed.notify_all()
