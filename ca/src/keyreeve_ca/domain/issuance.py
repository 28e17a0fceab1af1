"""Building to-be-signed certificates: leaf SVIDs, issuing authorities, roots. Nothing here signs with a key that matters.

A builder is signed twice: with a throw-away key for the lint, then by the key cluster; `check_issued` proves that both have the same TBS.
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
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from keyreeve_client.remote_key import certificate_hash
from keyreeve_common.errors import FailedPrecondition, Internal
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.schemes import key_type_of
from keyreeve_common.x509_svid import tls_name_of

SERIAL_BYTES = 16
ROOT_PATH_LENGTH = 1  # root -> issuing authority -> leaf
ISSUING_PATH_LENGTH = 0
_EMPTY_NAME = x509.Name([])


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
