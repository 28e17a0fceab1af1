"""Configuration of the front end and its supervisor: keyserver.toml. The signer has a file of its own, which `signer_config` names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

from keyreeve_common.config import load_config, parse_duration
from keyreeve_common.errors import ConfigInvalid
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.telemetry_config import TelemetryConfig
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from keyreeve_keyserver.domain.pair import MAX_PAIRS, Pair
from keyreeve_keyserver.domain.rates import MAX_BURST, MAX_PER_SECOND

MAX_SOCKET_PATH_BYTES = 107
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})", re.ASCII)
_DRIVERS = {"postgresql": "postgresql+psycopg", "postgresql+psycopg": "postgresql+psycopg"}


@dataclass(frozen=True, slots=True)
class Callers:
    """`key_admins`: SPIFFE IDs that may create keys, give grants and certify this server; empty: the CA's."""

    key_admins: tuple[SpiffeId, ...] = ()


@dataclass(frozen=True, slots=True)
class CatalogConfig:
    """SQLite at `path`, or PostgreSQL at `url`, whose password stands in `password_file` alone."""

    path: Path | None = None
    url: str = ""
    password_file: Path | None = None
    busy_timeout: timedelta = timedelta(seconds=5)
    poll_interval: timedelta = timedelta(milliseconds=200)
    max_staleness: timedelta = timedelta(seconds=60)

    def __post_init__(self) -> None:
        if self.path is not None and self.url:
            raise ConfigInvalid("path and url: give one of them")
        if self.url:
            _check_url(self.url)
        elif self.password_file is not None:
            raise ConfigInvalid("password_file: is only for url")
        if not timedelta(milliseconds=10) <= self.poll_interval <= timedelta(seconds=1):
            raise ConfigInvalid("poll_interval: allowed are 10ms to 1s, so that a revocation is known within a second")
        if self.max_staleness < 2 * self.poll_interval:
            raise ConfigInvalid("max_staleness: must be at least twice poll_interval")
        _require_range("busy_timeout", self.busy_timeout, low="100ms", high="60s")


@dataclass(frozen=True, slots=True)
class Rates:
    """Signatures a second: of a grant that names no rate, of one holder, of one key. 0: no limit; a burst of 0: twice the rate.

    Each replica counts for itself; `replicas` divides every rate, those of grants too.
    """

    per_grant: int = 0
    per_grant_burst: int = 0
    per_holder: int = 50_000
    per_holder_burst: int = 0
    per_key: int = 100_000
    per_key_burst: int = 0
    replicas: int = 1

    def __post_init__(self) -> None:
        for name in ("per_grant", "per_holder", "per_key"):
            if not 0 <= getattr(self, name) <= MAX_PER_SECOND:
                raise ConfigInvalid(f"{name}: allowed are 0 (no limit) to {MAX_PER_SECOND}")
            if not 0 <= getattr(self, f"{name}_burst") <= MAX_BURST:
                raise ConfigInvalid(f"{name}_burst: allowed are 0 (twice the rate) to {MAX_BURST}")
        if not 1 <= self.replicas <= 1000:
            raise ConfigInvalid("replicas: allowed are 1 to 1000")


@dataclass(frozen=True, slots=True)
class Limits:
    """`sign_timeout` bounds every signature; `drain_timeout` what a stop waits for; `rates` are per replica; the others bound memory."""

    sign_timeout: timedelta = timedelta(seconds=5)
    control_timeout: timedelta = timedelta(seconds=60)
    drain_timeout: timedelta = timedelta(seconds=10)
    batches_per_stream: int = 32
    bytes_in_flight: int = 134_217_728
    queue_items: int = 4_096
    queue_time: timedelta = timedelta(seconds=1)
    rates: Rates = field(default_factory=Rates)

    def __post_init__(self) -> None:
        _require_range("sign_timeout", self.sign_timeout, low="10ms", high="60s")
        _require_range("control_timeout", self.control_timeout, low="1s", high="10m")
        _require_range("drain_timeout", self.drain_timeout, low="100ms", high="5m")
        if not 1 <= self.batches_per_stream <= 1024:
            raise ConfigInvalid("batches_per_stream: allowed are 1 to 1024")
        if not 16 <= self.queue_items <= 1_000_000:
            raise ConfigInvalid("queue_items: allowed are 16 to 1000000")
        _require_range("queue_time", self.queue_time, low="10ms", high="60s")
        if self.bytes_in_flight < 33_554_432:
            raise ConfigInvalid("bytes_in_flight: at least 33554432, so that two full batches fit")


@dataclass(frozen=True, slots=True)
class KeysConfig:
    """`destruction_wait` is the shortest time between scheduling a destruction and the destruction; 0s destroys at once."""

    destruction_wait: timedelta = timedelta(days=7)
    reap_interval: timedelta = timedelta(seconds=10)
    destroy_retired: bool = False

    def __post_init__(self) -> None:
        if self.destruction_wait > timedelta(days=365):
            raise ConfigInvalid("destruction_wait: allowed are 0s to 365d")
        _require_range("reap_interval", self.reap_interval, low="100ms", high="1h")


@dataclass(frozen=True, slots=True)
class QuarantineConfig:
    """When a replica puts a holder in quarantine by itself (ADR 13): so many refusals within `window`, 0: never.

    A `duration` of 0: until it is lifted.
    """

    enabled: bool = True
    refusals: int = 50
    rate_refusals: int = 0
    workload_refusals: int = 0
    window: timedelta = timedelta(minutes=1)
    duration: timedelta = timedelta(hours=1)
    max_holders: int = 3

    def __post_init__(self) -> None:
        for name in ("refusals", "rate_refusals", "workload_refusals"):
            if not 0 <= getattr(self, name) <= 100_000:
                raise ConfigInvalid(f"{name}: allowed are 0 (never) to 100000")
        _require_range("window", self.window, low="1s", high="1h")
        _require_range("duration", self.duration, low="0s", high="365d")
        if not 1 <= self.max_holders <= 1000:
            raise ConfigInvalid("max_holders: allowed are 1 to 1000")


@dataclass(frozen=True, slots=True)
class SupervisorConfig:
    """Restarts: the first at once, later ones after a back-off that doubles; `max_restarts` within `window` ends the supervisor.

    `pairs`: how many front ends, each with a signer of its own, share `listen` (ADR 0031).
    `signer_user`, `front_end_user`, `worker_user` (launcher and workers): who runs them, where root starts the supervisor; empty: its own user.
    """

    max_restarts: int = 5
    window: timedelta = timedelta(minutes=1)
    backoff: timedelta = timedelta(milliseconds=200)
    start_timeout: timedelta = timedelta(seconds=60)
    signer_user: str = ""
    front_end_user: str = ""
    worker_user: str = ""
    pairs: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= MAX_PAIRS:
            raise ConfigInvalid(f"pairs: allowed are 1 to {MAX_PAIRS}")
        if not 0 <= self.max_restarts <= 1000:
            raise ConfigInvalid("max_restarts: allowed are 0 to 1000")


@dataclass(frozen=True, slots=True)
class CanaryConfig:
    """`interval` between canary signatures of each backend; 0s: none are made."""

    interval: timedelta = timedelta(0)
    timeout: timedelta = timedelta(seconds=2)

    def __post_init__(self) -> None:
        if self.interval:
            _require_range("interval", self.interval, low="100ms", high="1h")
        _require_range("timeout", self.timeout, low="10ms", high="60s")


@dataclass(frozen=True, slots=True)
class KeyServerConfig:
    """keyserver.toml. `listen` is where agents and the CA call (mTLS); `admin_socket` is for operators on this host."""

    trust_domain: TrustDomain
    state_dir: Path
    admin_socket: Path
    listen: str = "127.0.0.1:8443"
    spiffe_id: SpiffeId | None = None
    signer_config: Path | None = None
    signer_socket: Path | None = None
    callers: Callers = field(default_factory=Callers)
    catalog: CatalogConfig = field(default_factory=CatalogConfig)
    limits: Limits = field(default_factory=Limits)
    keys: KeysConfig = field(default_factory=KeysConfig)
    quarantine: QuarantineConfig = field(default_factory=QuarantineConfig)
    supervisor: SupervisorConfig = field(default_factory=SupervisorConfig)
    canary: CanaryConfig = field(default_factory=CanaryConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    def __post_init__(self) -> None:
        match = _ADDRESS.fullmatch(self.listen)
        if match is None or int(match.group(2)) > 65_535:
            raise ConfigInvalid(f"listen: {self.listen[:64]!r} is not HOST:PORT, for example '0.0.0.0:8443'")
        for name, path in (("admin_socket", self.admin_socket), ("signer_socket", self.signer_socket)):
            if path is not None and len(bytes(path)) > MAX_SOCKET_PATH_BYTES:
                raise ConfigInvalid(f"{name}: a Unix socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes")
        for spiffe_id in (*self.key_admins, *([self.spiffe_id] if self.spiffe_id else [])):
            if not spiffe_id.member_of(self.trust_domain) or spiffe_id.is_trust_domain_id:
                raise ConfigInvalid(f"{spiffe_id} is not a SPIFFE ID with a path in trust domain {self.trust_domain}")

    def of_pair(self, pair: Pair) -> KeyServerConfig:
        """What the front end of this pair goes by. State and catalog are those of all pairs of the host. Raises: ConfigInvalid."""
        metrics = pair.address(self.telemetry.metrics_listen) if self.telemetry.metrics_listen else ""
        return replace(
            self,
            admin_socket=pair.path(self.admin_socket),
            telemetry=replace(self.telemetry, metrics_listen=metrics),
        )

    @property
    def key_admins(self) -> tuple[SpiffeId, ...]:
        return self.callers.key_admins or (SpiffeId(self.trust_domain, "/keyreeve/ca"),)

    @property
    def catalog_url(self) -> URL:
        """Without the password, which is read when the catalog is opened."""
        if self.catalog.url:
            return make_url(self.catalog.url).set(drivername="postgresql+psycopg")
        return URL.create("sqlite", database=str(self.catalog.path or self.state_dir / "catalog.sqlite3"))


def load_keyserver_config(path: Path) -> KeyServerConfig:
    """Raises: ConfigInvalid, which names the file and the key."""
    return load_config(KeyServerConfig, path)


def _check_url(text: str) -> None:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ConfigInvalid("url: is not a URL such as 'postgresql://keyreeve@db.example.org/keyreeve'") from None
    if url.drivername not in _DRIVERS:
        raise ConfigInvalid("url: only postgresql:// is supported here; for SQLite give path")
    if url.password:
        raise ConfigInvalid("url: holds a password; put it in a file of mode 0600 and name that as password_file")


def _require_range(name: str, value: timedelta, *, low: str, high: str) -> None:
    if not parse_duration(low) <= value <= parse_duration(high):
        raise ConfigInvalid(f"{name}: allowed are {low} to {high}")
