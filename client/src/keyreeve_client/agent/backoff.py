"""Waiting longer after each failure, with jitter, so that a thousand agents do not come back at once."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import timedelta


@dataclass
class Backoff:
    """`next` gives the seconds to wait; `reset` after a success."""

    first: timedelta
    longest: timedelta
    random: random.Random = field(default_factory=random.SystemRandom)
    failures: int = 0

    def next(self) -> float:
        bound = min(self.longest.total_seconds(), self.first.total_seconds() * 2 ** min(self.failures, 32))
        self.failures += 1
        return float(bound * self.random.uniform(0.5, 1.0))

    def reset(self) -> None:
        self.failures = 0
