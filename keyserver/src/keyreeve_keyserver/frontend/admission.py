"""How much work the key server takes on: one bounded queue for each class of keys, and early refusal instead of late time-outs.

A class is a type of key in one backend ("rsa-4096/software"): what shares a class shares a fate, and no class waits for another. Always true: a
class holds at most `max_items` requests, and about `max_wait_s` of work; a request that would be answered after its deadline is refused
at once; while others may want room, one caller never has all of it. A class that answers nothing (a token that hangs) takes nothing whose
deadline is shorter than its silence. Pure: time comes in, in seconds of one monotonic clock.

Spec: docs/adr/0017-replicas-and-overload.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from keyreeve_common.errors import ErrorCode, Overloaded
from keyreeve_common.sign_batch import all_signed, deadlines_of, uses_of
from keyreeve_common.telemetry import log_warning

from keyreeve_keyserver.frames import Refused, SignItem, SignResult

_QUEUE = 16  # so many outstanding make a queue: what completes while fewer wait tells of latency, not of capacity
_WEIGHT = 1 / 64  # of one completion in the running mean of what a request costs
_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.02, 5.0
_LOG_INTERVAL_S = 1.0


@dataclass(slots=True)
class _Queue:
    """The outstanding requests of one class, and how fast they go: `cost_s` is the time between two completions while there is a queue."""

    name: str
    outstanding: int = 0
    of_caller: Counter[str] = field(default_factory=Counter)
    cost_s: float = 0.0
    progress_at: float = 0.0
    unlogged: int = 0
    logged_at: float | None = None

    def wait_s(self, now: float, ahead: int = 0) -> float:
        """About how long one more request would wait, behind `ahead` others that come with it."""
        silence = now - self.progress_at if self.outstanding else 0.0
        return max((self.outstanding + ahead) * self.cost_s, silence)

    def take(self, caller: str, now: float, count: int = 1) -> None:
        if not self.outstanding:
            self.progress_at = now
        self.outstanding += count
        self.of_caller[caller] += count

    def give_back(self, caller: str, count: int) -> None:
        self.outstanding -= count
        self.of_caller[caller] -= count
        if not self.of_caller[caller]:
            del self.of_caller[caller]

    def learn(self, completed: int, now: float) -> None:
        """`completed` requests were answered, before they are given back."""
        sample_s = (now - self.progress_at) / completed
        self.progress_at = now
        if self.outstanding >= _QUEUE or sample_s < self.cost_s:
            weight = min(1.0, completed * _WEIGHT) if self.cost_s else 1.0
            self.cost_s += weight * (sample_s - self.cost_s)


@dataclass(slots=True)
class Ticket:
    """The admitted items of one batch, and the refusals of the others. Every result of an admitted item is reported once, to `finish`."""

    admitted: Sequence[SignItem]
    shed: list[Refused]
    _caller: str
    _queues: dict[int, _Queue]  # by item id
    _only: _Queue | None = None  # the queue of all items

    def finish(self, results: Sequence[SignResult], now: float) -> None:
        if self._only is not None:
            in_time = len(results) if all_signed(results) else sum([not _is_late(result) for result in results])
            if in_time:
                self._only.learn(in_time, now)
            self._only.give_back(self._caller, len(results))
            return
        ended: Counter[str] = Counter()
        answered: Counter[str] = Counter()
        queues: dict[str, _Queue] = {}
        for result in results:
            queue = self._queues.pop(result.id)
            queues[queue.name] = queue
            ended[queue.name] += 1
            answered[queue.name] += not _is_late(result)
        for name, queue in queues.items():
            if answered[name]:
                queue.learn(answered[name], now)
            queue.give_back(self._caller, ended[name])


class Admission:
    """`class_of` names the class of a key."""

    def __init__(self, class_of: Callable[[str], str], *, max_items: int, max_wait_s: float) -> None:
        self._class_of = class_of
        self._max_items = max_items
        self._max_wait_s = max_wait_s
        self._queues: dict[str, _Queue] = {}

    def outstanding(self) -> dict[str, int]:
        return {name: queue.outstanding for name, queue in self._queues.items()}

    def admit(self, caller: str, items: Sequence[SignItem], now: float) -> Ticket:
        if (queue := self._room_for_all(caller, items, now)) is not None:
            queue.take(caller, now, len(items))
            return Ticket(items, [], caller, {}, queue)
        admitted: list[SignItem] = []
        ticket = Ticket(admitted, [], caller, {})
        for item in items:
            queue = self._queue(item.key_id)
            reason = self._full(queue, caller, item.deadline_ms / 1000, now)
            if reason is None:
                queue.take(caller, now)
                admitted.append(item)
                ticket._queues[item.id] = queue
            else:
                ticket.shed.append(Refused(item.id, _overloaded(queue, reason, now)))
                _log(queue, reason, now)
        return ticket

    def _room_for_all(self, caller: str, items: Sequence[SignItem], now: float) -> _Queue | None:
        """The one queue of all items where every one of them would be taken; None where they are to be looked at one by one."""
        names = {self._class_of(key_id) for key_id, _, _ in set(uses_of(items))}
        if len(names) != 1:
            return None
        queue = self._queue_named(names.pop())
        deadline_s = min(deadlines_of(items)) / 1000
        return queue if self._full(queue, caller, deadline_s, now, ahead=len(items) - 1) is None else None

    def _queue(self, key_id: str) -> _Queue:
        return self._queue_named(self._class_of(key_id))

    def _queue_named(self, name: str) -> _Queue:
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = _Queue(name)
        return queue

    def _full(self, queue: _Queue, caller: str, deadline_s: float, now: float, *, ahead: int = 0) -> str | None:
        """Why one more request is not taken behind `ahead` others that come with it; None when it is."""
        outstanding = queue.outstanding + ahead
        if not outstanding:
            return None
        wait_s = queue.wait_s(now, ahead)
        if wait_s >= deadline_s:
            return "the deadline would pass before it is signed"
        room = self._max_items
        if queue.cost_s > 0:
            room = max(min(room, int(self._max_wait_s / queue.cost_s)), 1)
        if outstanding >= room:
            return "its queue is full"
        # One share is always kept for the caller that comes next.
        own = queue.of_caller.get(caller, 0)
        if own + ahead >= max(room // (len(queue.of_caller) + (own == 0) + 1), 1):
            return "this caller has its share of the queue"
        return None


def _is_late(result: SignResult) -> bool:
    return isinstance(result, Refused) and result.error.code is ErrorCode.DEADLINE_EXCEEDED


def _overloaded(queue: _Queue, reason: str, now: float) -> Overloaded:
    retry_s = min(max(queue.wait_s(now) / 2, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)
    return Overloaded(f"too many requests for {queue.name} keys: {reason}", retry_after=timedelta(seconds=retry_s))


def _log(queue: _Queue, reason: str, now: float) -> None:
    """At most one line a second for each class: a flood does not fill the log."""
    queue.unlogged += 1
    if queue.logged_at is None or now - queue.logged_at >= _LOG_INTERVAL_S:
        log_warning(
            "load_shed", key_class=queue.name, detail=reason, outstanding=queue.outstanding, items=queue.unlogged
        )
        queue.logged_at, queue.unlogged = now, 0
