"""The lint before issuance: named rules over a lint certificate, which has the very TBS that the key cluster is asked to sign.

It is written apart from `issuance`, reads the certificate only, and so catches what the builder got wrong. `lint_svid` gives the names of the
rules that are broken; `check_svid` raises. Spec: X509-SVID 2 to 4; RFC 5280 4; boulder's linting certificates and goodkey.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from math import gcd, isqrt

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID
from keyreeve_common.errors import InvalidSpiffeId, KeyTypeNotSupported, ProfileViolation
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.schemes import key_type_of
from keyreeve_common.x509_svid import RESERVED_DNS_ZONE, tls_name_of

FERMAT_ROUNDS = 110
_SMALL_PRIMES = 3 * 5 * 7 * 11 * 13 * 17 * 19 * 23 * 29 * 31 * 37 * 41 * 43 * 47 * 53
_KNOWN = {
    ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    ExtensionOID.BASIC_CONSTRAINTS,
    ExtensionOID.KEY_USAGE,
    ExtensionOID.EXTENDED_KEY_USAGE,
    ExtensionOID.SUBJECT_KEY_IDENTIFIER,
    ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
}
_OTHER_USAGES = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")


@dataclass(frozen=True, slots=True)
class LintContext:
    """What the leaf is held against. `blocked` are SHA-256 hashes of SPKIs that no leaf may have."""

    trust_domain: TrustDomain
    issuer: x509.Certificate
    now: datetime
    max_life: timedelta
    max_backdate: timedelta = timedelta(hours=1)
    infrastructure: bool = False
    blocked: frozenset[bytes] = field(default=frozenset())


def spki_hash(public_key: object) -> bytes:
    return sha256(public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class _Leaf:
    certificate: x509.Certificate
    context: LintContext

    @property
    def san(self) -> x509.Extension[x509.SubjectAlternativeName]:
        return self.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)

    @property
    def uris(self) -> list[str]:
        return self.san.value.get_values_for_type(x509.UniformResourceIdentifier)

    @property
    def spiffe_id(self) -> SpiffeId:
        return SpiffeId.parse(self.uris[0])

    @property
    def usage(self) -> x509.Extension[x509.KeyUsage]:
        return self.certificate.extensions.get_extension_for_class(x509.KeyUsage)

    @property
    def life(self) -> timedelta:
        return self.certificate.not_valid_after_utc - self.certificate.not_valid_before_utc


def _dns_names_are_own(leaf: _Leaf) -> bool:
    """A name in the reserved zone is the one of this very SPIFFE ID, and stands in agents' and services' SVIDs only."""
    names = leaf.san.value.get_values_for_type(x509.DNSName)
    reserved = [name for name in names if ("." + name).endswith("." + RESERVED_DNS_ZONE)]
    return reserved == ([tls_name_of(leaf.spiffe_id)] if leaf.context.infrastructure else [])


def _path_fits_kind(leaf: _Leaf) -> bool:
    reserved = (leaf.spiffe_id.path + "/").startswith("/keyreeve/")
    return reserved == leaf.context.infrastructure


def _serial_is_good(leaf: _Leaf) -> bool:
    serial = leaf.certificate.serial_number
    return serial > 0 and 64 <= serial.bit_length() <= 159


def _aki_names_issuer(leaf: _Leaf) -> bool:
    aki = leaf.certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    ski = leaf.context.issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return aki.key_identifier == ski.digest and aki.authority_cert_issuer is None


def _ski_is_of_key(leaf: _Leaf) -> bool:
    ski = leaf.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    own = x509.SubjectKeyIdentifier.from_public_key(leaf.certificate.public_key())
    return ski.value == own and not ski.critical


def _eku_is_both(leaf: _Leaf) -> bool:
    usages = list(leaf.certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    both = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    return set(usages) == both and len(usages) == 2


def _is_not_ca(leaf: _Leaf) -> bool:
    constraints = leaf.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    return not constraints.ca and constraints.path_length is None


def _usage_is_signing_only(leaf: _Leaf) -> bool:
    usage = leaf.usage.value
    return usage.digital_signature and not any(getattr(usage, name) for name in _OTHER_USAGES)


def _key_is_strong(leaf: _Leaf) -> bool:
    """Spec: boulder goodkey: exponent 65537, no small factor, no primes that lie close together (Fermat)."""
    key = leaf.certificate.public_key()
    if not isinstance(key, rsa.RSAPublicKey):
        return True
    numbers = key.public_numbers()
    if numbers.e != 65537 or numbers.n % 2 == 0 or gcd(numbers.n, _SMALL_PRIMES) != 1:
        return False
    root = isqrt(numbers.n) + 1
    return not any(_is_square((root + step) ** 2 - numbers.n) for step in range(FERMAT_ROUNDS))


def _is_square(number: int) -> bool:
    return number >= 0 and isqrt(number) ** 2 == number


RULES: dict[str, Callable[[_Leaf], bool]] = {
    "version_is_3": lambda leaf: leaf.certificate.version is x509.Version.v3,
    "serial_has_64_bits_and_at_most_20_octets": _serial_is_good,
    "issuer_is_the_authority": lambda leaf: leaf.certificate.issuer == leaf.context.issuer.subject,
    "x5_01_one_uri_san": lambda leaf: len(leaf.uris) == 1,
    "x5_04_path": lambda leaf: not leaf.spiffe_id.is_trust_domain_id,
    "x5_05_empty_subject_and_critical_san": lambda leaf: not list(leaf.certificate.subject) and leaf.san.critical,
    "spiffe_id_in_trust_domain": lambda leaf: leaf.spiffe_id.member_of(leaf.context.trust_domain),
    "reserved_path_for_agents_and_services": _path_fits_kind,
    "san_holds_uri_and_dns_only": lambda leaf: all(
        isinstance(name, (x509.UniformResourceIdentifier, x509.DNSName)) for name in leaf.san.value
    ),
    "reserved_dns_zone": _dns_names_are_own,
    "x5_09_ca_false": _is_not_ca,
    "x5_10_key_usage_critical": lambda leaf: leaf.usage.critical,
    "x5_12_digital_signature_only": _usage_is_signing_only,
    "x5_13_no_cert_sign_no_crl_sign": lambda leaf: not (leaf.usage.value.key_cert_sign or leaf.usage.value.crl_sign),
    "x5_15_both_extended_key_usages": _eku_is_both,
    "ski_is_of_the_key": _ski_is_of_key,
    "aki_names_the_authority": _aki_names_issuer,
    "extensions_are_known": lambda leaf: {ext.oid for ext in leaf.certificate.extensions} == _KNOWN,
    "validity_is_forward": lambda leaf: leaf.life > timedelta(0),
    "validity_within_profile": lambda leaf: leaf.life <= leaf.context.max_life + leaf.context.max_backdate,
    "not_after_within_authority": lambda leaf: (
        leaf.certificate.not_valid_after_utc <= leaf.context.issuer.not_valid_after_utc
    ),
    "not_after_in_the_future": lambda leaf: leaf.certificate.not_valid_after_utc > leaf.context.now,
    "not_before_not_too_far_back": lambda leaf: (
        leaf.certificate.not_valid_before_utc >= leaf.context.now - leaf.context.max_backdate - timedelta(seconds=1)
    ),
    "not_before_not_in_the_future": lambda leaf: (
        leaf.certificate.not_valid_before_utc <= leaf.context.now + timedelta(seconds=1)
    ),
    "key_type_is_offered": lambda leaf: key_type_of(leaf.certificate.public_key()) is not None,
    "key_is_strong": _key_is_strong,
    "x5_07_key_is_no_authority_and_not_blocked": lambda leaf: (
        spki_hash(leaf.certificate.public_key())
        not in leaf.context.blocked | {spki_hash(leaf.context.issuer.public_key())}
    ),
}


def lint_svid(certificate: x509.Certificate, context: LintContext) -> tuple[str, ...]:
    """The names of the broken rules; a rule that cannot be read is broken."""
    leaf = _Leaf(certificate, context)
    return tuple(name for name, holds in RULES.items() if not _holds(holds, leaf))


def _holds(rule: Callable[[_Leaf], bool], leaf: _Leaf) -> bool:
    unreadable = (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError, IndexError, KeyTypeNotSupported)
    try:
        return rule(leaf)
    except (InvalidSpiffeId, *unreadable):
        return False


def check_svid(certificate: x509.Certificate, context: LintContext) -> None:
    """Raises: ProfileViolation, which names the rules."""
    broken = lint_svid(certificate, context)
    if broken:
        raise ProfileViolation(f"lint before issuance: {', '.join(broken)}")


def check_authority(
    certificate: x509.Certificate, *, trust_domain: TrustDomain, issuer: x509.Certificate | None, now: datetime
) -> None:
    """The lint of CA certificates. Raises: ProfileViolation, which names the rules. Spec: X5-06, X5-08, X5-11; ID-20, ID-21."""
    extensions = certificate.extensions
    constraints = extensions.get_extension_for_class(x509.BasicConstraints)
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    end = certificate.not_valid_after_utc
    rules = {
        "x5_08_ca_true": constraints.value.ca and constraints.critical,
        "path_length_is_bounded": constraints.value.path_length == (0 if issuer else 1),
        "x5_11_cert_sign": usage.critical and usage.value.key_cert_sign and not usage.value.digital_signature,
        "id_20_uri_is_the_trust_domain": list(names) == [x509.UniformResourceIdentifier(str(trust_domain.id))],
        "subject_is_not_empty": bool(list(certificate.subject)),
        "issuer_is_the_root": certificate.issuer == (issuer.subject if issuer else certificate.subject),
        "validity_is_forward": now < end and certificate.not_valid_before_utc < end,
        "not_after_within_authority": issuer is None or end <= issuer.not_valid_after_utc,
        "key_is_not_the_issuers": issuer is None
        or spki_hash(certificate.public_key()) != spki_hash(issuer.public_key()),
        "ski_is_there": bool(extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest),
    }
    broken = [name for name, holds in rules.items() if not holds]
    if broken:
        raise ProfileViolation(f"lint before issuance: {', '.join(broken)}")
