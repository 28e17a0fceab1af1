"""What authorities sign beside certificates: CRLs, OCSP responses and JWT-SVIDs, made by other code than that which judges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.x509 import ocsp
from keyreeve_common.jws import build_jwt_signing_input
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_keyserver.domain.keys import AuthorityKind, JwtProfile, KeyRecord

from keyreeve_testing import tbs
from keyreeve_testing.tbs import AUTHORITY_KEY, AUTHORITY_NAME, NOW, Added, AuthorityKey

HOUR = timedelta(hours=1)
MAX_TTL = timedelta(minutes=5)
EVERY_AUTHORITY_PURPOSE = frozenset(
    {Purpose.X509_CERTIFICATE, Purpose.X509_CRL, Purpose.OCSP_RESPONSE, Purpose.CERTIFICATE_REQUEST}
)


def authority_record(
    kind: AuthorityKind = AuthorityKind.ISSUING,
    *,
    key: AuthorityKey = AUTHORITY_KEY,
    key_type: KeyType = KeyType.EC_P256,
) -> KeyRecord:
    """An authority that may sign all that authorities sign."""
    return replace(tbs.authority_record(kind, key=key, key_type=key_type), purposes=EVERY_AUTHORITY_PURPOSE)


def jwt_record(key: AuthorityKey = AUTHORITY_KEY, key_type: KeyType = KeyType.EC_P256) -> KeyRecord:
    return KeyRecord(
        key_id=KeyId("tokens"),
        key_type=key_type,
        role=KeyRole.JWT_AUTHORITY,
        purposes=frozenset({Purpose.JWT_SVID}),
        backend="software",
        backend_ref="tokens",
        spki_der=tbs.spki(key),
        label="",
        created=NOW,
        jwt_profile=JwtProfile(tbs.DOMAIN, MAX_TTL),
    )


def _hash(key: AuthorityKey) -> hashes.SHA256 | None:
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()


@dataclass(frozen=True)
class Crl:
    issuer: x509.Name = AUTHORITY_NAME
    this_update: datetime = NOW
    next_update: datetime = NOW + HOUR
    serials: Sequence[int] = (tbs.SERIAL, tbs.SERIAL + 1)
    revoked_at: datetime = NOW - timedelta(days=1)
    entry_extensions: Sequence[Added] = ((x509.CRLReason(x509.ReasonFlags.key_compromise), False),)
    extensions: Sequence[Added] = (
        (x509.AuthorityKeyIdentifier(b"k" * 20, None, None), False),
        (x509.CRLNumber(7), False),
    )
    key: AuthorityKey = AUTHORITY_KEY

    def tbs(self) -> bytes:
        return self.crl().tbs_certlist_bytes

    def crl(self) -> x509.CertificateRevocationList:
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.issuer)
            .last_update(self.this_update)
            .next_update(self.next_update)
        )
        for serial in self.serials:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(self.revoked_at)
            for extension, critical in self.entry_extensions:
                entry = entry.add_extension(extension, critical)
            builder = builder.add_revoked_certificate(entry.build())
        for extension, critical in self.extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self.key, _hash(self.key))


def authority_certificate(key: AuthorityKey = AUTHORITY_KEY, name: x509.Name = AUTHORITY_NAME) -> x509.Certificate:
    """Who is the responder. Only its name and key count here."""
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).serial_number(tbs.SERIAL)
    builder = builder.not_valid_before(NOW).not_valid_after(NOW + HOUR).public_key(key.public_key())
    return builder.sign(key, _hash(key))


@dataclass(frozen=True)
class Ocsp:
    this_update: datetime = NOW
    next_update: datetime | None = NOW + HOUR
    status: ocsp.OCSPCertStatus = ocsp.OCSPCertStatus.GOOD
    revoked_at: datetime | None = None
    reason: x509.ReasonFlags | None = None
    by_name: bool = False
    algorithm: type[hashes.SHA1 | hashes.SHA256] = hashes.SHA1
    extensions: Sequence[Added] = ((x509.OCSPNonce(b"n" * 16), False),)
    leaf: tbs.Draft = tbs.LEAF
    issuer: x509.Certificate | None = None
    responder: x509.Certificate | None = None
    key: AuthorityKey = AUTHORITY_KEY

    def tbs(self) -> bytes:
        return self.response().tbs_response_bytes

    def response(self) -> ocsp.OCSPResponse:
        encoding = ocsp.OCSPResponderEncoding.NAME if self.by_name else ocsp.OCSPResponderEncoding.HASH
        own = authority_certificate(self.key)
        leaf = replace(self.leaf, authority=self.key).certificate()
        builder = ocsp.OCSPResponseBuilder().add_response(
            cert=leaf,
            issuer=self.issuer or own,
            algorithm=self.algorithm(),
            cert_status=self.status,
            this_update=self.this_update,
            next_update=self.next_update,
            revocation_time=self.revoked_at,
            revocation_reason=self.reason,
        )
        for extension, critical in self.extensions:
            builder = builder.add_extension(extension, critical)
        return builder.responder_id(encoding, self.responder or own).sign(self.key, _hash(self.key))


def at_production(response: bytes, when: datetime = NOW) -> bytes:
    """`cryptography` writes the clock's time as producedAt; this puts another in its place, of the same length."""
    at = response.index(b"\x18\x0f") + 2
    return response[:at] + when.strftime("%Y%m%d%H%M%SZ").encode("ascii") + response[at + 15 :]


def claims(**changes: Any) -> dict[str, Any]:
    """Those of a good JWT-SVID; a change to None leaves the claim out."""
    clock = int(NOW.timestamp())
    good: dict[str, Any] = {"sub": tbs.URI, "aud": ["spiffe://td.test/db"], "exp": clock + 300, "iat": clock}
    return {name: value for name, value in (good | changes).items() if value is not None}


def token(
    values: Mapping[str, Any] | None = None, *, scheme: SignatureScheme = SignatureScheme.ECDSA_SECP256R1_SHA256
) -> bytes:
    return build_jwt_signing_input(scheme, "tokens", claims() if values is None else values)


changed = replace
