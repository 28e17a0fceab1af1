"""What the provider's tests share: keys and certificates, configuration files, processes that are always ended."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from fake_agent import PrivateKey
from keyreeve_common.key_id import KeyId
from keyreeve_common.key_reference import KeyReference

REPOSITORY = Path(__file__).resolve().parents[3]
PROVIDER_DIR = Path(os.environ.get("KEYREEVE_PROVIDER_DIR", REPOSITORY / "client/openssl-provider/build"))
PROVIDER = PROVIDER_DIR / "keyreeve.so"
PATIENCE_SECONDS = 20.0
KEY_MAKERS: dict[str, Callable[[], PrivateKey]] = {
    "ec-p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ec-p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "rsa-2048": lambda: rsa.generate_private_key(65537, 2048),
    "rsa-3072": lambda: rsa.generate_private_key(65537, 3072),
    "rsa-4096": lambda: rsa.generate_private_key(65537, 4096),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


@dataclass(frozen=True)
class Authority:
    """A CA of the test run, in memory."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(Encoding.PEM).decode()

    def issue(self, key: PrivateKey, common_name: str = "localhost") -> str:
        """A certificate for 127.0.0.1 and this key, as PEM."""
        return (
            _builder(common_name, self.certificate.subject)
            .public_key(key.public_key())
            .add_extension(
                x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))]),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
            .public_bytes(Encoding.PEM)
            .decode()
        )


def make_authority() -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    certificate = (
        _builder("test authority", name)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Authority(key, certificate)


def _builder(common_name: str, issuer: x509.Name) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .issuer_name(issuer)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
    )


@dataclass(frozen=True)
class Identity:
    """A key that only the fake agent holds, and the files that a program gets instead."""

    key_id: KeyId
    key: PrivateKey
    reference: KeyReference
    reference_file: Path
    certificate_file: Path


def make_identity(directory: Path, agent_socket: Path, authority: Authority, kind: str) -> Identity:
    key = KEY_MAKERS[kind]()
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    key_id = KeyId(f"k-{kind}")
    reference = KeyReference(key_id, str(agent_socket), spki)
    reference_file = directory / f"{kind}.key"
    reference_file.write_text(reference.to_pem())
    certificate_file = directory / f"{kind}.crt"
    certificate_file.write_text(authority.issue(key))
    return Identity(key_id, key, reference, reference_file, certificate_file)


def write_openssl_conf(path: Path, **settings: object) -> Path:
    """An openssl.cnf that activates the default provider first, then ours."""
    lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
    path.write_text(
        "openssl_conf = init\n"
        "[init]\nproviders = providers\n"
        "[providers]\ndefault = default_provider\nkeyreeve = keyreeve_provider\n"
        "[default_provider]\nactivate = 1\n"
        f"[keyreeve_provider]\nmodule = {PROVIDER}\nactivate = 1\n{lines}"
        "[req]\ndistinguished_name = name\n[name]\n"
    )
    return path


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Polls: for what other processes do, which nothing here can be told of."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.01)


def accepts(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def handshake(port: int, authority: Authority, *, maximum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> bytes:
    """One full handshake and one request; the reply. Raises: OSError (of which ssl.SSLError is one)."""
    context = ssl.create_default_context(cadata=authority.pem)
    context.maximum_version = maximum
    with (
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as tls,
    ):
        tls.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
        reply = b""
        while data := tls.recv(4096):
            reply += data
        return reply


@contextmanager
def running(command: list[str], *, log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process group of its own, ended with all its children; its output goes to `log`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, start_new_session=True
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def environment(conf: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "OPENSSL_CONF": str(conf), "LC_ALL": "C"}
