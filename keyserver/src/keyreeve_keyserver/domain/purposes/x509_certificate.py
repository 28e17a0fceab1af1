"""A TBSCertificate that keeps the profile of its authority. The profile comes from the sealed key record, so that a CA cannot widen it.

A root signs CA certificates only, an issuing authority signs leaves only. Every rule has a name in the detail of its refusal.
Spec: X509-SVID 2 to 4 (rules X5-01 to X5-15 of docs/spec-conformance.md); RFC 5280 4.2.1.
"""

from __future__ import annotations

import ipaddress
import re
from datetime import datetime, timedelta
from typing import TypeVar

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID
from keyreeve_common.errors import InvalidSpiffeId, KeyTypeNotSupported, ProfileViolation
from keyreeve_common.identity import SpiffeId
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.x509_svid import RESERVED_DNS_ZONE, tls_name_of

from keyreeve_keyserver.domain.keys import AuthorityKind, AuthorityProfile, KeyRecord, parse_spki
from keyreeve_keyserver.domain.purposes.tbs_certificate import TbsCertificate, parse_tbs_certificate

CLOCK_TOLERANCE = timedelta(seconds=60)
_BOTH_USAGES = frozenset({ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH})
_MAY_BE_CRITICAL = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.NAME_CONSTRAINTS,
    }
)
_UNDERSTOOD = _MAY_BE_CRITICAL | {
    ExtensionOID.SUBJECT_KEY_IDENTIFIER,
    ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
    ExtensionOID.AUTHORITY_INFORMATION_ACCESS,
    ExtensionOID.CRL_DISTRIBUTION_POINTS,
    ExtensionOID.CERTIFICATE_POLICIES,
}
_ADDRESS = (ipaddress.IPv4Address, ipaddress.IPv6Address)
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DNS_NAME = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*", re.ASCII)
_KEY_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
)
_Ext = TypeVar("_Ext", bound=x509.ExtensionType)


def check_x509_certificate(message: bytes, record: KeyRecord, scheme: SignatureScheme, now: datetime) -> None:
    """Raises: PurposeMismatch when it is no TBSCertificate, ProfileViolation when it is outside the profile."""
    tbs = parse_tbs_certificate(message, scheme)
    profile = record.authority_profile
    if profile is None:
        raise ProfileViolation("x509_certificate: key has no authority profile")
    _require(tbs.issuer_der == profile.subject_der, "issuer is not the subject of the authority's profile")
    _check_validity(tbs.certificate, profile, now)
    _check_subject_key(tbs.spki_der)
    for extension in tbs.extensions:
        known = extension.oid in (_MAY_BE_CRITICAL if extension.critical else _UNDERSTOOD)
        kind = "critical extension" if extension.critical else "extension"
        _require(known, f"{kind} {extension.oid.dotted_string} is not one that this authority certifies")
    spiffe_id = _check_subject_alternative_name(tbs, profile)
    if profile.kind is AuthorityKind.ROOT:
        _check_authority(tbs, profile, spiffe_id)
    else:
        _check_leaf(tbs, record, spiffe_id)


def _check_validity(certificate: x509.Certificate, profile: AuthorityProfile, now: datetime) -> None:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    _require(start < end, "not_after does not lie after not_before")
    _require(
        end - start <= profile.max_validity, f"validity is longer than max_validity_s ({_s(profile.max_validity)})"
    )
    _require(
        start >= now - profile.max_backdate,
        f"not_before lies further back than max_backdate_s ({_s(profile.max_backdate)})",
    )
    _require(start <= now + CLOCK_TOLERANCE, "not_before lies in the future")
    _require(end > now, "not_after lies in the past")


def _check_subject_key(spki_der: bytes) -> None:
    try:
        parse_spki(spki_der)
    except KeyTypeNotSupported as error:
        raise ProfileViolation(f"x509_certificate: subject public key: {error.detail}") from None


def _check_subject_alternative_name(tbs: TbsCertificate, profile: AuthorityProfile) -> SpiffeId:
    extension = _find(tbs, x509.SubjectAlternativeName)
    if extension is None:
        raise ProfileViolation("x509_certificate: X5-03 no subject alternative name")
    names = extension.value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    _require(len(uris) == 1, f"X5-01 {len(uris)} URI SANs, exactly one is allowed")
    known = (x509.UniformResourceIdentifier, x509.DNSName, x509.IPAddress)
    _require(all(isinstance(name, known) for name in names), "SAN of a type other than URI, DNS and IP")
    # `cryptography` reads 8 and 32 octets as a network, which is for name constraints only (RFC 5280 4.2.1.6).
    addresses = names.get_values_for_type(x509.IPAddress)
    _require(all(isinstance(address, _ADDRESS) for address in addresses), "IP SAN is not one address")
    _require(
        extension.critical or len(tbs.certificate.subject) > 0, "X5-05 subject is empty and the SAN is not critical"
    )
    try:
        spiffe_id = SpiffeId.parse(uris[0])
    except InvalidSpiffeId as error:
        raise ProfileViolation(f"x509_certificate: URI SAN: {error.detail}") from None
    _require(spiffe_id.member_of(profile.trust_domain), f"URI SAN is not in trust domain {profile.trust_domain}")
    for name in names.get_values_for_type(x509.DNSName):
        _check_dns_name(name, spiffe_id)
    for attribute in tbs.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME):
        # OpenSSL takes the common name for a host's where no DNS SAN stands.
        if RESERVED_DNS_ZONE in str(attribute.value).lower():
            _require(attribute.value == tls_name_of(spiffe_id), "common name is the DNS name of another SPIFFE ID")
    return spiffe_id


def _check_dns_name(name: str, spiffe_id: SpiffeId) -> None:
    """Names in the reserved zone say which identity they belong to, so that no identity can take another's name."""
    _require(
        len(name) <= 253 and _DNS_NAME.fullmatch(name) is not None, "DNS SAN is not lower-case letters, digits, '-'"
    )
    covers = name.startswith("*.") and RESERVED_DNS_ZONE.endswith(name[1:])
    if covers or name == RESERVED_DNS_ZONE or name.endswith("." + RESERVED_DNS_ZONE):
        _require(name == tls_name_of(spiffe_id), f"DNS SAN in {RESERVED_DNS_ZONE} is not the one of this SPIFFE ID")


def _check_authority(tbs: TbsCertificate, profile: AuthorityProfile, spiffe_id: SpiffeId) -> None:
    _require(spiffe_id.is_trust_domain_id, "X5-06 URI SAN of a CA certificate has a path")
    san = _find(tbs, x509.SubjectAlternativeName)
    _require(san is not None and len(list(san.value)) == 1, "SAN of a CA certificate holds more than its URI")
    constraints = _find(tbs, x509.BasicConstraints)
    if constraints is None or not constraints.value.ca:
        raise ProfileViolation("x509_certificate: X5-08 a root signs only CA certificates, cA is not true")
    _require(constraints.critical, "basic constraints of a CA certificate are not critical")
    path_length = constraints.value.path_length
    if profile.max_path_length is not None:
        _require(path_length is not None and path_length <= profile.max_path_length, "pathLen exceeds max_path_length")
    usages = _key_usages(tbs)
    _require("key_cert_sign" in usages, "X5-11 key usage of a CA certificate lacks keyCertSign")
    _require(
        usages <= {"key_cert_sign", "crl_sign"}, "key usage of a CA certificate has more than keyCertSign, cRLSign"
    )
    _check_extended_usage(tbs, required=False)


def _check_leaf(tbs: TbsCertificate, record: KeyRecord, spiffe_id: SpiffeId) -> None:
    _require(not spiffe_id.is_trust_domain_id, "X5-04 URI SAN of a leaf has no path")
    constraints = _find(tbs, x509.BasicConstraints)
    is_leaf = constraints is None or not constraints.value.ca
    _require(is_leaf, "X5-09 an issuing authority signs only leaves, cA is true")
    _require(_find(tbs, x509.NameConstraints) is None, "name constraints stand in a leaf")
    _require(_key_usages(tbs) == {"digital_signature"}, "X5-12 key usage of a leaf is not digitalSignature only")
    _require(tbs.spki_der != record.spki_der, "X5-07 the subject public key is the authority's own")
    _check_extended_usage(tbs, required=True)


def _key_usages(tbs: TbsCertificate) -> frozenset[str]:
    extension = _find(tbs, x509.KeyUsage)
    if extension is None or not extension.critical:
        raise ProfileViolation("x509_certificate: X5-10 key usage is missing or not critical")
    return frozenset(name for name in _KEY_USAGES if getattr(extension.value, name))


def _check_extended_usage(tbs: TbsCertificate, *, required: bool) -> None:
    extension = _find(tbs, x509.ExtendedKeyUsage)
    if extension is None:
        _require(not required, "X5-14 extended key usage is missing")
        return
    _require(frozenset(extension.value) == _BOTH_USAGES, "X5-15 extended key usage is not serverAuth and clientAuth")


def _find(tbs: TbsCertificate, kind: type[_Ext]) -> x509.Extension[_Ext] | None:
    try:
        return tbs.extensions.get_extension_for_class(kind)
    except x509.ExtensionNotFound:
        return None


def _s(span: timedelta) -> int:
    return int(span / timedelta(seconds=1))


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ProfileViolation(f"x509_certificate: {rule}")
