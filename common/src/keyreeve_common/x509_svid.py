"""X.509-SVIDs: parsing a leaf to the rules of its specification, and verifying a chain against the bundle of its own trust domain.

Spec: X509-SVID sections 2 to 5; the rule numbers are those of the conformance list (X5-01 to X5-24).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from keyreeve_common.errors import ForeignTrustDomain, InvalidSpiffeId, SvidExpired, SvidInvalid
from keyreeve_common.identity import SpiffeId, TrustDomain

RESERVED_DNS_ZONE = "keyreeve.invalid"
UNREADABLE = (  # what `cryptography` raises for certificates that it cannot read; most of these are no ValueError
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def tls_name_of(spiffe_id: SpiffeId) -> str:
    """The DNS name that stands for a SPIFFE ID where a TLS stack can check only DNS names (gRPC clients).

    It is a function of the SPIFFE ID, lies in a zone that cannot be resolved (RFC 6761), and the key cluster signs it only into certificates
    of that very SPIFFE ID, so checking it is checking the SPIFFE ID.
    """
    return f"id-{sha256(str(spiffe_id).encode()).hexdigest()[:40]}.{RESERVED_DNS_ZONE}"


@dataclass(frozen=True, slots=True)
class X509Svid:
    """A leaf that follows the rules of a leaf X.509-SVID; whether to trust it is `verify_chain`'s question."""

    spiffe_id: SpiffeId
    certificate: x509.Certificate

    @property
    def not_before(self) -> datetime:
        return self.certificate.not_valid_before_utc

    @property
    def not_after(self) -> datetime:
        return self.certificate.not_valid_after_utc

    @property
    def serial(self) -> str:
        """Lower-case hex, without prefix."""
        return f"{self.certificate.serial_number:x}"

    @property
    def half_life(self) -> datetime:
        """When it is to be renewed."""
        return self.not_before + (self.not_after - self.not_before) / 2

    def check_time(self, now: datetime) -> None:
        """Raises: SvidExpired, also for one that is not valid yet."""
        if now >= self.not_after:
            raise SvidExpired(f"SVID of {self.spiffe_id} expired at {self.not_after.isoformat()}")
        if now < self.not_before:
            raise SvidExpired(
                f"SVID of {self.spiffe_id} is not valid before {self.not_before.isoformat()}: check the clocks"
            )


def parse_x509_svid(certificate: x509.Certificate) -> X509Svid:
    """The leaf X.509-SVID that `certificate` is. Raises: SvidInvalid, which names the rule."""
    try:
        extensions = certificate.extensions
        spiffe_id = _spiffe_id(extensions)
        if spiffe_id.is_trust_domain_id:
            raise SvidInvalid("X5-04 SPIFFE ID of a leaf has no path")
        _check_usage(extensions)
    except UNREADABLE as error:
        raise SvidInvalid(f"certificate cannot be read: {type(error).__name__}") from error
    return X509Svid(spiffe_id, certificate)


def _spiffe_id(extensions: x509.Extensions) -> SpiffeId:
    try:
        san = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise SvidInvalid("X5-03 certificate has no URI SAN") from None
    uris = san.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise SvidInvalid(f"{'X5-02' if uris else 'X5-03'} certificate has {len(uris)} URI SANs, exactly one is needed")
    try:
        return SpiffeId.parse(uris[0])
    except InvalidSpiffeId as error:
        raise SvidInvalid(f"X5-18 URI SAN is not a SPIFFE ID: {error.detail}") from error


def _check_usage(extensions: x509.Extensions) -> None:
    try:
        if extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            raise SvidInvalid("X5-17 leaf is a CA certificate")
    except x509.ExtensionNotFound:
        pass
    try:
        usage = extensions.get_extension_for_class(x509.KeyUsage)
    except x509.ExtensionNotFound:
        raise SvidInvalid("X5-10 leaf has no key usage") from None
    if not usage.critical:
        raise SvidInvalid("X5-10 key usage is not critical")
    if usage.value.key_cert_sign or usage.value.crl_sign:
        raise SvidInvalid("X5-17 leaf may sign certificates or CRLs")
    if not usage.value.digital_signature:
        raise SvidInvalid("X5-12 leaf may not make digital signatures")
    try:
        extended = set(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return
    if not {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH} <= extended:
        raise SvidInvalid("X5-15 extended key usage lacks serverAuth or clientAuth")


def verify_chain(
    chain: Sequence[x509.Certificate],
    *,
    trust_domain: TrustDomain,
    authorities: Sequence[x509.Certificate],
    now: datetime,
) -> X509Svid:
    """The SVID at the head of `chain` (leaf first), verified to one of `authorities`, the bundle of `trust_domain`.

    Raises: SvidInvalid, SvidExpired, ForeignTrustDomain. Spec: X5-16; RFC 5280 6.
    """
    if not chain:
        raise SvidInvalid("chain is empty")
    svid = parse_x509_svid(chain[0])
    if not svid.spiffe_id.member_of(trust_domain):
        raise ForeignTrustDomain(f"SVID is of trust domain {svid.spiffe_id.trust_domain}, expected is {trust_domain}")
    svid.check_time(now)
    if not authorities:
        raise SvidInvalid(f"bundle of {trust_domain} holds no authority: nothing is trusted")
    verifier = PolicyBuilder().store(Store(list(authorities))).time(now.astimezone(UTC)).build_client_verifier()
    try:
        verifier.verify(chain[0], list(chain[1:]))
    except (VerificationError, *UNREADABLE) as error:
        raise SvidInvalid(f"chain does not lead to an authority of {trust_domain}: {error}") from error
    return svid


def load_chain_der(chain_der: Sequence[bytes]) -> list[x509.Certificate]:
    """Raises: SvidInvalid."""
    try:
        return [x509.load_der_x509_certificate(der) for der in chain_der]
    except UNREADABLE as error:
        raise SvidInvalid("chain holds something that is not a DER certificate") from error


def load_chain_pem(pem: bytes) -> list[x509.Certificate]:
    """Raises: SvidInvalid."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except UNREADABLE as error:
        raise SvidInvalid("file holds no PEM certificate, or is cut short") from error


def to_pem(certificates: Sequence[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)
