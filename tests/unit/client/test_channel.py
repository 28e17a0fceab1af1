from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from keyreeve_client.channel import ReloadingChannel, SvidFiles, TlsIdentity, open_channel, open_sync_channel
from keyreeve_common.errors import FailedPrecondition, SvidInvalid, Unavailable
from keyreeve_common.grpc_edge import (
    ANYONE,
    KEEPALIVE_MS,
    KEEPALIVE_TIMEOUT_MS,
    SERVER_PING_OPTIONS,
    EdgeInterceptor,
    current_peer,
    error_from_rpc,
)
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.v1 import ca_pb2, ca_pb2_grpc
from keyreeve_common.x509_svid import tls_name_of

TD = TrustDomain("example.org")
SERVER_ID = SpiffeId(TD, "/keyreeve/ca")
CLIENT_ID = SpiffeId(TD, "/keyreeve/agent/a")
NOW = datetime.now(UTC)


@dataclass
class Pki:
    """A root that issues leaves the way the CA does."""

    key: ec.EllipticCurvePrivateKey
    root: x509.Certificate

    @classmethod
    def make(cls) -> Pki:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "root")])
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        root = (
            _builder(name, name, key.public_key())
            .add_extension(x509.BasicConstraints(True, None), True)
            .add_extension(usage, True)
            .sign(key, hashes.SHA256())
        )
        return cls(key, root)

    @property
    def bundle_pem(self) -> bytes:
        return self.root.public_bytes(Encoding.PEM)

    def identity(self, spiffe_id: SpiffeId) -> TlsIdentity:
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.UniformResourceIdentifier(str(spiffe_id)), x509.DNSName(tls_name_of(spiffe_id))]
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        leaf = (
            _builder(x509.Name([]), self.root.subject, key.public_key())
            .add_extension(x509.SubjectAlternativeName(names), True)
            .add_extension(x509.BasicConstraints(False, None), True)
            .add_extension(usage, True)
            .add_extension(both, False)
            .sign(self.key, hashes.SHA256())
        )
        key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return TlsIdentity(self.bundle_pem, leaf.public_bytes(Encoding.PEM), key_pem)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(minutes=1))
        .not_valid_after(NOW + timedelta(hours=1))
    )


class EchoHealth(ca_pb2_grpc.HealthServicer):
    async def Check(self, request: Any, context: Any) -> ca_pb2.HealthResponse:
        return ca_pb2.HealthResponse(serving=True, detail=current_peer().name)


class Assigning(ca_pb2_grpc.AgentsServicer):
    """Pushes one state of about 8 MiB, then is silent."""

    async def WatchAssignments(self, request: Any, context: Any) -> AsyncIterator[ca_pb2.Assignments]:
        one = ca_pb2.Assignment(entry_id="e", chain_der=[bytes(2048)])
        yield ca_pb2.Assignments(sequence=1, assignments=[one] * 4096)
        await asyncio.Event().wait()


@dataclass
class Served:
    pki: Pki
    target: str


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    pki = Pki.make()
    identity = pki.identity(SERVER_ID)
    assert identity.key_pem
    assert identity.chain_pem
    edge = EdgeInterceptor(lambda: TD, {"/keyreeve.ca.v1.Health/": (ANYONE,), "/keyreeve.ca.v1.Agents/": (ANYONE,)})
    pings = [("grpc.http2.min_ping_interval_without_data_ms", 500)]  # as SERVER_PING_OPTIONS, for hurried clients
    server = grpc.aio.server(interceptors=[edge], options=pings)
    ca_pb2_grpc.add_AgentsServicer_to_server(Assigning(), server)
    ca_pb2_grpc.add_HealthServicer_to_server(EchoHealth(), server)
    credentials = grpc.ssl_server_credentials(
        [(identity.key_pem, identity.chain_pem)], pki.bundle_pem, require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    yield Served(pki, f"127.0.0.1:{port}")
    await server.stop(0)


async def check(channel: grpc.aio.Channel) -> str:
    stub: Any = ca_pb2_grpc.HealthStub(channel)  # type: ignore[arg-type]
    try:
        return str((await stub.Check(ca_pb2.HealthRequest(), timeout=20)).detail)
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error


async def test_mutual_tls_by_spiffe_id(served: Served) -> None:
    channel = open_channel(served.target, served.pki.identity(CLIENT_ID), server_id=SERVER_ID)
    assert await check(channel) == str(CLIENT_ID)
    await channel.close()


async def test_server_with_another_spiffe_id_is_refused(served: Served) -> None:
    other = SpiffeId(TD, "/keyreeve/keyserver")
    channel = open_channel(served.target, served.pki.identity(CLIENT_ID), server_id=other)
    with pytest.raises(Unavailable):
        await check(channel)
    await channel.close()


async def test_server_of_another_bundle_is_refused(served: Served) -> None:
    channel = open_channel(served.target, Pki.make().identity(CLIENT_ID), server_id=SERVER_ID)
    with pytest.raises(Unavailable):
        await check(channel)
    await channel.close()


async def test_blocking_channel(served: Served) -> None:
    def run() -> str:
        with open_sync_channel(served.target, served.pki.identity(CLIENT_ID), server_id=SERVER_ID) as channel:
            return ca_pb2_grpc.HealthStub(channel).Check(ca_pb2.HealthRequest(), timeout=20).detail

    assert await asyncio.to_thread(run) == str(CLIENT_ID)


async def watch(channel: grpc.aio.Channel) -> Any:
    stub: Any = ca_pb2_grpc.AgentsStub(channel)  # type: ignore[arg-type]
    return stub.WatchAssignments(ca_pb2.WatchAssignmentsRequest())


async def test_a_push_of_thousands_of_assignments_arrives(served: Served) -> None:
    channel = open_channel(served.target, served.pki.identity(CLIENT_ID), server_id=SERVER_ID)
    message = await (await watch(channel)).read()
    assert len(message.assignments) == 4096
    await channel.close()


@dataclass
class Cable:
    """A TCP connection to `target` that can be cut without a word to either end."""

    target: str
    cut: bool = False
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self.target.split(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        self.writers += [writer, far_writer]
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            if not self.cut:
                writer.write(data)


async def test_a_server_that_vanishes_is_missed_by_a_stream_that_only_listens(served: Served) -> None:
    cable = Cable(served.target)
    proxy = await asyncio.start_server(cable.carry, "127.0.0.1", 0)
    target = f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
    channel = open_channel(target, served.pki.identity(CLIENT_ID), server_id=SERVER_ID, keepalive_ms=1_000)
    call = await watch(channel)
    await call.read()
    waiting = asyncio.create_task(call.read())
    await asyncio.sleep(4)  # several pings: the connection is quiet and stays
    assert not waiting.done()
    cable.cut = True
    with pytest.raises(grpc.RpcError):
        await asyncio.wait_for(waiting, KEEPALIVE_TIMEOUT_MS / 1000 + 5)
    await channel.close()
    for writer in cable.writers:
        writer.close()
    proxy.close()


def test_servers_allow_the_pings_that_clients_send() -> None:
    allowed = dict(SERVER_PING_OPTIONS)["grpc.http2.min_ping_interval_without_data_ms"]
    assert allowed * 2 <= KEEPALIVE_MS
    assert 30_000 <= KEEPALIVE_MS + KEEPALIVE_TIMEOUT_MS <= 40_000


def write(files: SvidFiles, identity: TlsIdentity) -> None:
    assert identity.key_pem
    assert identity.chain_pem
    for path, data in (
        (files.key, identity.key_pem),
        (files.chain, identity.chain_pem),
        (files.bundle, identity.bundle_pem),
    ):
        fresh = path.with_suffix(".new")
        fresh.write_bytes(data)
        fresh.replace(path)


@pytest.fixture
def files(tmp_path: Path) -> SvidFiles:
    return SvidFiles(tmp_path / "key.pem", tmp_path / "chain.pem", tmp_path / "bundle.pem")


async def test_channel_is_replaced_when_the_svid_is_renewed(served: Served, files: SvidFiles) -> None:
    write(files, served.pki.identity(CLIENT_ID))
    reloading = ReloadingChannel(served.target, files, server_id=SERVER_ID)
    first = await reloading.current()
    assert await reloading.current() is first
    assert await check(first) == str(CLIENT_ID)
    renewed = SpiffeId(TD, "/keyreeve/agent/renamed")
    write(files, served.pki.identity(renewed))
    second = await reloading.current()
    assert second is not first
    assert await check(second) == str(renewed)
    await reloading.close()
    with pytest.raises(FailedPrecondition):
        await reloading.current()


async def test_half_replaced_files_keep_the_old_channel(served: Served, files: SvidFiles) -> None:
    write(files, served.pki.identity(CLIENT_ID))
    reloading = ReloadingChannel(served.target, files, server_id=SERVER_ID)
    first = await reloading.current()
    fresh = served.pki.identity(CLIENT_ID)
    assert fresh.key_pem
    assert fresh.chain_pem
    files.key.write_bytes(fresh.key_pem)
    assert await reloading.current() is first
    files.chain.write_bytes(fresh.chain_pem)
    assert await reloading.current() is not first
    await reloading.close()


async def test_unusable_files_are_read_and_logged_once(
    served: Served, files: SvidFiles, caplog: pytest.LogCaptureFixture
) -> None:
    write(files, served.pki.identity(CLIENT_ID))
    reloading = ReloadingChannel(served.target, files, server_id=SERVER_ID)
    first = await reloading.current()
    files.chain.write_bytes(b"cut")
    for _ in range(5):
        assert await reloading.current() is first
    assert [record.getMessage() for record in caplog.records].count("svid_reload_failed") == 1
    write(files, served.pki.identity(CLIENT_ID))
    assert await reloading.current() is not first
    await reloading.close()


@pytest.mark.parametrize("damage", ["missing", "cut", "not pem", "foreign key"])
async def test_unusable_files_are_a_typed_error(served: Served, files: SvidFiles, damage: str) -> None:
    identity = served.pki.identity(CLIENT_ID)
    assert identity.key_pem
    write(files, identity)
    match damage:
        case "missing":
            files.key.unlink()
        case "cut":
            files.chain.write_bytes(files.chain.read_bytes()[:100])
        case "not pem":
            files.key.write_text("nonsense")
        case _:
            foreign = served.pki.identity(CLIENT_ID)
            assert foreign.key_pem
            files.key.write_bytes(foreign.key_pem)
    reloading = ReloadingChannel(served.target, files, server_id=SERVER_ID)
    with pytest.raises((FailedPrecondition, SvidInvalid)):
        await reloading.current()
    await reloading.close()


def test_repr_shows_no_key(served: Served) -> None:
    assert "PRIVATE" not in repr(served.pki.identity(CLIENT_ID))
