"""The demo's four proofs. Each tries to break a promise, and says what it saw."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_private_key
from cryptography.x509.oid import NameOID
from keyreeve_client.agent.sign_socket_client import SignSocketClient
from keyreeve_common.errors import KeyreeveError
from keyreeve_common.key_reference import parse_key_reference_pem
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.schemes import SignatureScheme
from keyreeve_keyserver.signer.sealing import PassphraseKey, Sealer, check_passphrase, load_kdf_parameters
from keyreeve_testing.memscan import PrivateKey, Scan, needles_of, scan_process
from keyreeve_testing.stack import Stack

REVOCATION_BOUND_S = 1.0
KEY_HOLDERS = ("signer",)


@dataclass
class Verdict:
    """`evidence` are lines for people; the promise is kept if nothing in `broken` stands."""

    letter: str
    promise: str
    evidence: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    said: Callable[[str], None] = lambda _: None

    @property
    def kept(self) -> bool:
        return not self.broken

    def saw(self, line: str) -> None:
        self.evidence.append(line)
        self.said(line)

    def expect(self, condition: bool, line: str) -> None:
        """`line` is what the promise says; it is evidence when it is so, and breaks the promise when not."""
        if condition:
            self.saw(line)
        else:
            self.broken.append(line)
            self.said(f"NOT SO: {line}")


def memory_holds_no_key(stack: Stack, verdict: Verdict, *, served: str, label: str) -> None:
    """(a) A software key is used for handshakes; then every process is searched for it. Only the signer may have it, and must."""
    for _ in range(5):
        stack.handshake(served)
    key = open_sealed_key(stack, label)
    needles = needles_of(key)
    scans: dict[str, list[Scan]] = {}
    for role, pids in stack.pids().items():
        scans[role] = [scan_process(pid, needles, role) for pid in pids]
    total = sum(scan.scanned_bytes for found in scans.values() for scan in found)
    verdict.saw(
        f"looked for {len(needles)} forms of the key of {label}, in {total >> 20} MiB of {sum(map(len, scans.values()))} processes"
    )
    for role, found in scans.items():
        hits = sum(len(scan.hits) for scan in found)
        size = sum(scan.scanned_bytes for scan in found) >> 20
        numbers = ", ".join(str(scan.pid) for scan in found)
        line = f"{role} (pid {numbers}, {size} MiB): {hits} hits"
        if role in KEY_HOLDERS:
            forms = sorted({form for scan in found for form in scan.forms})
            verdict.expect(hits > 0, f"{line}, so the scan works ({'; '.join(forms)})")
        else:
            verdict.expect(bool(found) and hits == 0, line)


def open_sealed_key(stack: Stack, label: str) -> PrivateKey:
    """The private key in the catalog's sealed record: opened with the passphrase of the demo, which nobody but the signer should know."""
    with closing(sqlite3.connect(f"file:{stack.catalog}?mode=ro", uri=True)) as catalog:
        rows = catalog.execute(
            "SELECT sealed_record FROM keyreeve_keys WHERE label = ? AND backend = 'software' ORDER BY created_at DESC",
            (label,),
        ).fetchall()
    if not rows:
        raise LookupError(f"the catalog has no software key with label {label}")
    passphrase = check_passphrase(stack.passphrase_file.read_bytes().strip())
    sealer = Sealer(PassphraseKey(load_kdf_parameters(stack.kdf_file).derive(passphrase)))
    _, secret = asyncio.run(sealer.open(bytes(rows[0][0])))
    assert secret is not None
    key = load_der_private_key(secret.reveal(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey)
    return key


def revocation_stops_handshakes(stack: Stack, verdict: Verdict, *, served: str, path: str) -> None:
    """(b) A grant is revoked: the next handshake fails, within a second. It is given again: handshakes work."""
    key_id = stack.svid_of(path)["key_id"]
    holder = stack.agent_id
    verdict.expect(stack.curl(served).ok, "before: a page comes")
    arguments = ("--key-id", key_id, "--holder", holder)
    asked = time.monotonic()
    stack.cli("grant", "revoke", *arguments)
    revoked = time.monotonic()
    failed_at = _first(lambda: not _shakes(stack, served), limit_s=5.0)
    if failed_at is None:
        verdict.broken.append("handshakes went on for 5 s after the grant was revoked")
        return
    verdict.expect(
        failed_at - revoked < REVOCATION_BOUND_S,
        f"revoked: a new handshake failed {(failed_at - revoked) * 1000:.0f} ms after the command returned "
        f"({(failed_at - asked) * 1000:.0f} ms after it was typed)",
    )
    again = [_shakes(stack, served) for _ in range(10)]
    verdict.expect(not any(again), "revoked: 10 more handshakes failed, none got through")
    refused = stack.curl(served)
    verdict.expect(not refused.ok, f"revoked: curl says: {refused.error}")
    granted = time.monotonic()
    stack.cli("grant", "create", *arguments)
    works_at = _first(lambda: stack.curl(served).ok, limit_s=5.0)
    verdict.expect(
        works_at is not None,
        f"granted again: a page comes, {((works_at or granted) - granted) * 1000:.0f} ms after the command was typed",
    )


def _shakes(stack: Stack, served: str) -> bool:
    try:
        stack.handshake(served)
    except (OSError, ssl.SSLError):
        return False
    return True


def _first(condition: Callable[[], bool], *, limit_s: float) -> float | None:
    """When it was first so."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        if condition():
            return time.monotonic()
    return None


def key_signs_nothing_else(stack: Stack, verdict: Verdict, *, served: str) -> None:
    """(c) Whoever owns nginx asks the agent for other signatures with the TLS key, and is refused by name."""
    reference = parse_key_reference_pem((stack.svid_dir(served) / "key.pem").read_text())
    public_key = reference.public_key
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    scheme = SignatureScheme.ECDSA_SECP256R1_SHA256
    with SignSocketClient(stack.sign_socket) as client:
        with stack.as_worker_user():
            client.ping()  # connects: from here on the agent takes this connection for one of nginx's user
        good = build_tls13_content(Purpose.TLS13_SERVER_VERIFY, b"\x5a" * 32)
        signature = client.sign(reference.key_id, scheme, Purpose.TLS13_SERVER_VERIFY, message=good)
        public_key.verify(signature, good, ec.ECDSA(SHA256()))
        verdict.saw(
            f"as {stack.worker_user}: a TLS 1.3 CertificateVerify is signed, so the refusals below are not for want of access"
        )
        for name, purpose, message in _other_messages(public_key):
            try:
                client.sign(reference.key_id, scheme, purpose, message=message)
            except KeyreeveError as error:
                verdict.saw(f"{name}: refused, {error.code.value}: {error.detail}")
            else:
                verdict.broken.append(f"{name} was signed")


def _other_messages(public_key: ec.EllipticCurvePublicKey) -> Iterator[tuple[str, Purpose, bytes]]:
    request = _certification_request_info(public_key)
    certificate = _tbs_certificate(public_key)
    yield "a certificate request, declared as one", Purpose.CERTIFICATE_REQUEST, request
    yield "a certificate request, declared as a handshake", Purpose.TLS13_SERVER_VERIFY, request
    yield "a CA certificate, declared as one", Purpose.X509_CERTIFICATE, certificate
    yield "a CA certificate, declared as a handshake", Purpose.TLS13_SERVER_VERIFY, certificate
    yield "an arbitrary message, declared as nothing", Purpose.UNSPECIFIED, b"pay the bearer one million"
    yield "an arbitrary message, declared as a handshake", Purpose.TLS13_SERVER_VERIFY, b"pay the bearer one million"
    yield "a bare digest", Purpose.DIGEST, hashlib.sha256(request).digest()
    content = build_tls13_content(Purpose.TLS13_SERVER_VERIFY, b"\x5a" * 32)
    yield "a handshake with one byte more", Purpose.TLS13_SERVER_VERIFY, content + b"\x00"


def _certification_request_info(public_key: ec.EllipticCurvePublicKey) -> bytes:
    """A well-formed CertificationRequestInfo for this very key. Spec: RFC 2986 4.1."""
    helper = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(_name()).sign(helper, SHA256())
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    # Two P-256 keys have SPKIs of one length, so the one replaces the other in place.
    return request.tbs_certrequest_bytes.replace(
        helper.public_key().public_bytes(*form), public_key.public_bytes(*form)
    )


def _tbs_certificate(public_key: ec.EllipticCurvePublicKey) -> bytes:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(_name()).issuer_name(_name()).public_key(public_key)
    builder = (
        builder.serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return builder.sign(ec.generate_private_key(ec.SECP256R1()), SHA256()).tbs_certificate_bytes


def _name() -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "attacker")])


def rotation_breaks_nothing(stack: Stack, verdict: Verdict, *, served: str) -> None:
    """(d) While a slow download runs the SVID is renewed and nginx reloads: new handshakes see the new one, the download goes on."""
    before = stack.handshake(served)
    workers = stack.nginx_workers()
    target = stack.directory / "download"
    target.unlink(missing_ok=True)
    started = time.monotonic()
    download = subprocess.Popen(
        [*stack.curl_command(served, "/download"), "--output", str(target)],
        env=stack.openssl_env(),
        stderr=subprocess.PIPE,
    )
    try:
        stack.wait_until(lambda: _size(target) > 0, "the download's first bytes")
        stack.cli("svid", "renew", stack.entries[served])
        renewed = time.monotonic()
        took = stack.wait_until(
            lambda: stack.handshake(served).serial_number != before.serial_number, "a handshake with the new SVID"
        )
        after = stack.handshake(served)
        verdict.saw(
            f"serial {before.serial_number:x} -> {after.serial_number:x}, served {took * 1000:.0f} ms after the command returned"
        )
        verdict.expect(
            bool(stack.nginx_workers() - workers),
            "nginx has new workers: it reloaded, and read the key reference again",
        )
        verdict.expect(before.public_key() == after.public_key(), "the key is the same: only the certificate is new")
        size = _size(target)
        verdict.expect(
            download.poll() is None and size < stack.config.download_bytes,
            f"the download was at {size * 100 // stack.config.download_bytes} % then, and went on",
        )
        _, complaint = download.communicate(timeout=60)
    finally:
        if download.poll() is None:
            download.kill()
            download.wait()
    digest = hashlib.sha256(target.read_bytes()).hexdigest() if target.exists() else ""
    verdict.expect(
        download.returncode == 0 and digest == stack.download_digest,
        f"it ended whole {time.monotonic() - renewed:.1f} s after the renewal ({time.monotonic() - started:.1f} s in all), every byte right"
        + (f"; curl says: {complaint.decode(errors='replace').strip()}" if complaint else ""),
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
