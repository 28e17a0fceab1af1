"""The agent's configuration (agent.toml): one frozen object, checked whole before anything starts.

Spec: docs of the member (client/README.md); ../shared/style.md "Config".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from keyreeve_common.errors import ConfigInvalid
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.key_reference import MAX_SOCKET_BYTES
from keyreeve_common.telemetry_config import TelemetryConfig

_BOUNDS = (
    "max_connections",
    "max_connections_per_uid",
    "max_outstanding",
    "max_outstanding_per_uid",
    "max_outstanding_per_connection",
)
_MODE = re.compile(r"0?[0-7]{3}", re.ASCII)


@dataclass(frozen=True, slots=True)
class CaConfig:
    """`attest_address` is the listener for nodes without SVID. `spiffe_id` absent: spiffe://<trust domain>/keyreeve/ca."""

    address: str
    attest_address: str
    spiffe_id: SpiffeId | None = None


@dataclass(frozen=True, slots=True)
class KeyServerConfig:
    """`addresses` are the replicas of one key cluster. `spiffe_id` absent: spiffe://<trust domain>/keyreeve/keyserver.

    `connections` are those to each address. The others count where there are two replicas or more: when a request is also sent to a second one,
    and which one is left out.
    """

    addresses: tuple[str, ...]
    spiffe_id: SpiffeId | None = None
    hedge_percent: int = 3
    hedge_floor: timedelta = timedelta(milliseconds=20)
    silence_timeout: timedelta = timedelta(milliseconds=500)
    max_errors: int = 3
    connections: int = 1

    def __post_init__(self) -> None:
        if not self.addresses:
            raise ConfigInvalid("addresses: at least one is needed")
        if len(set(self.addresses)) != len(self.addresses):
            raise ConfigInvalid("addresses: one stands twice")
        if not 0 <= self.hedge_percent <= 50:
            raise ConfigInvalid("hedge_percent: allowed are 0 to 50")
        if not timedelta(milliseconds=1) <= self.hedge_floor <= timedelta(seconds=10):
            raise ConfigInvalid("hedge_floor: allowed are 1ms to 10s")
        if not timedelta(milliseconds=50) <= self.silence_timeout <= timedelta(seconds=30):
            raise ConfigInvalid("silence_timeout: allowed are 50ms to 30s")
        if not 1 <= self.max_errors <= 1000:
            raise ConfigInvalid("max_errors: allowed are 1 to 1000")
        if not 1 <= self.connections <= 16:
            raise ConfigInvalid("connections: allowed are 1 to 16")


@dataclass(frozen=True, slots=True)
class SignSocketConfig:
    """`path` and `mode` of the socket file, and the bounds that keep one process from starving the others."""

    path: Path
    mode: str = "0666"
    max_connections: int = 2048
    max_connections_per_uid: int = 1024
    max_outstanding: int = 4096
    max_outstanding_per_uid: int = 3072
    max_outstanding_per_connection: int = 256
    stall_timeout: timedelta = timedelta(seconds=30)

    def __post_init__(self) -> None:
        if len(str(self.path).encode()) > MAX_SOCKET_BYTES:
            raise ConfigInvalid(f"path: longer than {MAX_SOCKET_BYTES} bytes, which a Unix socket cannot have")
        if _MODE.fullmatch(self.mode) is None:
            raise ConfigInvalid("mode: an octal mode such as '0666' is expected")
        for name in _BOUNDS:
            if getattr(self, name) < 1:
                raise ConfigInvalid(f"{name}: must be 1 or more")

    @property
    def mode_bits(self) -> int:
        return int(self.mode, 8)


@dataclass(frozen=True, slots=True)
class ProxyConfig:
    """Where one SVID is written for a proxy that reads files, and how that proxy is told."""

    name: str
    spiffe_id: SpiffeId
    directory: Path
    owner: str | None = None
    group: str | None = None
    reload_command: tuple[str, ...] = ()
    reload_timeout: timedelta = timedelta(seconds=10)

    def __post_init__(self) -> None:
        if self.reload_command and not self.reload_command[0].startswith("/"):
            raise ConfigInvalid("reload_command: the program must be an absolute path; no shell is involved")


@dataclass(frozen=True, slots=True)
class AgentConfig:
    trust_domain: TrustDomain
    bundle_file: Path
    ca: CaConfig
    key_server: KeyServerConfig
    sign_socket: SignSocketConfig
    join_token_file: Path | None = None
    state_dir: Path = Path("/run/keyreeve-agent")
    drain_timeout: timedelta = timedelta(seconds=10)
    proxy: tuple[ProxyConfig, ...] = field(default=())
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    def __post_init__(self) -> None:
        for values, what in (
            ([proxy.name for proxy in self.proxy], "name"),
            ([str(proxy.directory) for proxy in self.proxy], "directory"),
        ):
            if len(set(values)) != len(values):
                raise ConfigInvalid(f"proxy: two blocks have the same {what}")
        for proxy in self.proxy:
            if not proxy.spiffe_id.member_of(self.trust_domain):
                raise ConfigInvalid(f"proxy {proxy.name}: {proxy.spiffe_id} is not of trust domain {self.trust_domain}")

    @property
    def ca_id(self) -> SpiffeId:
        return self.ca.spiffe_id or SpiffeId(self.trust_domain, "/keyreeve/ca")

    @property
    def key_server_id(self) -> SpiffeId:
        return self.key_server.spiffe_id or SpiffeId(self.trust_domain, "/keyreeve/keyserver")
