"""Several real key servers over one PostgreSQL catalog, and load on them through the agent's own KeyCluster, every signature verified."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import grpc
from cryptography.hazmat.primitives.serialization import load_der_public_key
from keyreeve_client.agent.balancer import Settings
from keyreeve_client.agent.key_cluster import KeyCluster
from keyreeve_client.channel import SvidFiles
from keyreeve_common.errors import KeyreeveError
from keyreeve_common.identity import SpiffeId
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.sign_socket import SignFrame
from keyreeve_common.v1 import keyserver_pb2
from keyreeve_common.verification import verify_signature

from keyreeve_testing.keyserver import MESSAGE, KeyServerRig
from keyreeve_testing.pki import Svid, TestPki
from keyreeve_testing.processes import children_of

AGENT = "keyreeve/agent/a"
DEADLINE_MS = 8_000
_PACE_S = 0.01  # between the requests of one caller: replicas must be able to start beside the load


@dataclass
class Cluster:
    """`rigs` share catalog, trust and sealing passphrase; `agent` holds grants for the keys of `add_key`."""

    directory: Path
    rigs: list[KeyServerRig]
    pki: TestPki
    agent: Svid
    keys: dict[str, tuple[KeyId, int, Any]] = field(default_factory=dict)

    message = MESSAGE
    purpose = int(Purpose.TLS13_SERVER_VERIFY)

    def add_key(self, name: str, scheme: int = 0x0403, **request: Any) -> KeyId:
        key = self.rigs[0].create_key(name, **request)
        self.rigs[0].grant(key.key_id, self.agent.spiffe_id)
        return self.take(name, key, scheme)

    def take(self, name: str, key: keyserver_pb2.Key, scheme: int = 0x0403) -> KeyId:
        """Signs with this key from now on as `name`."""
        self.keys[name] = (KeyId(key.key_id), scheme, load_der_public_key(key.spki_der))
        return KeyId(key.key_id)

    def wait_known(self, key_id: str, *, within_s: float = 20) -> None:
        """Until every replica signs with the key: news of the catalog take up to its poll interval."""
        for rig in self.rigs:
            deadline = monotonic() + within_s
            with rig.caller(self.agent) as stubs:
                while True:
                    try:
                        stubs.sign(key_id)
                        break
                    except grpc.RpcError:
                        if monotonic() > deadline:
                            raise
                        sleep(0.05)

    def files(self) -> SvidFiles:
        where = self.directory / "agent"
        where.mkdir(exist_ok=True)
        files = SvidFiles(where / "key.pem", where / "chain.pem", where / "bundle.pem")
        files.key.write_bytes(self.agent.key_pem)
        files.chain.write_bytes(self.agent.chain_pem)
        files.bundle.write_bytes(self.pki.bundle_pem)
        return files

    @asynccontextmanager
    async def client(self, settings: Settings | None = None) -> AsyncIterator[KeyCluster]:
        addresses = tuple(f"127.0.0.1:{rig.port}" for rig in self.rigs)
        server_id = SpiffeId.parse(self.rigs[0].spiffe_id)
        made = KeyCluster(addresses, self.files(), server_id=server_id, settings=settings)
        try:
            yield made
        finally:
            await made.close()

    async def sign(self, client: KeyCluster, name: str, deadline_ms: int = DEADLINE_MS) -> None:
        """One signature, verified. Raises: what the cluster refused with."""
        key_id, scheme, _ = self.keys[name]
        self.verify(name, await client.sign(SignFrame(1, deadline_ms, scheme, self.purpose, key_id, MESSAGE)))

    def verify(self, name: str, signature: bytes) -> None:
        """Raises: Internal."""
        _, scheme, public_key = self.keys[name]
        verify_signature(public_key, SignatureScheme(scheme), MESSAGE, signature=signature)


@dataclass
class Load:
    """What became of the requests so far; `progress` waits until so many more were signed."""

    signed: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    async def progress(self, more: int, *, within_s: float = 60) -> None:
        wanted = self.signed + more
        async with asyncio.timeout(within_s):
            while self.signed < wanted:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def load_on(
    cluster: Cluster, client: KeyCluster, name: str, *, callers: int, deadline_ms: int = DEADLINE_MS
) -> AsyncIterator[Load]:
    """`callers` ask one signature after the other until the end of the block, and then those under way are waited for."""
    load, stop = Load(), asyncio.Event()

    async def call() -> None:
        while not stop.is_set():
            try:
                await cluster.sign(client, name, deadline_ms)
                load.signed += 1
            except KeyreeveError as error:
                load.failures[f"{error.code.value}: {error.detail}"] += 1
            await asyncio.sleep(_PACE_S)

    tasks = [asyncio.create_task(call()) for _ in range(callers)]
    try:
        yield load
    finally:
        stop.set()
        await asyncio.gather(*tasks)


@contextmanager
def stopped(rig: KeyServerRig) -> Iterator[None]:
    """SIGSTOP to supervisor, front end and signer; SIGCONT at the end."""
    pids = [rig.process.pid, *children_of(rig.process.pid)]
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def running_cluster(directory: Path, catalog_url: str, *, count: int = 2, **options: Any) -> Iterator[Cluster]:
    """`count` replicas that serve, with one P-256 key named 'p256'."""
    pki = TestPki()
    rigs = [
        KeyServerRig(directory / f"ks{number}", pki, catalog=f'url = "{catalog_url}"', **options)
        for number in range(count)
    ]
    with ExitStack() as stack:
        for rig in rigs:
            stack.enter_context(rig.running())
        cluster = Cluster(directory, rigs, pki, pki.svid(AGENT))
        cluster.add_key("p256")
        yield cluster
