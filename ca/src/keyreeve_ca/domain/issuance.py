"""Building to-be-signed certificates: leaf SVIDs, issuing authorities, roots. Nothing here signs with a key that matters.

The lint certificate has the TBS that the key cluster is asked to sign: an authority's is signed by a throw-away key, a leaf's bears a mark in
place of a signature (ADR 29). `check_issued` proves that what was signed is what was linted.
Spec: X509-SVID 2 to 4; RFC 5280 4.1, 4.2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from keyreeve_client.remote_key import certificate_hash, remote_key_of
from keyreeve_common.errors import FailedPrecondition, Internal
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.schemes import SignatureScheme, key_type_of
from keyreeve_common.x509_svid import tls_name_of

SERIAL_BYTES = 16
ROOT_PATH_LENGTH = 1  # root -> issuing authority -> leaf
ISSUING_PATH_LENGTH = 0
_EMPTY_NAME = x509.Name([])
_NO_SIGNATURE = b"lint certificate, not signed"
_SEQUENCE, _BIT_STRING = 0x30, 0x03


@dataclass(frozen=True, slots=True)
class LeafOrder:
    """What a leaf is to say."""

    spiffe_id: SpiffeId
    public_key: CertificatePublicKeyTypes
    serial: int
    not_before: datetime
    not_after: datetime
    dns_names: tuple[str, ...] = ()
    with_tls_name: bool = False

    @property
    def all_dns_names(self) -> tuple[str, ...]:
        own = (tls_name_of(self.spiffe_id),) if self.with_tls_name else ()
        return own + self.dns_names


@dataclass(frozen=True, slots=True)
class AuthorityOrder:
    """What the certificate of an authority is to say. `issuer` is None for a root."""

    trust_domain: TrustDomain
    subject: x509.Name
    public_key: CertificatePublicKeyTypes
    serial: int
    not_before: datetime
    not_after: datetime
    issuer: x509.Certificate | None = None


def make_serial(entropy: bytes) -> int:
    """A positive serial of 127 random bits under a set top bit: 17 octets in DER, never short. Spec: RFC 5280 4.1.2.2."""
    if len(entropy) != SERIAL_BYTES:
        raise ValueError(f"a serial needs {SERIAL_BYTES} bytes of entropy")
    return int.from_bytes(entropy, "big") | 1 << (SERIAL_BYTES * 8 - 1)


def validity(
    now: datetime, life: timedelta, *, backdate: timedelta, issuer: x509.Certificate | None
) -> tuple[datetime, datetime]:
    """Back-dated start, and an end capped by the issuer's, in whole seconds. Raises: FailedPrecondition when the issuer has expired."""
    now = now.replace(microsecond=0)
    start, end = now - backdate, now + life
    if issuer is not None:
        if issuer.not_valid_after_utc <= now:
            raise FailedPrecondition("issuing authority has expired; prepare and activate another one")
        start, end = max(start, issuer.not_valid_before_utc), min(end, issuer.not_valid_after_utc)
    return start, end


def authority_subject(trust_domain: TrustDomain, *, root: bool, number: int) -> x509.Name:
    """The Name of the authority with this number; the trust domain itself stands in the SAN, which has room for it."""
    mark = sha256(trust_domain.name.encode()).hexdigest()[:12]
    kind = "root" if root else "issuing"
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Keyreeve"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"SPIFFE {kind} authority {mark}-{number}"),
        ]
    )


def build_leaf(order: LeafOrder, issuer: x509.Certificate) -> x509.CertificateBuilder:
    """A leaf X.509-SVID. Spec: X5-01, X5-05, X5-09 to X5-15."""
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(str(order.spiffe_id))]
    names += [x509.DNSName(name) for name in order.all_dns_names]
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = _start(order, subject=_EMPTY_NAME, issuer=issuer.subject)
    return (
        builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(both, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(order.public_key), critical=False)
        .add_extension(_authority_key_id(issuer), critical=False)
    )


def build_authority(order: AuthorityOrder) -> x509.CertificateBuilder:
    """A root's or an issuing authority's certificate. Spec: X5-06, X5-08, X5-11; ID-20, ID-21."""
    issuer = order.issuer
    path_length = ROOT_PATH_LENGTH if issuer is None else ISSUING_PATH_LENGTH
    own_id = x509.UniformResourceIdentifier(str(order.trust_domain.id))
    builder = (
        _start(order, subject=order.subject, issuer=order.subject if issuer is None else issuer.subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectAlternativeName([own_id]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(order.public_key), critical=False)
    )
    return builder if issuer is None else builder.add_extension(_authority_key_id(issuer), critical=False)


def _start(order: LeafOrder | AuthorityOrder, *, subject: x509.Name, issuer: x509.Name) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(order.public_key)
        .serial_number(order.serial)
        .not_valid_before(order.not_before)
        .not_valid_after(order.not_after)
    )


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_key_id(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    ski = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ski)


def sign_builder(builder: x509.CertificateBuilder, key: Any) -> x509.Certificate:
    """The certificate, signed with `key`: a remote key, or a throw-away key of the same type for the lint."""
    public_key = key.public_key()
    rsa_padding = padding.PKCS1v15() if isinstance(public_key, rsa.RSAPublicKey) else None
    return builder.sign(key, certificate_hash(key_type_of(public_key)), rsa_padding=rsa_padding)


@dataclass(slots=True)
class _Mark:
    """Stands where a signature will be, and keeps what is to be signed."""

    scheme: SignatureScheme | None = None

    def signature(self, public_key: Any, scheme: SignatureScheme, message: bytes) -> bytes:
        self.scheme = scheme
        return _NO_SIGNATURE


@dataclass(frozen=True, slots=True)
class Unsigned:
    """A lint certificate without a signature, and the scheme of the signature that it is to get."""

    linted: x509.Certificate
    scheme: SignatureScheme

    @property
    def tbs_der(self) -> bytes:
        return self.linted.tbs_certificate_bytes

    def signed(self, signature: bytes) -> x509.Certificate:
        """The certificate with this signature, which is not verified here. Spec: RFC 5280 4.1.

        Raises: Internal when it cannot be read.
        """
        # Certificate ::= SEQUENCE { tbsCertificate, signatureAlgorithm, signatureValue BIT STRING }
        mark = _tlv(_BIT_STRING, b"\0" + _NO_SIGNATURE)
        der, tbs = self.linted.public_bytes(Encoding.DER), self.tbs_der
        algorithm = der[der.index(tbs) + len(tbs) : -len(mark)]
        try:
            return x509.load_der_x509_certificate(
                _tlv(_SEQUENCE, tbs + algorithm + _tlv(_BIT_STRING, b"\0" + signature))
            )
        except ValueError as error:
            raise Internal("certificate with the key cluster's signature cannot be read") from error


def leave_unsigned(builder: x509.CertificateBuilder, issuer_key: Any) -> Unsigned:
    """What `sign_builder` would make with the private half of `issuer_key`, but for the signature."""
    mark = _Mark()
    linted = sign_builder(builder, remote_key_of(issuer_key, mark))
    assert mark.scheme is not None  # noqa: S101 - the builder asks for one signature
    return Unsigned(linted, mark.scheme)


def _tlv(tag: int, content: bytes) -> bytes:
    """DER with a definite length. Spec: X.690 8.1.3, 10.1."""
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + content


def check_issued(issued: x509.Certificate, linted: x509.Certificate, issuer: x509.Certificate | None) -> None:
    """The signed certificate is the linted one, and its issuer's signature holds. Raises: Internal."""
    if issued.tbs_certificate_bytes != linted.tbs_certificate_bytes:
        raise Internal("key cluster signed something else than what was linted")
    try:
        issued.verify_directly_issued_by(issuer or issued)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise Internal("signature of the certificate does not verify under its issuer") from error


def chain_without_root(leaf: x509.Certificate, issuers: Sequence[x509.Certificate]) -> tuple[x509.Certificate, ...]:
    """Leaf first, then its issuers up to and without the root."""
    return (leaf, *(issuer for issuer in issuers if issuer.subject != issuer.issuer))
