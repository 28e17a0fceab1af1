"""The `[telemetry]` table of every service's TOML file: where metrics are served, and where traces go."""

from __future__ import annotations

import re
from dataclasses import dataclass

from keyreeve_common.errors import ConfigInvalid

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})", re.ASCII)
_ENDPOINT = re.compile(r"https?://[^\s/]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class TelemetryConfig:
    """Both are off unless given. `traces_per_million` of the requests that begin here are traced; those traced by the caller always are."""

    metrics_listen: str = ""
    otlp_endpoint: str = ""
    traces_per_million: int = 1000

    def __post_init__(self) -> None:
        match = _ADDRESS.fullmatch(self.metrics_listen)
        if self.metrics_listen and (match is None or int(match.group(2)) > 65_535):
            raise ConfigInvalid("metrics_listen: is not HOST:PORT, for example '127.0.0.1:9464'")
        if self.otlp_endpoint and _ENDPOINT.fullmatch(self.otlp_endpoint) is None:
            raise ConfigInvalid("otlp_endpoint: is not http://HOST:PORT or https://HOST:PORT of an OTLP/gRPC receiver")
        if not 0 <= self.traces_per_million <= 1_000_000:
            raise ConfigInvalid("traces_per_million: allowed are 0 to 1000000")
