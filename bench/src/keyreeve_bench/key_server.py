"""The key server under load: real processes with the configuration of a key host, in the benchmark's own folder, on loopback.

Mutual TLS, grants, purpose checks and the audit log are on, as they always are. What differs from docs/operations.md: one supervisor starts
front end and signer as the same user, the keys are software keys unless a part says otherwise, and the folder is thrown away.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from keyreeve_client.channel import SvidFiles, open_sync_local_channel
from keyreeve_client.cli.connections import key_server as admin_stubs
from keyreeve_client.key_admin import KeyAdminClient, KeySpec
from keyreeve_common.errors import FailedPrecondition, Unavailable
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType
from keyreeve_common.v1 import keyserver_pb2, types_pb2

from keyreeve_bench.cpu import tree_seconds
from keyreeve_bench.pki import BenchPki
from keyreeve_bench.process import BenchProcess

TRUST_DOMAIN = TrustDomain("bench.test")
SERVER_ID = SpiffeId(TRUST_DOMAIN, "/keyreeve/keyserver")
PURPOSE = Purpose.TLS13_SERVER_VERIFY
START_PATIENCE_S = 30.0
SOFTWARE = '[[backend]]\nname = "software"\nkind = "software"\n'


@dataclass(frozen=True, slots=True)
class KeyServerSettings:
    """`port` 0: one that is free. `fsync` is the signer's audit.fsync. `backends` are the tables of signer.toml."""

    python: str
    port: int = 0
    fsync: str = "always"
    backends: str = SOFTWARE
    default_backend: str = "software"


@dataclass(frozen=True, slots=True)
class BenchKey:
    key_id: str
    spki_der: bytes


@dataclass(slots=True)
class KeyServer:
    """A running key server; `running` makes and ends one."""

    process: BenchProcess
    directory: Path
    port: int
    pki: BenchPki = field(default_factory=lambda: BenchPki(TRUST_DOMAIN))

    @classmethod
    @contextmanager
    def running(cls, directory: Path, settings: KeyServerSettings) -> Iterator[KeyServer]:
        """Raises: FailedPrecondition for a port in use, Unavailable when it does not start."""
        directory.mkdir(mode=0o700)
        port = _claim_port(settings.port)
        _write_configs(directory, settings, port)
        command: list[str | Path] = [
            settings.python,
            "-m",
            "keyreeve_keyserver",
            "--config",
            directory / "keyserver.toml",
        ]
        with BenchProcess("key server", command, log=directory / "log") as process:
            process.wait_ready(START_PATIENCE_S)
            server = cls(process, directory, port)
            server._install_svid()
            yield server

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def admin_socket(self) -> Path:
        return self.directory / "admin" / "s"

    def cpu_seconds(self) -> float:
        """Processor time of all its processes so far. Raises: Unavailable."""
        self.check()
        return tree_seconds(self.process.pid)

    def check(self) -> None:
        """Raises: Unavailable when it, or one of its processes, has ended since the start."""
        self.process.check()
        if '"process_ended"' in self.process.log.read_text(errors="replace"):
            raise Unavailable("a process of the key server ended during the benchmark; figures would mean nothing")

    def make_agent(self, name: str) -> tuple[SpiffeId, SvidFiles]:
        spiffe_id = SpiffeId(TRUST_DOMAIN, f"/keyreeve/agent/{name}")
        return spiffe_id, self.pki.write_agent(self.directory / f"agent-{name}", spiffe_id)

    def make_keys(
        self, key_type: KeyType, count: int, *, holders: Sequence[SpiffeId], backend: str = ""
    ) -> list[BenchKey]:
        """Keys for handshakes, each granted to all holders."""
        made = []
        with self._admin() as admin:
            for _ in range(count):
                spec = KeySpec(
                    secrets.token_hex(8),
                    key_type,
                    KeyRole.HANDSHAKE,
                    frozenset({PURPOSE}),
                    label="bench",
                    backend=backend,
                )
                key = admin.create_key(spec)
                for holder in holders:
                    admin.create_grant(key.key_id, holder, purposes=frozenset({PURPOSE}), expires_at=None)
                made.append(BenchKey(key.key_id, key.spki_der))
        return made

    def engine(self) -> str:
        """What the software backend says it signs with; `openssl` where the key server does not say."""
        with admin_stubs(self.admin_socket) as stubs:
            health = stubs.health.Check(keyserver_pb2.HealthRequest(), timeout=START_PATIENCE_S)
        named = [str(getattr(backend, "engine", "")) for backend in health.backends]
        return next((name for name in named if name), "openssl")

    def _install_svid(self) -> None:
        authority = self.pki.authority.public_bytes(Encoding.DER)
        with self._admin() as admin:
            csr = x509.load_der_x509_csr(admin.get_csr(SERVER_ID))
            leaf = self.pki.svid(SERVER_ID, csr.public_key())
            bundle = types_pb2.Bundle(trust_domain=TRUST_DOMAIN.name, x509_authorities_der=[authority])
            admin.install_svid([leaf.public_bytes(Encoding.DER)], bundle)

    @contextmanager
    def _admin(self) -> Iterator[KeyAdminClient]:
        with open_sync_local_channel(self.admin_socket) as channel:
            yield KeyAdminClient(channel)


def _claim_port(port: int) -> int:
    """`port`, or a free one for 0. Raises: FailedPrecondition when it cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise FailedPrecondition(f"port {port} of 127.0.0.1 cannot be used: {error.strerror}") from error
        return int(probe.getsockname()[1])


def _write_configs(directory: Path, settings: KeyServerSettings, port: int) -> None:
    (directory / "admin").mkdir(mode=0o700)
    passphrase = directory / "passphrase"
    passphrase.touch(mode=0o600)
    passphrase.write_text(secrets.token_urlsafe(32) + "\n")
    (directory / "signer.toml").write_text(
        f'default_backend = "{settings.default_backend}"\n[sealing]\npassphrase_file = "{passphrase}"\n'
        f'{settings.backends}[audit]\ndirectory = "{directory / "audit"}"\nfsync = "{settings.fsync}"\n'
    )
    (directory / "keyserver.toml").write_text(
        f'trust_domain = "{TRUST_DOMAIN.name}"\nspiffe_id = "{SERVER_ID}"\nlisten = "127.0.0.1:{port}"\n'
        f'admin_socket = "{directory / "admin" / "s"}"\nstate_dir = "{directory / "state"}"\n'
        f'signer_config = "{directory / "signer.toml"}"\n[canary]\ninterval = "15s"\n'
    )
