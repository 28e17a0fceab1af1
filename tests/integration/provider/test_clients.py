"""Programs that are handed a reference instead of a private key: Python's ssl on both sides, curl, openssl(1)."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fake_agent import FakeAgent
from keyreeve_common.purposes import Purpose
from keyreeve_testing.processes import free_port
from nginx_server import Nginx
from provider_support import (
    Authority,
    Identity,
    environment,
    handshake,
    running,
    wait_until,
    write_openssl_conf,
)

KINDS = ["ec-p256", "ec-p384", "rsa-2048", "ed25519"]
DIGESTS = {"ec-p256": hashes.SHA256(), "ec-p384": hashes.SHA384(), "rsa-2048": hashes.SHA256()}
PYTHON_SERVER = """
import json, socket, ssl, sys
settings = json.loads(sys.argv[1])
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.minimum_version = ssl.TLSVersion.TLSv1_3
context.load_cert_chain(settings["certificate"], settings["key"])
if settings["client_ca"]:
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(settings["client_ca"])
listener = socket.create_server(("127.0.0.1", settings["port"]))
print("ready", flush=True)
while True:
    raw, _ = listener.accept()
    try:
        with context.wrap_socket(raw, server_side=True) as tls:
            tls.recv(4096)
            who = dict(field[0] for field in (tls.getpeercert() or {}).get("subject", ()))
            tls.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\nserved to " + who.get("commonName", "anybody").encode())
    except OSError as error:
        print(error, flush=True)
"""
PYTHON_CLIENT = """
import json, socket, ssl, sys
settings = json.loads(sys.argv[1])
context = ssl.create_default_context(cafile=settings["ca"])
context.load_cert_chain(settings["certificate"], settings["key"])
with socket.create_connection(("127.0.0.1", settings["port"])) as raw:
    with context.wrap_socket(raw, server_hostname="localhost") as tls:
        tls.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
        print(tls.recv(4096).decode())
"""


def server_command(identity: Identity, port: int, client_ca: Path | None = None) -> list[str]:
    settings = {
        "certificate": str(identity.certificate_file),
        "key": str(identity.reference_file),
        "port": port,
        "client_ca": str(client_ca) if client_ca else "",
    }
    return [sys.executable, "-c", PYTHON_SERVER, json.dumps(settings)]


def openssl(env: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["openssl", *map(str, arguments)],
        env=env,
        capture_output=True,
        timeout=30,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_python_serves_and_asks_for_client_certificates(
    kind: str,
    work: Path,
    env: dict[str, str],
    agent: FakeAgent,
    authority: Authority,
    identity_of: Callable[[str], Identity],
) -> None:
    identity = identity_of(kind)
    port, log, ca = free_port(), work / "server.log", work / "ca.pem"
    ca.write_text(authority.pem)
    settings = {
        "ca": str(ca),
        "certificate": str(identity.certificate_file),
        "key": str(identity.reference_file),
        "port": port,
    }
    with running(server_command(identity, port, ca), log=log, env=env):
        wait_until(lambda: "ready" in log.read_text(), "the Python server")
        python = subprocess.run(
            [sys.executable, "-c", PYTHON_CLIENT, json.dumps(settings)],
            env=env, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert "served to localhost" in python.stdout, python.stderr
        curl = subprocess.run(
            ["curl", "--silent", "--show-error", "--noproxy", "*", "--cacert", str(ca),
             "--cert", str(identity.certificate_file), "--key", str(identity.reference_file),
             f"https://localhost:{port}/"],
            env=env, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert "served to localhost" in curl.stdout, curl.stderr
    purposes = [request.purpose for request in agent.requests]
    assert sorted(purposes) == [Purpose.TLS13_SERVER_VERIFY] * 2 + [Purpose.TLS13_CLIENT_VERIFY] * 2


def test_the_configured_socket_overrides_that_of_the_reference(
    work: Path, agent: FakeAgent, authority: Authority, identity_of: Callable[[str], Identity]
) -> None:
    agent.stop()
    identity = identity_of("ec-p256")
    port, log = free_port(), work / "server.log"
    elsewhere = work / "elsewhere.sock"
    conf = write_openssl_conf(work / "elsewhere.cnf", socket=elsewhere)
    with (
        FakeAgent(elsewhere, agent.keys) as other,
        running(server_command(identity, port), log=log, env=environment(conf)),
    ):
        wait_until(lambda: "ready" in log.read_text(), "the Python server")
        assert b"served to anybody" in handshake(port, authority)
        assert len(other.requests) == 1


@pytest.mark.parametrize(
    "setting",
    [
        {"deadline_ms": "0"},
        {"deadline_ms": "soon"},
        {"deadline_ms": "60001"},
        {"socket": "sign.sock"},
        {"verify": "never"},
    ],
)
def test_a_wrong_setting_is_named(work: Path, setting: dict[str, str], identity_of: Callable[[str], Identity]) -> None:
    """libcrypto drops a provider that does not load without a word, so it loads and refuses references."""
    env = environment(write_openssl_conf(work / "wrong.cnf", **setting))
    result = Nginx(work, identity_of("ec-p256"), env).check()
    assert result.returncode != 0
    assert "provider configuration is invalid" in result.stderr
    assert next(iter(setting)) in result.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_openssl_reads_every_envelope_and_never_writes_a_private_key(
    kind: str, work: Path, env: dict[str, str], agent: FakeAgent, identity_of: Callable[[str], Identity]
) -> None:
    identity = identity_of(kind)
    expected = identity.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (work / "reference.der").write_bytes(identity.reference.to_der())
    (work / "reference.p8").write_bytes(identity.reference.to_pkcs8_der())
    for file in (identity.reference_file, work / "reference.der", work / "reference.p8"):
        result = openssl(env, "pkey", "-in", file, "-pubout")
        assert result.stdout == expected, result.stderr
        result = openssl(env, "pkey", "-in", file)
        assert result.returncode != 0
        assert result.stdout == b""
    assert not agent.requests


@pytest.mark.parametrize("kind", KINDS)
def test_openssl_req_reaches_the_agent_as_a_certificate_request(
    kind: str, env: dict[str, str], agent: FakeAgent, identity_of: Callable[[str], Identity]
) -> None:
    result = openssl(env, "req", "-new", "-verify", "-key", identity_of(kind).reference_file, "-subj", "/CN=test")
    assert result.returncode == 0, result.stderr
    assert b"verify OK" in result.stderr
    assert x509.load_pem_x509_csr(result.stdout).is_signature_valid
    assert [request.purpose for request in agent.requests] == [Purpose.CERTIFICATE_REQUEST]


@pytest.mark.parametrize("salt", ["digest", "-1", "32"])
def test_openssl_req_with_pss(
    salt: str, env: dict[str, str], agent: FakeAgent, identity_of: Callable[[str], Identity]
) -> None:
    options = ["-sigopt", "rsa_padding_mode:pss", "-sigopt", f"rsa_pss_saltlen:{salt}", "-verify"]
    result = openssl(env, "req", "-new", "-key", identity_of("rsa-2048").reference_file, "-subj", "/CN=test", *options)
    assert result.returncode == 0, result.stderr
    assert b"verify OK" in result.stderr
    assert x509.load_pem_x509_csr(result.stdout).is_signature_valid
    assert [request.scheme for request in agent.requests] == [0x0804]


@pytest.mark.parametrize("kind", ["ec-p256", "ec-p384", "rsa-2048"])
def test_openssl_dgst_goes_out_without_a_purpose(
    kind: str, work: Path, env: dict[str, str], agent: FakeAgent, identity_of: Callable[[str], Identity]
) -> None:
    identity = identity_of(kind)
    message = work / "message"
    message.write_bytes(b"whatever" * 1000)
    result = openssl(env, "dgst", "-sign", identity.reference_file, message)
    assert result.returncode == 0, result.stderr
    assert [(request.purpose, request.message) for request in agent.requests] == [(0, message.read_bytes())]
    public_key = identity.key.public_key()
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        public_key.verify(result.stdout, message.read_bytes(), ec.ECDSA(DIGESTS[kind]))
    else:
        public_key.verify(result.stdout, message.read_bytes(), padding.PKCS1v15(), DIGESTS[kind])


def test_ed25519_signs_in_one_shot(
    work: Path, env: dict[str, str], agent: FakeAgent, identity_of: Callable[[str], Identity]
) -> None:
    identity = identity_of("ed25519")
    message = work / "message"
    message.write_bytes(b"whatever")
    result = openssl(env, "pkeyutl", "-sign", "-rawin", "-inkey", identity.reference_file, "-in", message)
    assert result.returncode == 0, result.stderr
    assert isinstance(identity.key, ed25519.Ed25519PrivateKey)
    identity.key.public_key().verify(result.stdout, b"whatever")
    with pytest.raises(InvalidSignature):
        identity.key.public_key().verify(result.stdout, b"something else")


def test_what_has_no_scheme_never_reaches_the_agent(
    work: Path, env: dict[str, str], agent: FakeAgent, identity_of: Callable[[str], Identity]
) -> None:
    message = work / "message"
    message.write_bytes(b"x" * 32)
    p256, rsa = identity_of("ec-p256").reference_file, identity_of("rsa-2048").reference_file
    no_scheme = [
        ("dgst", "-sha1", "-sign", p256, message),
        ("dgst", "-sha512", "-sign", p256, message),
        ("dgst", "-sha256", "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:20", "-sign", rsa, message),
    ]
    for arguments in no_scheme:
        result = openssl(env, *arguments)
        assert result.returncode != 0
        assert b"no TLS signature scheme" in result.stderr, arguments
    for key in (p256, rsa):
        result = openssl(env, "pkeyutl", "-sign", "-inkey", key, "-in", message)
        assert result.returncode != 0, "a bare digest was signed"
    message.write_bytes(b"x" * 65_537)
    result = openssl(env, "dgst", "-sign", p256, message)
    assert b"message is too large" in result.stderr
    assert not agent.requests


def test_software_keys_keep_working(work: Path, env: dict[str, str], agent: FakeAgent) -> None:
    key, message = work / "software.key", work / "message"
    message.write_bytes(b"whatever")
    for options in (["EC", "-pkeyopt", "ec_paramgen_curve:P-256"], ["RSA"], ["ED25519"]):
        assert openssl(env, "genpkey", "-algorithm", *options, "-out", key).returncode == 0
        result = openssl(env, "req", "-new", "-x509", "-key", key, "-subj", "/CN=test")
        assert result.returncode == 0, result.stderr
    assert not agent.requests


def test_a_point_off_the_curve_is_refused(
    env: dict[str, str], work: Path, identity_of: Callable[[str], Identity]
) -> None:
    """The reference's own parser is free of arithmetic: libcrypto checks the point when the key is made of it."""
    der = bytearray(identity_of("ec-p256").reference.to_der())
    der[-1] ^= 1
    (work / "off.der").write_bytes(der)
    result = openssl(env, "pkey", "-in", work / "off.der", "-pubout")
    assert result.returncode != 0
    assert result.stdout == b""
    body = base64.encodebytes(der).decode()
    reference = work / "off.key"
    reference.write_text(f"-----BEGIN KEYREEVE KEY REFERENCE-----\n{body}-----END KEYREEVE KEY REFERENCE-----\n")
    result = openssl(env, "req", "-new", "-key", reference, "-subj", "/CN=test")
    assert result.returncode != 0
    assert result.stdout == b""
