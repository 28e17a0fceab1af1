"""What the CA counts: its calls, by method and outcome; who is connected; when its authority ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime

from keyreeve_common.errors import KeyreeveError
from keyreeve_common.identity import SpiffeId
from keyreeve_common.metrics import MetricSet


class CaMetrics(MetricSet):
    def call_ended(self, method: str, code: str, seconds: float) -> None:
        """For EdgeInterceptor's `on_end`; methods are those of our protos, so they are few."""
        self.count("keyreeve_ca_rpcs_total", method, code)
        self.observe("keyreeve_ca_rpc_seconds", method, seconds=seconds)

    def watch(self, connected: Mapping[SpiffeId, int], authority_not_after: Callable[[], datetime]) -> None:
        """The gauges, read at each look. Where `authority_not_after` raises one of our errors, the look lacks it."""
        self.gauge("keyreeve_ca_agents_connected", lambda: sum(1 for streams in connected.values() if streams > 0))
        self.gauge("keyreeve_ca_authority_expiry_timestamp_seconds", lambda: _expiry(authority_not_after))


def _expiry(not_after: Callable[[], datetime]) -> float | None:
    try:
        return not_after().timestamp()
    except KeyreeveError:
        return None
