"""A TBSCertificate, read strictly: DER in its one form, version 3, the algorithm that is asked for. What it may say is the profile's matter.

Spec: RFC 5280 4.1; RFC 4055 3.1; RFC 5758 3.2; RFC 8410 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509
from keyreeve_common.errors import PurposeMismatch
from keyreeve_common.schemes import SignatureScheme

from keyreeve_keyserver.domain.der import BIT_STRING, INTEGER, SEQUENCE, DerError, Element, check_name, encode
from keyreeve_keyserver.domain.der import read_element as read_der
from keyreeve_keyserver.domain.purposes.x509_errors import UNREADABLE

_VERSION, _EXTENSIONS, _UTC_TIME, _GENERALIZED_TIME = 0xA0, 0xA3, 0x17, 0x18
_V3 = bytes.fromhex("a003020102")
_SHAPE = (_VERSION, INTEGER, SEQUENCE, SEQUENCE, SEQUENCE, SEQUENCE, SEQUENCE, _EXTENSIONS)
_PSS = (
    "304106092a864886f70d01010a3034a00f300d060960864801650304020{hash}0500"
    "a11c301a06092a864886f70d010108300d060960864801650304020{hash}0500a2030201{salt}"
)
ALGORITHM_DER: dict[SignatureScheme, bytes] = {
    scheme: bytes.fromhex(text)
    for scheme, text in {
        SignatureScheme.RSA_PKCS1_SHA256: "300d06092a864886f70d01010b0500",
        SignatureScheme.RSA_PKCS1_SHA384: "300d06092a864886f70d01010c0500",
        SignatureScheme.RSA_PKCS1_SHA512: "300d06092a864886f70d01010d0500",
        SignatureScheme.ECDSA_SECP256R1_SHA256: "300a06082a8648ce3d040302",
        SignatureScheme.ECDSA_SECP384R1_SHA384: "300a06082a8648ce3d040303",
        SignatureScheme.ED25519: "300506032b6570",
        SignatureScheme.RSA_PSS_RSAE_SHA256: _PSS.format(hash="1", salt="20"),
        SignatureScheme.RSA_PSS_RSAE_SHA384: _PSS.format(hash="2", salt="30"),
        SignatureScheme.RSA_PSS_RSAE_SHA512: _PSS.format(hash="3", salt="40"),
    }.items()
}


@dataclass(frozen=True, slots=True)
class TbsCertificate:
    """`certificate` has a dummy signature: it serves to read fields, never to verify."""

    certificate: x509.Certificate
    extensions: x509.Extensions
    issuer_der: bytes
    spki_der: bytes


def parse_tbs_certificate(message: bytes, scheme: SignatureScheme) -> TbsCertificate:
    """Raises: PurposeMismatch."""
    try:
        return _parse(message, scheme)
    except DerError as error:
        raise PurposeMismatch(f"x509_certificate: {error}") from None
    except UNREADABLE:
        raise PurposeMismatch("x509_certificate: message is not a TBSCertificate") from None


def _parse(message: bytes, scheme: SignatureScheme) -> TbsCertificate:
    fields = read_der(message, SEQUENCE, "TBSCertificate").children()
    _require(tuple(field.tag for field in fields) == _SHAPE, "message is not a TBSCertificate of version 3 without ids")
    version, serial, algorithm, issuer, validity, subject, spki, _ = fields
    _require(version.encoded == _V3, "version is not v3")
    _check_serial(serial.value)
    _require(
        algorithm.encoded == ALGORITHM_DER[scheme],
        f"signature algorithm in the message is not that of {scheme.iana_name}",
    )
    check_name(issuer.encoded)
    check_name(subject.encoded)
    _check_times(validity)
    certificate = x509.load_der_x509_certificate(
        encode(SEQUENCE, message, algorithm.encoded, encode(BIT_STRING, b"\0"))
    )
    _require(certificate.tbs_certificate_bytes == message, "message is not in its one DER form")
    _ = certificate.subject, certificate.issuer
    return TbsCertificate(certificate, certificate.extensions, issuer.encoded, spki.encoded)


def _check_serial(value: bytes) -> None:
    """Spec: RFC 5280 4.1.2.2; CA/Browser Forum BR 7.1 (64 bits)."""
    serial = int.from_bytes(value, "big", signed=True)
    _require(serial > 0, "serial number is not positive")
    _require(len(value) <= 20, "serial number has more than 20 octets")
    _require(serial.bit_length() >= 64, "serial number has fewer than 64 bits")


def _check_times(validity: Element) -> None:
    """UTCTime through 2049, GeneralizedTime from 2050. Spec: RFC 5280 4.1.2.5."""
    times = validity.children()
    _require(len(times) == 2, "validity does not hold two times")
    for time in times:
        late = time.tag == _GENERALIZED_TIME and time.value[:4] >= b"2050"
        _require(time.tag == _UTC_TIME or late, "a time is not UTCTime through 2049 and GeneralizedTime after")


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise PurposeMismatch(f"x509_certificate: {rule}")
