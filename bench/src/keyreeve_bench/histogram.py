"""Latencies in a histogram of constant relative error, in the manner of HDR histograms: no value is dropped, two can be added up.

A value of n bits keeps its highest 8 bits, so what is read back is at most 0.8 % too large and never too small. Unit: microseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

_KEPT_BITS = 8


def _highest_of_bucket(value: int) -> int:
    """The largest value that shares its highest 8 bits and its length with `value`."""
    dropped = max(value.bit_length() - _KEPT_BITS, 0)
    return value | ((1 << dropped) - 1)


@dataclass(slots=True)
class Histogram:
    counts: Counter[int] = field(default_factory=Counter)

    @classmethod
    def from_json(cls, counts: Mapping[str, int]) -> Histogram:
        return cls(Counter({int(value): count for value, count in counts.items()}))

    def to_json(self) -> dict[str, int]:
        return {str(value): count for value, count in sorted(self.counts.items())}

    def record(self, seconds: float) -> None:
        self.counts[_highest_of_bucket(max(round(seconds * 1e6), 0))] += 1

    def add(self, other: Histogram) -> None:
        self.counts.update(other.counts)

    @property
    def total(self) -> int:
        return self.counts.total()

    def quantile_ms(self, share: float) -> float:
        """The smallest recorded value that at least `share` (0 to 1) of all values do not exceed. Raises: ValueError when empty."""
        if not self.counts:
            raise ValueError("the histogram is empty")
        needed, seen = share * self.total, 0
        for value in sorted(self.counts):
            seen += self.counts[value]
            if seen >= needed - 1e-9:
                return value / 1000
        return max(self.counts) / 1000

    def summary(self) -> dict[str, float]:
        """p50, p99, p99.9 and the largest, in milliseconds; and how many there were."""
        shares = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
        return {**{name: round(self.quantile_ms(share), 3) for name, share in shares.items()}, "count": self.total}
