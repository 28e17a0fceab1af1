"""What went through the sign socket since the agent started."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from keyreeve_common.key_id import KeyId
from keyreeve_common.metrics import MetricSet

_LOG_INTERVAL_SECONDS = 1.0


@dataclass
class Counts:
    """`connections` and `outstanding` are those of now, the others grow."""

    signed: Counter[KeyId] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    outstanding: Counter[int] = field(default_factory=Counter)  # by uid; change it by `began` and `ended` alone
    outstanding_total: int = 0
    of_uid: Counter[int] = field(default_factory=Counter)
    metrics: MetricSet = field(default_factory=MetricSet)
    _logged_at: float | None = None
    _unlogged: int = 0

    def began(self, uid: int) -> None:
        self.outstanding[uid] += 1
        self.outstanding_total += 1

    def ended(self, uid: int) -> None:
        self.outstanding_total -= 1
        left = self.outstanding[uid] - 1
        if left:
            self.outstanding[uid] = left
        else:
            del self.outstanding[uid]

    def count_refused(self, code: str) -> None:
        self.refused[code] += 1
        self.metrics.count("keyreeve_agent_requests_total", code)

    def count_signed(self, key_id: KeyId, seconds: float) -> None:
        """One signature, `seconds` after its request came."""
        self.signed[key_id] += 1
        self.metrics.count("keyreeve_agent_requests_total", "ok")
        self.metrics.observe("keyreeve_agent_request_seconds", seconds=seconds)

    def log_malformed(self, now: float) -> int | None:
        """None when a malformed frame is not to be logged, else how many were not since the last that was: no client fills the log."""
        if self._logged_at is not None and now - self._logged_at < _LOG_INTERVAL_SECONDS:
            self._unlogged += 1
            return None
        unlogged, self._unlogged, self._logged_at = self._unlogged, 0, now
        return unlogged
