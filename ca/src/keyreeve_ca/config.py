"""Configuration of the CA: ca.toml, one file, checked whole before anything starts.

Spec: ca/README.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from pathlib import Path

from keyreeve_client.channel import SvidFiles
from keyreeve_common.config import load_config
from keyreeve_common.errors import ConfigInvalid, InvalidRequest
from keyreeve_common.files import read_secret
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.schemes import KeyType
from keyreeve_common.telemetry_config import TelemetryConfig
from keyreeve_common.vault.config import VaultConfig, check_mount, check_vault_name
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from keyreeve_ca.domain.entries import MAX_TTL, RESERVED_PATH
from keyreeve_ca.domain.profiles import AUTHORITY_KEY_TYPES, KEY_SERVER_PATH, AuthorityLives, SvidKind, SvidProfile
from keyreeve_ca.service import Policy

MAX_SOCKET_PATH_BYTES = 107
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})", re.ASCII)


@dataclass(frozen=True, slots=True)
class DatabaseConfig:
    """`url` empty: SQLite at <state_dir>/ca.sqlite3. A PostgreSQL password stands in `password_file` alone."""

    url: str = ""
    password_file: Path | None = None
    busy_timeout: timedelta = timedelta(seconds=5)

    def __post_init__(self) -> None:
        if not timedelta(milliseconds=10) <= self.busy_timeout <= timedelta(minutes=1):
            raise ConfigInvalid("busy_timeout: allowed are 10ms to 1m")
        if not self.url:
            if self.password_file is not None:
                raise ConfigInvalid("password_file: is only for a postgresql url")
            return
        try:
            url = make_url(self.url)
        except (ArgumentError, ValueError):
            raise ConfigInvalid("url: is not a URL such as 'postgresql://keyreeve@db.example.org/keyreeve'") from None
        if url.get_backend_name() not in ("sqlite", "postgresql"):
            raise ConfigInvalid("url: only sqlite:/// and postgresql:// are supported")
        if url.password:
            raise ConfigInvalid("url: holds a password; put it in a file of mode 0600 and name that as password_file")


@dataclass(frozen=True, slots=True)
class KeyClusterConfig:
    """`addresses` in order of preference; `admin_socket` is what `keyreeve init` uses unless told otherwise."""

    addresses: tuple[str, ...]
    spiffe_id: SpiffeId | None = None
    admin_socket: Path = Path("/run/keyreeve-keyserver/admin.sock")

    def __post_init__(self) -> None:
        if not self.addresses:
            raise ConfigInvalid("addresses: at least one is needed")
        for address in self.addresses:
            check_address("addresses", address)


@dataclass(frozen=True, slots=True)
class IssuanceConfig:
    """How long certificates live, and what the authorities' keys are. `backend` empty: the key cluster's default."""

    default_ttl: timedelta = timedelta(hours=1)
    max_ttl: timedelta = timedelta(hours=24)
    agent_ttl: timedelta = timedelta(hours=1)
    service_ttl: timedelta = timedelta(hours=24)
    backdate: timedelta = timedelta(seconds=10)
    issuing_authority_ttl: timedelta = timedelta(days=30)
    root_authority_ttl: timedelta = timedelta(days=3650)
    authority_key_type: KeyType = KeyType.EC_P256
    authority_backend: str = ""
    bundle_refresh_hint: timedelta = timedelta(minutes=5)

    def __post_init__(self) -> None:
        if self.max_ttl > MAX_TTL:
            raise ConfigInvalid("max_ttl: at most 30d")
        if self.authority_key_type not in AUTHORITY_KEY_TYPES:
            raise ConfigInvalid("authority_key_type: ed25519 is refused by the X.509 verifiers of Keyreeve")
        for name in ("agent_ttl", "service_ttl"):
            if not timedelta(seconds=1) <= getattr(self, name) <= MAX_TTL:
                raise ConfigInvalid(f"{name}: allowed are 1s to 30d")


@dataclass(frozen=True, slots=True)
class BackgroundConfig:
    """`interval` between rounds of renewal and rotation; `poll_interval` between looks for other CA instances' changes."""

    interval: timedelta = timedelta(seconds=10)
    poll_interval: timedelta = timedelta(milliseconds=500)

    def __post_init__(self) -> None:
        for name in ("interval", "poll_interval"):
            if not timedelta(milliseconds=10) <= getattr(self, name) <= timedelta(minutes=10):
                raise ConfigInvalid(f"{name}: allowed are 10ms to 10m")


class UpstreamKind(StrEnum):
    VAULT_PKI = "vault_pki"


@dataclass(frozen=True, slots=True, kw_only=True)
class VaultPkiConfig(VaultConfig):
    """`issuer` is the name or id of the issuer in the engine at `mount`; its certificate must be a root."""

    mount: str = "pki"
    issuer: str = "default"

    def __post_init__(self) -> None:
        VaultConfig.__post_init__(self)
        check_mount(self.mount, "mount")
        check_vault_name(self.issuer, "issuer")


@dataclass(frozen=True, slots=True)
class UpstreamConfig:
    """Who signs the issuing authorities, where the root is not in the key cluster."""

    kind: UpstreamKind
    vault: VaultPkiConfig


@dataclass(frozen=True, slots=True)
class CaConfig:
    """ca.toml. `listen` is where agents and admins call (mTLS), `attest_listen` where nodes without SVID do."""

    trust_domain: TrustDomain
    state_dir: Path
    admin_socket: Path
    key_cluster: KeyClusterConfig
    listen: str = "127.0.0.1:8444"
    attest_listen: str = "127.0.0.1:8445"
    bundle_file: Path | None = None
    admins: tuple[SpiffeId, ...] = ()
    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    issuance: IssuanceConfig = field(default_factory=IssuanceConfig)
    background: BackgroundConfig = field(default_factory=BackgroundConfig)
    upstream: UpstreamConfig | None = None
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    def __post_init__(self) -> None:
        check_address("listen", self.listen)
        check_address("attest_listen", self.attest_listen)
        if len(bytes(self.admin_socket)) > MAX_SOCKET_PATH_BYTES:
            raise ConfigInvalid(f"admin_socket: a Unix socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes")
        if not self.key_server_id.path.startswith(RESERVED_PATH + "/"):
            raise ConfigInvalid(f"key_cluster.spiffe_id: the path of a service begins with {RESERVED_PATH}/")
        for admin in (*self.admins, self.key_server_id):
            if not admin.member_of(self.trust_domain) or admin.is_trust_domain_id:
                raise ConfigInvalid(f"{admin} is not a SPIFFE ID with a path in trust domain {self.trust_domain}")
        try:
            self.policy()
        except InvalidRequest as error:
            raise ConfigInvalid(f"issuance: {error.detail}") from error

    @property
    def key_server_id(self) -> SpiffeId:
        return self.key_cluster.spiffe_id or SpiffeId(self.trust_domain, KEY_SERVER_PATH)

    @property
    def svid_files(self) -> SvidFiles:
        """The CA's own SVID: key and chain in one file, so that they are replaced together."""
        svid = self.state_dir / "svid.pem"
        return SvidFiles(key=svid, chain=svid, bundle=self.state_dir / "bundle.pem")

    def database_url(self) -> str:
        """With the password. Raises: ConfigInvalid when its file cannot be read."""
        if not self.database.url:
            return f"sqlite:///{self.state_dir / 'ca.sqlite3'}"
        url = make_url(self.database.url)
        if url.get_backend_name() == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        if self.database.password_file is not None:
            try:
                url = url.set(password=read_secret(self.database.password_file).decode())
            except UnicodeDecodeError:  # its text would show a byte of the password
                raise ConfigInvalid(f"{self.database.password_file}: password is not UTF-8") from None
        return url.render_as_string(hide_password=False)

    def policy(self) -> Policy:
        """Raises: InvalidRequest."""
        chosen = self.issuance
        lives = AuthorityLives(chosen.root_authority_ttl, chosen.issuing_authority_ttl, chosen.backdate)
        return Policy(
            trust_domain=self.trust_domain,
            workload=SvidProfile(SvidKind.WORKLOAD, chosen.default_ttl, chosen.max_ttl, chosen.backdate),
            agent=SvidProfile(SvidKind.AGENT, chosen.agent_ttl, chosen.agent_ttl, chosen.backdate),
            service=SvidProfile(SvidKind.SERVICE, chosen.service_ttl, chosen.service_ttl, chosen.backdate),
            lives=lives,
            authority_key_type=chosen.authority_key_type,
            authority_backend=chosen.authority_backend,
            refresh_hint=chosen.bundle_refresh_hint,
        )


def load_ca_config(path: Path) -> CaConfig:
    """Raises: ConfigInvalid, which names the file and the key."""
    return load_config(CaConfig, path)


def check_address(name: str, text: str) -> None:
    """Raises: ConfigInvalid."""
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match.group(2)) > 65_535:
        raise ConfigInvalid(f"{name}: {text[:64]!r} is not HOST:PORT, for example '0.0.0.0:8444'")
