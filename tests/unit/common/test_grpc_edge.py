"""The gRPC edge over real mTLS on loopback: who the peer is, what it may call, how errors travel."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from keyreeve_common.errors import (
    ForeignTrustDomain,
    Internal,
    KeyNotFound,
    KeyreeveError,
    PermissionDenied,
    RateLimited,
    SvidExpired,
    SvidInvalid,
    Unauthenticated,
    Unavailable,
)
from keyreeve_common.grpc_edge import (
    ANYONE,
    ERROR_CODE_TRAILER,
    LOCAL,
    RETRY_AFTER_TRAILER,
    EdgeInterceptor,
    current_peer,
    error_from_rpc,
    error_from_trailers,
)
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.v1 import keyserver_pb2, keyserver_pb2_grpc
from keyreeve_common.x509_svid import tls_name_of

NOW = datetime.now(UTC)
SERVER = SpiffeId.parse("spiffe://demo.test/keyreeve/keyserver")
AGENT = "spiffe://demo.test/keyreeve/agent/one"
CA = "spiffe://demo.test/keyreeve/ca"


@dataclass
class Authority:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def issue(self, uri: str, *, ca: bool = False, dns: str | None = None) -> tuple[bytes, bytes]:
        """PEM of a leaf's key and chain."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri)]
        if dns:
            names.append(x509.DNSName(dns))
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - timedelta(minutes=1))
            .not_valid_after(NOW + timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(_usage(ca=ca), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return (
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            certificate.public_bytes(Encoding.PEM),
        )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


@pytest.fixture(scope="module")
def authority() -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test root")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(key, certificate)


class Servicer(keyserver_pb2_grpc.SigningServicer):
    """Answers with who it sees, or with the error that the key id asks for."""

    async def Sign(self, request: keyserver_pb2.SignRequest, context: object) -> keyserver_pb2.SignResponse:
        del context
        errors: dict[str, Exception] = {
            "missing": KeyNotFound(),
            "limited": RateLimited("slow down", retry_after=timedelta(milliseconds=1500)),
            "bug": ZeroDivisionError("secret internal text"),
        }
        if request.key_id in errors:
            raise errors[request.key_id]
        return keyserver_pb2.SignResponse(signature=current_peer().name.encode())

    async def SignStream(
        self, request_iterator: AsyncIterator[keyserver_pb2.SignBatch], context: object
    ) -> AsyncIterator[keyserver_pb2.SignResultBatch]:
        del context
        async for batch in request_iterator:
            if batch.items[0].key_id == "bug":
                raise ZeroDivisionError("secret internal text")
            yield keyserver_pb2.SignResultBatch(
                results=[keyserver_pb2.SignResult(id=1, signature=current_peer().name.encode())]
            )


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@asynccontextmanager
async def serving(
    authority: Authority, tmp_path: Path, allow: Mapping[str, tuple[str, ...]], clock: Clock | None = None
) -> AsyncIterator[tuple[str, str]]:
    server = grpc.aio.server(interceptors=[EdgeInterceptor(lambda: TrustDomain("demo.test"), allow, clock or Clock())])
    keyserver_pb2_grpc.add_SigningServicer_to_server(Servicer(), server)
    root = authority.certificate.public_bytes(Encoding.PEM)
    pair = authority.issue(str(SERVER), dns=tls_name_of(SERVER))
    credentials = grpc.ssl_server_credentials([pair], root_certificates=root, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    local = f"unix:{tmp_path}/admin.sock"
    server.add_insecure_port(local)
    await server.start()
    try:
        yield f"127.0.0.1:{port}", local
    finally:
        await server.stop(None)


@asynccontextmanager
async def calling(
    authority: Authority, target: str, pair: tuple[bytes, bytes], expected: SpiffeId = SERVER
) -> AsyncIterator[keyserver_pb2_grpc.SigningAsyncStub]:
    root = authority.certificate.public_bytes(Encoding.PEM)
    credentials = grpc.ssl_channel_credentials(root, *pair)
    options = [("grpc.ssl_target_name_override", tls_name_of(expected))]
    async with grpc.aio.secure_channel(target, credentials, options=options) as channel:
        yield keyserver_pb2_grpc.SigningStub(channel)


ALLOW_AGENTS = {"/keyreeve.keyserver.v1.Signing/": ("spiffe://demo.test/keyreeve/agent/*",)}


async def sign_error(stub: keyserver_pb2_grpc.SigningAsyncStub, key_id: str = "k") -> KeyreeveError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Sign(keyserver_pb2.SignRequest(key_id=key_id), timeout=20)
    return error_from_rpc(caught.value)


async def test_peer_is_named_by_its_spiffe_id(authority: Authority, tmp_path: Path) -> None:
    async with (
        serving(authority, tmp_path, ALLOW_AGENTS) as (target, _),
        calling(authority, target, authority.issue(AGENT)) as stub,
    ):
        answer = await stub.Sign(keyserver_pb2.SignRequest(key_id="k"), timeout=20)
        assert answer.signature.decode() == AGENT


async def test_caller_outside_the_table_is_refused(authority: Authority, tmp_path: Path) -> None:
    async with (
        serving(authority, tmp_path, ALLOW_AGENTS) as (target, _),
        calling(authority, target, authority.issue(CA)) as stub,
    ):
        error = await sign_error(stub)
    assert isinstance(error, PermissionDenied)
    assert error.detail == f"{CA} may not call Sign"


async def test_method_that_no_table_line_names_is_refused(authority: Authority, tmp_path: Path) -> None:
    async with (
        serving(authority, tmp_path, {}) as (target, _),
        calling(authority, target, authority.issue(AGENT)) as stub,
    ):
        assert isinstance(await sign_error(stub), PermissionDenied)


async def test_x5_07_ca_certificate_as_peer_leaf_is_refused(authority: Authority, tmp_path: Path) -> None:
    async with serving(authority, tmp_path, ALLOW_AGENTS) as (target, _):
        async with calling(authority, target, authority.issue(AGENT, ca=True)) as stub:
            error = await sign_error(stub)
    assert isinstance(error, SvidInvalid)
    assert "X5-17" in error.detail


async def test_svid_of_another_trust_domain_is_refused(authority: Authority, tmp_path: Path) -> None:
    async with serving(authority, tmp_path, ALLOW_AGENTS) as (target, _):
        async with calling(authority, target, authority.issue("spiffe://other.test/keyreeve/agent/one")) as stub:
            assert isinstance(await sign_error(stub), ForeignTrustDomain)


async def test_svid_that_expires_while_the_connection_stands_is_refused(authority: Authority, tmp_path: Path) -> None:
    clock = Clock()
    async with (
        serving(authority, tmp_path, ALLOW_AGENTS, clock) as (target, _),
        calling(authority, target, authority.issue(AGENT)) as stub,
    ):
        await stub.Sign(keyserver_pb2.SignRequest(key_id="k"), timeout=20)
        clock.now = NOW + timedelta(hours=2)
        assert isinstance(await sign_error(stub), SvidExpired)


async def test_client_refuses_a_server_of_another_spiffe_id(authority: Authority, tmp_path: Path) -> None:
    other = SpiffeId.parse("spiffe://demo.test/keyreeve/ca")
    async with serving(authority, tmp_path, ALLOW_AGENTS) as (target, _):
        async with calling(authority, target, authority.issue(AGENT), expected=other) as stub:
            assert isinstance(await sign_error(stub), Unavailable)


async def test_local_peer_needs_local_in_the_table(authority: Authority, tmp_path: Path) -> None:
    allow = {"/keyreeve.keyserver.v1.Signing/Sign": (LOCAL,)}
    async with serving(authority, tmp_path, allow) as (_, local), grpc.aio.insecure_channel(local) as channel:
        stub: keyserver_pb2_grpc.SigningAsyncStub = keyserver_pb2_grpc.SigningStub(channel)
        answer = await stub.Sign(keyserver_pb2.SignRequest(key_id="k"), timeout=20)
        assert answer.signature == b"local"
    async with serving(authority, tmp_path, ALLOW_AGENTS) as (_, local), grpc.aio.insecure_channel(local) as channel:
        stub = keyserver_pb2_grpc.SigningStub(channel)
        assert isinstance(await sign_error(stub), Unauthenticated)


@pytest.mark.parametrize(
    ("key_id", "kind", "detail", "retry"),
    [
        ("missing", KeyNotFound, "no such key, or no grant for this caller", None),
        ("limited", RateLimited, "slow down", timedelta(milliseconds=1500)),
        ("bug", Internal, "internal error; the server's log has the cause", None),
    ],
)
async def test_errors_travel_as_the_same_class(
    authority: Authority, tmp_path: Path, key_id: str, kind: type[KeyreeveError], detail: str, retry: timedelta | None
) -> None:
    allow = {"/keyreeve.keyserver.v1.Signing/": (ANYONE,)}
    async with serving(authority, tmp_path, allow) as (_, local), grpc.aio.insecure_channel(local) as channel:
        stub: keyserver_pb2_grpc.SigningAsyncStub = keyserver_pb2_grpc.SigningStub(channel)
        error = await sign_error(stub, key_id)
    assert type(error) is kind
    assert error.detail == detail
    assert error.retry_after == retry


async def test_stream_is_held_to_the_table_and_renders_errors(authority: Authority, tmp_path: Path) -> None:
    def batches(key_id: str) -> Iterator[keyserver_pb2.SignBatch]:
        yield keyserver_pb2.SignBatch(items=[keyserver_pb2.SignItem(id=1, key_id=key_id)])

    async with serving(authority, tmp_path, ALLOW_AGENTS) as (target, _):
        async with calling(authority, target, authority.issue(AGENT)) as stub:
            answers = [answer async for answer in stub.SignStream(batches("k"), timeout=20)]
            assert answers[0].results[0].signature.decode() == AGENT
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [answer async for answer in stub.SignStream(batches("bug"), timeout=20)]
            assert isinstance(error_from_rpc(caught.value), Internal)
            assert "secret" not in str(caught.value.details())
        async with calling(authority, target, authority.issue(CA)) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [answer async for answer in stub.SignStream(batches("k"), timeout=20)]
            assert isinstance(error_from_rpc(caught.value), PermissionDenied)


@pytest.mark.parametrize(
    ("text", "retry_ms"), [("250", 250), ("soon", None), ("-1", None), ("9" * 30, None), ("", None)]
)
def test_nonsense_in_a_trailer_is_no_crash(text: str, retry_ms: int | None) -> None:
    error = error_from_trailers(((ERROR_CODE_TRAILER, "rate_limited"), (RETRY_AFTER_TRAILER, text)), "later")
    assert isinstance(error, RateLimited)
    assert error.retry_after == (None if retry_ms is None else timedelta(milliseconds=retry_ms))
    assert error_from_trailers(None, "later") is None
