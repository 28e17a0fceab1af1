"""To-be-signed things for the purposes' tests: certificates that keep their profile, and every way of leaving it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from keyreeve_common.identity import TrustDomain
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType
from keyreeve_keyserver.domain.keys import AuthorityKind, AuthorityProfile, KeyRecord

NOW = datetime(2026, 11, 23, 4, 0, 0, tzinfo=UTC)
DOMAIN = TrustDomain("td.test")
AUTHORITY_NAME = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Keyreeve test authority")])
LEAF_NAME = x509.Name([x509.NameAttribute(NameOID.COUNTRY_NAME, "DE")])
AUTHORITY_KEY = ec.derive_private_key(7, ec.SECP256R1())
LEAF_KEY = ec.derive_private_key(11, ec.SECP256R1())
SERIAL = (1 << 100) + 12345
BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
AuthorityKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
Added = tuple[x509.ExtensionType, bool]


def key_usage(*names: str) -> x509.KeyUsage:
    known = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: name in names for name in known})


def own_dns_name(uri: str) -> str:
    """The one DNS name that an identity may have in the reserved zone."""
    return f"id-{hashlib.sha256(uri.encode()).hexdigest()[:40]}.keyreeve.invalid"


@dataclass(frozen=True)
class Draft:
    """A certificate to be; `replace` gives one that leaves the profile in one way."""

    names: Sequence[x509.GeneralName]
    san_critical: bool = False
    subject: x509.Name = LEAF_NAME
    issuer: x509.Name = AUTHORITY_NAME
    serial: int = SERIAL
    not_before: datetime = NOW
    not_after: datetime = NOW + timedelta(hours=1)
    constraints: x509.BasicConstraints | None = None
    constraints_critical: bool = True
    usage: x509.KeyUsage | None = None
    usage_critical: bool = True
    extended: Sequence[x509.ObjectIdentifier] | None = BOTH
    more: Sequence[Added] = ()
    key: ec.EllipticCurvePrivateKey = LEAF_KEY
    authority: AuthorityKey = AUTHORITY_KEY

    def tbs(self) -> bytes:
        return self.certificate().tbs_certificate_bytes

    def certificate(self) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.subject)
            .issuer_name(self.issuer)
            .serial_number(self.serial)
            .not_valid_before(self.not_before)
            .not_valid_after(self.not_after)
            .public_key(self.key.public_key())
        )
        if self.constraints is not None:
            builder = builder.add_extension(self.constraints, self.constraints_critical)
        if self.usage is not None:
            builder = builder.add_extension(self.usage, self.usage_critical)
        if self.extended is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(self.extended), critical=False)
        if self.names:
            builder = builder.add_extension(x509.SubjectAlternativeName(self.names), self.san_critical)
        for extension, critical in self.more:
            builder = builder.add_extension(extension, critical)
        algorithm = None if isinstance(self.authority, ed25519.Ed25519PrivateKey) else hashes.SHA256()
        return builder.sign(self.authority, algorithm)


URI = "spiffe://td.test/ns/a/sa/b"
LEAF = Draft(
    names=(x509.UniformResourceIdentifier(URI), x509.DNSName("b.a.example"), x509.DNSName(own_dns_name(URI))),
    constraints=x509.BasicConstraints(ca=False, path_length=None),
    usage=key_usage("digital_signature"),
)
CA = Draft(
    names=(x509.UniformResourceIdentifier("spiffe://td.test"),),
    constraints=x509.BasicConstraints(ca=True, path_length=0),
    usage=key_usage("key_cert_sign", "crl_sign"),
    extended=None,
    not_after=NOW + timedelta(days=30),
)
changed = replace


def spki(key: AuthorityKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def profile(kind: AuthorityKind, max_validity: timedelta, max_path_length: int | None = 1) -> AuthorityProfile:
    return AuthorityProfile(
        trust_domain=DOMAIN,
        kind=kind,
        subject_der=AUTHORITY_NAME.public_bytes(),
        max_validity=max_validity,
        max_backdate=timedelta(minutes=1),
        max_path_length=max_path_length,
    )


def authority_record(
    kind: AuthorityKind = AuthorityKind.ISSUING,
    *,
    key: AuthorityKey = AUTHORITY_KEY,
    key_type: KeyType = KeyType.EC_P256,
    max_path_length: int | None = 1,
) -> KeyRecord:
    """The record of an authority: an hour for leaves, thirty days for CA certificates."""
    longest = timedelta(hours=1) if kind is AuthorityKind.ISSUING else timedelta(days=30)
    return KeyRecord(
        key_id=KeyId("authority"),
        key_type=key_type,
        role=KeyRole.AUTHORITY,
        purposes=frozenset({Purpose.X509_CERTIFICATE, Purpose.CERTIFICATE_REQUEST}),
        backend="software",
        backend_ref="authority",
        spki_der=spki(key),
        label="",
        created=NOW,
        authority_profile=profile(kind, longest, max_path_length),
    )


def handshake_record(
    *purposes: Purpose, key: AuthorityKey = LEAF_KEY, key_type: KeyType = KeyType.EC_P256
) -> KeyRecord:
    every = (Purpose.TLS13_SERVER_VERIFY, Purpose.TLS13_CLIENT_VERIFY, Purpose.CERTIFICATE_REQUEST)
    return KeyRecord(
        key_id=KeyId("handshake"),
        key_type=key_type,
        role=KeyRole.HANDSHAKE,
        purposes=frozenset(purposes or every),
        backend="software",
        backend_ref="handshake",
        spki_der=spki(key),
        label="",
        created=NOW,
    )


def certification_request_info(key: AuthorityKey, *extensions: x509.ExtensionType) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(AUTHORITY_NAME)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).tbs_certrequest_bytes
