"""A fake CA and a fake key server (real gRPC over mTLS from the generated stubs, keys held here), and a real agent process."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keyreeve_client.agent.sign_socket_client import SignSocketClient
from keyreeve_common.errors import AgentBanned, JoinTokenInvalid, KeyreeveError, PurposeMismatch
from keyreeve_common.grpc_edge import ANYONE, EdgeInterceptor, current_peer, error_to_proto
from keyreeve_common.identity import TrustDomain
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.v1 import ca_pb2, ca_pb2_grpc, keyserver_pb2, keyserver_pb2_grpc, types_pb2
from keyreeve_testing.pki import Svid, TestPki
from keyreeve_testing.processes import ManagedProcess, free_port

T = TypeVar("T")
TD = "agent.test"
AGENT_PATH = "/keyreeve/agent/node-1"
TOKEN = "token-that-is-good"
MESSAGE = build_tls13_content(Purpose.TLS13_SERVER_VERIFY, b"\x07" * 32)
AGENTS = f"spiffe://{TD}/keyreeve/agent/*"


class LoopThread:
    """An event loop of its own, so that tests can block on processes while the fakes answer."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


def _credentials(svid: Svid, pki: TestPki, *, mutual: bool) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(svid.key_pem, svid.chain_pem)], pki.bundle_pem if mutual else None, require_client_auth=mutual
    )


@dataclass
class FakeCa(ca_pb2_grpc.NodeAttestationServicer, ca_pb2_grpc.AgentsServicer):
    """Serves whatever `push` was given last."""

    pki: TestPki
    threads: LoopThread
    svid_lifetime: timedelta = timedelta(hours=1)
    banned: bool = False
    tokens: set[str] = field(default_factory=lambda: {TOKEN})
    attested: int = 0
    renewed: int = 0
    watchers: int = 0
    port: int = field(default_factory=free_port)
    attest_port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.trust_domain = TD
        self.authorities = list(self.pki.bundle_der)
        self.state = ca_pb2.Assignments(sequence=1, bundle=self.bundle())
        self._changed: set[asyncio.Event] = set()
        self._servers: list[grpc.aio.Server] = []

    def bundle(self) -> types_pb2.Bundle:
        return types_pb2.Bundle(trust_domain=self.trust_domain, x509_authorities_der=self.authorities)

    async def AttestNode(self, request: ca_pb2.AttestNodeRequest, context: Any) -> ca_pb2.AttestNodeResponse:
        if request.join_token.token not in self.tokens:
            raise JoinTokenInvalid("join token is unknown, used or expired")
        self.tokens.discard(request.join_token.token)
        self.attested += 1
        return ca_pb2.AttestNodeResponse(
            spiffe_id=self.pki.spiffe_id(AGENT_PATH), chain_der=self._issue(request.csr_der), bundle=self.bundle()
        )

    async def RenewAgentSvid(
        self, request: ca_pb2.RenewAgentSvidRequest, context: Any
    ) -> ca_pb2.RenewAgentSvidResponse:
        self._check()
        self.renewed += 1
        return ca_pb2.RenewAgentSvidResponse(chain_der=self._issue(request.csr_der))

    async def WatchAssignments(
        self, request: ca_pb2.WatchAssignmentsRequest, context: Any
    ) -> AsyncIterator[ca_pb2.Assignments]:
        changed = asyncio.Event()
        self._changed.add(changed)
        self.watchers += 1
        try:
            while True:
                self._check()
                changed.clear()
                yield self.state
                await changed.wait()
        finally:
            self.watchers -= 1
            self._changed.discard(changed)

    def _check(self) -> None:
        if self.banned:
            raise AgentBanned("agent is banned")

    def _issue(self, csr_der: bytes) -> list[bytes]:
        return self.pki.svid_for_csr(
            csr_der, self.pki.spiffe_id(AGENT_PATH), not_after=datetime.now(UTC) + self.svid_lifetime
        )

    def push(self, *assignments: ca_pb2.Assignment) -> None:
        """Replaces the state and wakes every watcher."""

        async def change() -> None:
            self.state = ca_pb2.Assignments(
                sequence=self.state.sequence + 1, assignments=assignments, bundle=self.bundle()
            )
            for event in self._changed:
                event.set()

        self.threads.run(change())

    def wake(self) -> None:
        self.push(*self.state.assignments)

    def start(self) -> None:
        self.threads.run(self._start())

    def stop(self) -> None:
        self.threads.run(_stop(self._servers))

    async def _start(self) -> None:
        svid = self.pki.svid("/keyreeve/ca")
        attest = _server({"/keyreeve.ca.v1.NodeAttestation/": (ANYONE,)})
        ca_pb2_grpc.add_NodeAttestationServicer_to_server(self, attest)
        attest.add_secure_port(f"127.0.0.1:{self.attest_port}", _credentials(svid, self.pki, mutual=False))
        agents = _server({"/keyreeve.ca.v1.Agents/": (AGENTS,)})
        ca_pb2_grpc.add_AgentsServicer_to_server(self, agents)
        agents.add_secure_port(f"127.0.0.1:{self.port}", _credentials(svid, self.pki, mutual=True))
        self._servers = [attest, agents]
        for server in self._servers:
            await server.start()


def _server(allow: dict[str, tuple[str, ...]]) -> grpc.aio.Server:
    return grpc.aio.server(
        interceptors=[EdgeInterceptor(lambda: TrustDomain(TD), allow)], options=[("grpc.so_reuseport", 0)]
    )


async def _stop(servers: list[grpc.aio.Server]) -> None:
    for server in servers:
        await server.stop(None)
    servers.clear()


@dataclass
class FakeKeyServer(keyserver_pb2_grpc.SigningServicer):
    """Signs with the keys it holds whatever has the purpose of a TLS 1.3 server; `hold` makes it keep answers back."""

    pki: TestPki
    threads: LoopThread
    keys: dict[str, ec.EllipticCurvePrivateKey] = field(default_factory=dict)
    signed: Counter[str] = field(default_factory=Counter)
    purposes: list[int] = field(default_factory=list)
    traces: list[bytes] = field(default_factory=list)
    callers: set[str] = field(default_factory=set)
    port: int = field(default_factory=free_port)
    arrived: queue.Queue[int] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        self._servers: list[grpc.aio.Server] = []
        self._go = asyncio.Event()
        self._go.set()

    async def SignStream(
        self, batches: AsyncIterator[keyserver_pb2.SignBatch], context: Any
    ) -> AsyncIterator[keyserver_pb2.SignResultBatch]:
        self.callers.add(current_peer().name)
        async for batch in batches:
            for item in batch.items:
                self.arrived.put(item.id)
            await self._go.wait()
            yield keyserver_pb2.SignResultBatch(results=[self._answer(item) for item in batch.items])

    def _answer(self, item: keyserver_pb2.SignItem) -> keyserver_pb2.SignResult:
        self.purposes.append(item.purpose)
        self.traces.append(item.trace)
        try:
            if item.purpose != Purpose.TLS13_SERVER_VERIFY:
                raise PurposeMismatch("message does not have the form of its purpose")
            self.signed[item.key_id] += 1
            signature = self.keys[item.key_id].sign(item.message, ec.ECDSA(SHA256()))
            return keyserver_pb2.SignResult(id=item.id, signature=signature)
        except KeyreeveError as error:
            return keyserver_pb2.SignResult(id=item.id, error=error_to_proto(error))

    def hold(self) -> None:
        self.threads.loop.call_soon_threadsafe(self._go.clear)

    def release(self) -> None:
        self.threads.loop.call_soon_threadsafe(self._go.set)

    def start(self) -> None:
        self.threads.run(self._start())

    def stop(self) -> None:
        self.threads.run(_stop(self._servers))

    async def _start(self) -> None:
        server = _server({"/keyreeve.keyserver.v1.Signing/": (AGENTS,)})
        keyserver_pb2_grpc.add_SigningServicer_to_server(self, server)
        credentials = _credentials(self.pki.svid("/keyreeve/keyserver"), self.pki, mutual=True)
        server.add_secure_port(f"127.0.0.1:{self.port}", credentials)
        self._servers = [server]
        await server.start()


@dataclass
class World:
    """Everything around one agent."""

    directory: Path
    pki: TestPki
    ca: FakeCa
    key_server: FakeKeyServer
    run_dir: Path
    processes: list[ManagedProcess] = field(default_factory=list)
    socket_options: str = ""
    extra: str = ""
    more_key_servers: list[FakeKeyServer] = field(default_factory=list)

    @property
    def socket(self) -> Path:
        return self.run_dir / "sign.sock"

    @property
    def state_dir(self) -> Path:
        return self.directory / "state"

    @property
    def token_file(self) -> Path:
        return self.directory / "join-token"

    def add_key_server(self) -> FakeKeyServer:
        """Another replica with the same keys."""
        replica = FakeKeyServer(self.pki, self.key_server.threads, self.key_server.keys)
        replica.start()
        self.more_key_servers.append(replica)
        return replica

    def write_token(self, token: str = TOKEN) -> None:
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(token + "\n")

    def config(self) -> Path:
        path = self.directory / "agent.toml"
        path.write_text(f"""
trust_domain = "{TD}"
bundle_file = "bundle.pem"
join_token_file = "join-token"
state_dir = "state"
drain_timeout = "5s"

[ca]
address = "127.0.0.1:{self.ca.port}"
attest_address = "127.0.0.1:{self.ca.attest_port}"

[key_server]
addresses = {json.dumps([f"127.0.0.1:{server.port}" for server in (self.key_server, *self.more_key_servers)])}

[sign_socket]
path = "{self.socket}"
{self.socket_options}
{self.extra}
""")
        return path

    def add_proxy(self, name: str, path: str, *options: str) -> Path:
        directory = self.directory / "proxies" / name
        self.extra += f"""
[[proxy]]
name = "{name}"
spiffe_id = "{self.pki.spiffe_id(path)}"
directory = "{directory}"
{chr(10).join(options)}
"""
        return directory

    def agent(self) -> ManagedProcess:
        process = ManagedProcess.python_module(
            "keyreeve_client.agent", "--config", self.config(), name="agent", env={"PYTHONWARNINGS": "error"}
        )
        self.processes.append(process)
        return process

    def start(self) -> ManagedProcess:
        if not self.state_dir.exists():
            self.write_token()
        return self.agent().start_ready()

    def client(self) -> SignSocketClient:
        return SignSocketClient(self.socket)

    def status(self) -> Any:
        return json.loads((self.state_dir / "status.json").read_text())

    def assignment(
        self,
        path: str = "/web",
        *,
        key_id: str = "key-web",
        selectors: tuple[str, ...] = (f"uid:{os.geteuid()}",),
        svid: Svid | None = None,
        lifetime: timedelta = timedelta(hours=1),
        **fields: Any,
    ) -> ca_pb2.Assignment:
        """A good assignment unless told otherwise; its key goes to the key server."""
        key = self.key_server.keys.setdefault(key_id, ec.generate_private_key(ec.SECP256R1()))
        svid = svid or self.pki.svid(path, key=key, not_after=datetime.now(UTC) + lifetime)
        spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        values: dict[str, Any] = {
            "entry_id": f"entry-{key_id}",
            "revision": 1,
            "spiffe_id": self.pki.spiffe_id(path),
            "selectors": [ca_pb2.Selector(type="unix", value=value) for value in selectors],
            "key_id": key_id,
            "key_type": types_pb2.KEY_TYPE_EC_P256,
            "spki_der": spki,
            "chain_der": svid.chain_der,
            **fields,
        }
        return ca_pb2.Assignment(**values)

    def sign(self, key_id: str = "key-web", **options: Any) -> bytes:
        """One signature over a connection of its own, verified."""
        with self.client() as client:
            signature = client.sign(
                key_id,
                SignatureScheme.ECDSA_SECP256R1_SHA256,
                Purpose.TLS13_SERVER_VERIFY,
                message=MESSAGE,
                **options,
            )
        self.key_server.keys[key_id].public_key().verify(signature, MESSAGE, ec.ECDSA(SHA256()))
        return signature


@pytest.fixture(scope="session")
def pki() -> TestPki:
    return TestPki(TD)


@pytest.fixture
def world(tmp_path: Path, pki: TestPki) -> Iterator[World]:
    threads = LoopThread()
    run_dir = Path(tempfile.mkdtemp(prefix="keyreeve-"))  # open to all users, unlike tmp_path
    run_dir.chmod(0o755)
    world = World(tmp_path, pki, FakeCa(pki, threads), FakeKeyServer(pki, threads), run_dir)
    (tmp_path / "bundle.pem").write_bytes(pki.bundle_pem)
    world.ca.start()
    world.key_server.start()
    try:
        yield world
    finally:
        for process in world.processes:
            process.close()
        for server in world.more_key_servers:
            server.stop()
        world.key_server.release()
        world.key_server.stop()
        world.ca.stop()
        threads.close()
        shutil.rmtree(run_dir)


@pytest.fixture
def until() -> Callable[..., None]:
    """Waits for a condition that nothing announces."""

    def wait(condition: Callable[[], bool], timeout: float = 15.0) -> None:
        woken = threading.Event()
        for _ in range(int(timeout / 0.02)):
            if condition():
                return
            woken.wait(0.02)
        raise AssertionError("condition did not come true in time")

    return wait
