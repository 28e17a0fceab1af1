"""How much: token buckets, pure. Time comes in as whole nanoseconds of a clock that never goes back.

A bucket that holds `burst` tokens and gains `per_second` of them is kept as one number: the time at which it will be full again. In any span of
t seconds at most `burst + per_second * t` are admitted, exactly (the arithmetic is of whole numbers), and a full bucket needs no memory.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from keyreeve_common.errors import InvalidRequest

MAX_PER_SECOND = 1_000_000
MIN_PER_SECOND = 1 / 86_400  # one a day
MAX_BURST = 10_000_000
_SECOND_NS = 1_000_000_000
_SWEEP_AT = 1024
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Rate:
    """Raises: InvalidRequest."""

    per_second: float
    burst: int

    def __post_init__(self) -> None:
        if not MIN_PER_SECOND <= self.per_second <= MAX_PER_SECOND:  # a NaN is refused too
            raise InvalidRequest(f"rate: per_second allowed are one a day to {MAX_PER_SECOND}")
        if not 1 <= self.burst <= MAX_BURST:
            raise InvalidRequest(f"rate: burst allowed are 1 to {MAX_BURST}")


@dataclass(frozen=True, slots=True)
class Pace:
    """A rate as the buckets reckon with it: nanoseconds that one token takes to come, and that a bucket takes to fill."""

    interval_ns: int
    capacity_ns: int


def pace_of(rate: Rate, *, replicas: int = 1) -> Pace:
    """One replica's share of `rate`: rounded down, yet never less than a burst of 1."""
    interval_ns = math.ceil(_SECOND_NS * replicas / rate.per_second)
    return Pace(interval_ns, interval_ns * max(rate.burst // replicas, 1))


class Buckets(Generic[K]):
    """Buckets by key. Full ones are dropped now and then, so that memory is bounded by what was used lately."""

    __slots__ = ("_full_at", "_sweep_at")

    def __init__(self) -> None:
        self._full_at: dict[K, int] = {}
        self._sweep_at = _SWEEP_AT

    def __len__(self) -> int:
        return len(self._full_at)

    def after(self, key: K, pace: Pace, now_ns: int, count: int = 1) -> int:
        """When this bucket would be full again if `count` tokens were taken now. Takes nothing."""
        full_at = self._full_at.get(key, 0)
        if full_at <= now_ns:
            return now_ns + count * pace.interval_ns
        empty = now_ns + pace.capacity_ns
        if full_at > empty:  # emptied at a slower rate than it has now
            full_at = self._full_at[key] = empty
        return full_at + count * pace.interval_ns

    def take(self, key: K, full_at: int, now_ns: int) -> None:
        """Takes the tokens that `after` gave `full_at` for."""
        self._full_at[key] = full_at
        if len(self._full_at) > self._sweep_at:
            self._full_at = {key: full_at for key, full_at in self._full_at.items() if full_at > now_ns}
            self._sweep_at = max(_SWEEP_AT, 2 * len(self._full_at))


def wait_ns(full_at: int, pace: Pace, now_ns: int) -> int:
    """How long until the token that `full_at` stands for is there; 0 or less: it is."""
    return full_at - now_ns - pace.capacity_ns
