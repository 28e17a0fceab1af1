"""What the client of a TLS 1.2 handshake signs: all handshake messages so far, from its ClientHello to its ClientKeyExchange.

Each message stands where RFC 5246 7.3 has it and is read to its last byte: ECDHE only, TLS 1.2 only, a scheme that the server asked for, and the
certificate that the client presents is for the key that signs. Spec: RFC 5246 7.4; RFC 8422 5; RFC 6066 8.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import SignatureScheme

from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_keyserver.domain.purposes.tls12_params import read_point, read_server_params
from keyreeve_keyserver.domain.purposes.tls_reader import TlsReader
from keyreeve_keyserver.domain.purposes.x509_errors import UNREADABLE

CLIENT_HELLO, SERVER_HELLO, CERTIFICATE, SERVER_KEY_EXCHANGE, CERTIFICATE_REQUEST = 1, 2, 11, 12, 13
SERVER_HELLO_DONE, CLIENT_KEY_EXCHANGE, CERTIFICATE_STATUS = 14, 16, 22
TLS12 = 0x0303
MAX_CERTIFICATES = 16
_SUPPORTED_VERSIONS = 43
_OCSP = 1


def check_tls12_client_verify(message: bytes, record: KeyRecord, scheme: SignatureScheme) -> None:
    """Raises: PurposeMismatch."""
    transcript = TlsReader(message, Purpose.TLS12_CLIENT_VERIFY, "transcript")
    _read_client_hello(_next(transcript, CLIENT_HELLO, "ClientHello"))
    _read_server_hello(_next(transcript, SERVER_HELLO, "ServerHello"))
    _read_certificates(_next(transcript, CERTIFICATE, "server's Certificate"))
    kind, body = _next_of(transcript, (CERTIFICATE_STATUS, SERVER_KEY_EXCHANGE), "ServerKeyExchange")
    if kind == CERTIFICATE_STATUS:
        _read_status(body)
        body = _next(transcript, SERVER_KEY_EXCHANGE, "ServerKeyExchange")
    curve = _read_server_key_exchange(body)
    _read_certificate_request(_next(transcript, CERTIFICATE_REQUEST, "CertificateRequest"), scheme)
    _next(transcript, SERVER_HELLO_DONE, "ServerHelloDone").finish()
    _check_own_certificate(_next(transcript, CERTIFICATE, "client's Certificate"), record)
    _read_client_key_exchange(_next(transcript, CLIENT_KEY_EXCHANGE, "ClientKeyExchange"), curve)
    transcript.finish()


def _next_of(transcript: TlsReader, kinds: tuple[int, ...], what: str) -> tuple[int, TlsReader]:
    kind = transcript.number(1, f"type of {what}")
    transcript.require(kind in kinds, f"message of type {kind} stands where {what} is due")
    return kind, transcript.inner(transcript.vector(3, what), what)


def _next(transcript: TlsReader, kind: int, what: str) -> TlsReader:
    return _next_of(transcript, (kind,), what)[1]


def _read_client_hello(body: TlsReader) -> None:
    body.require(body.number(2, "version") == TLS12, "version is not that of TLS 1.2")
    body.take(32, "random")
    body.vector(1, "session id", high=32)
    suites = body.vector(2, "cipher suites", low=2)
    body.require(len(suites) % 2 == 0, "cipher suites are cut short")
    body.require(0 in body.vector(1, "compression methods", low=1), "compression methods lack null")
    _read_extensions(body)
    body.finish()


def _read_server_hello(body: TlsReader) -> None:
    body.require(body.number(2, "version") == TLS12, "version is not that of TLS 1.2")
    body.take(32, "random")
    body.vector(1, "session id", high=32)
    body.take(2, "cipher suite")
    body.require(body.number(1, "compression method") == 0, "compression method is not null")
    body.require(_SUPPORTED_VERSIONS not in _read_extensions(body), "supported_versions says that it is not TLS 1.2")
    body.finish()


def _read_extensions(body: TlsReader) -> set[int]:
    """The types; a hello without any may end before their length."""
    seen: set[int] = set()
    if not body.left:
        return seen
    extensions = body.inner(body.vector(2, "extensions"), "extensions")
    while extensions.left:
        kind = extensions.number(2, "type of an extension")
        extensions.require(kind not in seen, f"extension {kind} stands there twice")
        seen.add(kind)
        extensions.vector(2, "extension")
    return seen


def _read_certificates(body: TlsReader) -> list[bytes]:
    chain = body.inner(body.vector(3, "certificate list"), "certificate list")
    body.finish()
    found = []
    while chain.left:
        found.append(chain.vector(3, "certificate", low=1))
    chain.require(1 <= len(found) <= MAX_CERTIFICATES, f"holds {len(found)} certificates")
    return found


def _read_status(body: TlsReader) -> None:
    body.require(body.number(1, "status type") == _OCSP, "CertificateStatus is not of type ocsp")
    body.vector(3, "OCSP response", low=1)
    body.finish()


def _read_server_key_exchange(body: TlsReader) -> int:
    curve = read_server_params(body)
    body.take(2, "signature algorithm")
    body.vector(2, "signature", low=1)
    body.finish()
    return curve


def _read_certificate_request(body: TlsReader, scheme: SignatureScheme) -> None:
    body.vector(1, "certificate types", low=1)
    algorithms = body.vector(2, "signature algorithms", low=2)
    body.require(len(algorithms) % 2 == 0, "signature algorithms are cut short")
    asked = {int.from_bytes(algorithms[at : at + 2], "big") for at in range(0, len(algorithms), 2)}
    body.require(scheme.value in asked, f"the server did not ask for {scheme.iana_name}")
    names = body.inner(body.vector(2, "certificate authorities"), "certificate authorities")
    body.finish()
    while names.left:
        names.vector(2, "distinguished name", low=1)


def _check_own_certificate(body: TlsReader, record: KeyRecord) -> None:
    leaf = _read_certificates(body)[0]
    try:
        certificate = x509.load_der_x509_certificate(leaf)
        public_key = certificate.public_key()
        spki_der = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except UNREADABLE:
        raise body.refuse("the client's certificate cannot be read") from None
    body.require(spki_der == record.spki_der, "the client's certificate is not for this key")
    # A parser takes a point's other encodings (hybrid, compressed) for the same key: only the record's own may stand here.
    spelled_alike = record.spki_der in certificate.tbs_certificate_bytes
    body.require(spelled_alike, "the client's certificate spells its key otherwise")


def _read_client_key_exchange(body: TlsReader, curve: int) -> None:
    read_point(body, curve)
    body.finish()
