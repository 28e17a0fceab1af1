"""A real CA in front of a real key server, brought to life by the real `keyreeve init`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from keyreeve_client.channel import TlsIdentity, open_sync_channel, open_sync_local_channel
from keyreeve_common.grpc_edge import error_from_rpc
from keyreeve_common.identity import SpiffeId
from keyreeve_common.v1 import ca_pb2, ca_pb2_grpc
from keyreeve_testing.keyserver import KeyServerRig
from keyreeve_testing.processes import ManagedProcess, free_port

CA_ID = SpiffeId.parse("spiffe://example.org/keyreeve/ca")


class CaStubs:
    """All services over one channel; failures are Keyreeve's own errors."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.attestation = Raising(ca_pb2_grpc.NodeAttestationStub(channel))
        self.agents = ca_pb2_grpc.AgentsStub(channel)
        self.entries = Raising(ca_pb2_grpc.EntriesStub(channel))
        self.nodes = Raising(ca_pb2_grpc.NodesStub(channel))
        self.svids = Raising(ca_pb2_grpc.SvidsStub(channel))
        self.authorities = Raising(ca_pb2_grpc.AuthoritiesStub(channel))
        self.health = Raising(ca_pb2_grpc.HealthStub(channel))


class Raising:
    def __init__(self, stub: Any) -> None:
        self._stub = stub

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._stub, name)

        def call(request: Any) -> Any:
            try:
                return method(request, timeout=30)
            except grpc.RpcError as error:
                raise error_from_rpc(error) from error

        return call


@dataclass
class Node:
    """An agent's side: its identity after attestation."""

    spiffe_id: str
    identity: TlsIdentity
    chain: list[x509.Certificate]


def make_csr() -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return key, csr.public_bytes(Encoding.DER)


@dataclass
class CaRig:
    directory: Path
    key_server: KeyServerRig
    issuance: str = ""
    background: str = 'interval = "200ms"\npoll_interval = "50ms"'
    database: str = ""
    extra: str = ""
    process: ManagedProcess = field(init=False)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.port, self.attest_port = free_port(), free_port()
        self.config = self.directory / "ca.toml"
        self.write_config()
        self.process = self.new_process()

    def new_process(self) -> ManagedProcess:
        return ManagedProcess.python_module(
            "keyreeve_ca", "--config", self.config, name="ca", log_path=self.directory / "log"
        )

    @property
    def admin_socket(self) -> Path:
        return self.directory / "run" / "admin.sock"

    @property
    def bundle_pem(self) -> bytes:
        return (self.directory / "agents" / "bundle.pem").read_bytes()

    def write_config(self) -> None:
        self.config.write_text(
            f'trust_domain = "example.org"\nstate_dir = "state"\nadmin_socket = "run/admin.sock"\n'
            f'listen = "127.0.0.1:{self.port}"\nattest_listen = "127.0.0.1:{self.attest_port}"\n'
            f'bundle_file = "agents/bundle.pem"\nadmins = ["spiffe://example.org/ops/alice"]\n'
            f'[key_cluster]\naddresses = ["127.0.0.1:{self.key_server.port}"]\n'
            f'admin_socket = "{self.key_server.admin_socket}"\n'
            f"[database]\n{self.database}\n[issuance]\n{self.issuance}\n[background]\n{self.background}\n{self.extra}\n"
        )

    def init(self, *, check: bool = True) -> tuple[int, list[dict[str, str]], str]:
        """The real command; its exit code, its report, its stderr."""
        done = subprocess.run(
            [sys.executable, "-m", "keyreeve_client.cli", "init", "--config", str(self.config), "--output", "json"],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ},
        )
        assert not check or done.returncode == 0, done.stderr
        return done.returncode, json.loads(done.stdout or "[]"), done.stderr

    @contextmanager
    def running(self) -> Iterator[CaRig]:
        with self.process:
            self.process.start_ready()
            yield self

    @contextmanager
    def local(self) -> Iterator[CaStubs]:
        with open_sync_local_channel(self.admin_socket) as channel:
            yield CaStubs(channel)

    @contextmanager
    def caller(self, identity: TlsIdentity, port: int | None = None) -> Iterator[CaStubs]:
        with open_sync_channel(f"127.0.0.1:{port or self.port}", identity, server_id=CA_ID) as channel:
            yield CaStubs(channel)

    def join_token(self, agent_id: str = "spiffe://example.org/keyreeve/agent/n1") -> str:
        with self.local() as local:
            return str(local.nodes.CreateJoinToken(ca_pb2.CreateJoinTokenRequest(agent_id=agent_id)).token)

    def attest(self, token: str) -> Node:
        key, csr_der = make_csr()
        with self.caller(TlsIdentity(self.bundle_pem), self.attest_port) as stubs:
            request = ca_pb2.AttestNodeRequest(csr_der=csr_der, agent_version="test")
            request.join_token.token = token
            answer = stubs.attestation.AttestNode(request)
        chain = [x509.load_der_x509_certificate(der) for der in answer.chain_der]
        key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        chain_pem = b"".join(each.public_bytes(Encoding.PEM) for each in chain)
        return Node(answer.spiffe_id, TlsIdentity(self.bundle_pem, chain_pem, key_pem), chain)

    def node(self, name: str = "n1") -> Node:
        return self.attest(self.join_token(f"spiffe://example.org/keyreeve/agent/{name}"))


@pytest.fixture
def key_server(tmp_path: Path) -> Iterator[KeyServerRig]:
    rig = KeyServerRig(tmp_path / "ks")
    with rig.running(initialised=False):
        yield rig


@pytest.fixture
def ca(tmp_path: Path, key_server: KeyServerRig) -> Iterator[CaRig]:
    rig = CaRig(tmp_path / "ca", key_server)
    rig.init()
    with rig.running():
        yield rig


@pytest.fixture
def new_ca() -> type[CaRig]:
    """For tests that hold the ceremony themselves."""
    return CaRig
