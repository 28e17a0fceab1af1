"""A TBSCertList of this very authority: version 2, complete, about its own certificates, with a bounded life.

No delta CRL, no indirect CRL: neither a part of the truth nor somebody else's certificates. Spec: RFC 5280 5.1 to 5.3.
"""

from __future__ import annotations

from datetime import datetime

from cryptography import x509
from keyreeve_common.errors import PurposeMismatch
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import SignatureScheme

from keyreeve_keyserver.domain.der import BIT_STRING, INTEGER, SEQUENCE, DerError, Element, encode, read_element
from keyreeve_keyserver.domain.keys import AuthorityProfile, KeyRecord
from keyreeve_keyserver.domain.purposes.tbs_certificate import ALGORITHM_DER
from keyreeve_keyserver.domain.purposes.x509_errors import UNREADABLE
from keyreeve_keyserver.domain.purposes.x509_status import (
    ENUMERATED,
    GENERALIZED_TIME,
    REASONS,
    UTC_TIME,
    ExtensionForm,
    StatusRules,
)

_RULES = StatusRules(Purpose.X509_CRL)
_TIMES = (UTC_TIME, GENERALIZED_TIME)
_EXTENSIONS, _KEY_IDENTIFIER, _DISTRIBUTION_POINT, _FULL_NAME, _URI = 0xA0, 0x80, 0xA0, 0xA0, 0x86
_ONLY_USER, _ONLY_CA = 0x81, 0x82
_AUTHORITY_KEY_IDENTIFIER = bytes.fromhex("551d23")
_CRL_NUMBER = bytes.fromhex("551d14")
_ISSUING_DISTRIBUTION_POINT = bytes.fromhex("551d1c")
_REASON_CODE = bytes.fromhex("551d15")
_INVALIDITY_DATE = bytes.fromhex("551d18")


def check_x509_crl(message: bytes, record: KeyRecord, scheme: SignatureScheme, now: datetime) -> None:
    """Raises: PurposeMismatch when it is no TBSCertList, ProfileViolation when this authority may not say it."""
    try:
        _check(message, _RULES.profile_of(record), scheme, now)
    except DerError as error:
        raise PurposeMismatch(f"x509_crl: {error}") from None
    except UNREADABLE:
        raise PurposeMismatch("x509_crl: message is not a TBSCertList") from None


def _check(message: bytes, profile: AuthorityProfile, scheme: SignatureScheme, now: datetime) -> None:
    fields = read_element(message, SEQUENCE, "TBSCertList").children()
    _require(len(fields) in (6, 7), "message is not a TBSCertList of version 2 with nextUpdate and extensions")
    version, algorithm, issuer, this_update, next_update, *revoked, extensions = fields
    _require(version.encoded == encode(INTEGER, b"\x01"), "version is not v2")
    _require(
        algorithm.encoded == ALGORITHM_DER[scheme],
        f"signature algorithm in the message is not that of {scheme.iana_name}",
    )
    _RULES.demand(issuer.encoded == profile.subject_der, "issuer is not the subject of the authority's profile")
    begins, ends = _RULES.time(this_update, "thisUpdate"), _RULES.time(next_update, "nextUpdate")
    _RULES.life(profile, begins, ends, now)
    for listed in revoked:
        _check_revoked(listed, now)
    _check_extensions(extensions)
    _check_one_form(message, algorithm)


def _check_revoked(revoked: Element, now: datetime) -> None:
    entries = revoked.children() if revoked.tag == SEQUENCE else []
    _require(bool(entries), "revokedCertificates is empty, or no SEQUENCE")
    seen: set[int] = set()
    for entry in entries:
        parts = entry.children() if entry.tag == SEQUENCE else []
        _require(len(parts) in (2, 3), "a revoked certificate has no serial number and time")
        serial = _RULES.serial(parts[0])
        _require(serial not in seen, "a serial number is listed twice")
        seen.add(serial)
        _RULES.past(_RULES.time(parts[1], "revocationDate"), "revocationDate", now)
        for extensions in parts[2:]:
            _RULES.extensions(extensions, _ENTRY_EXTENSIONS, "crlEntryExtensions")


def _check_extensions(wrapper: Element) -> None:
    parts = wrapper.children() if wrapper.tag == _EXTENSIONS else []
    _require(len(parts) == 1, "crlExtensions are missing")
    found = _RULES.extensions(parts[0], _CRL_EXTENSIONS, "crlExtensions")
    _require({_AUTHORITY_KEY_IDENTIFIER, _CRL_NUMBER} <= found, "authority key identifier or CRL number is missing")


def _is_key_identifier(value: bytes, critical: bool) -> bool:
    parts = read_element(value, SEQUENCE, "authority key identifier").children()
    return not critical and [part.tag for part in parts] == [_KEY_IDENTIFIER] and 1 <= len(parts[0].value) <= 64


def _is_crl_number(value: bytes, critical: bool) -> bool:
    number = read_element(value, INTEGER, "CRL number").value
    return not critical and len(number) <= 20 and number[0] < 0x80


def _is_distribution_point(value: bytes, critical: bool) -> bool:
    """At most URIs and one of onlyContainsUserCerts and onlyContainsCACerts: no indirect CRL, no part of the reasons."""
    parts = read_element(value, SEQUENCE, "issuing distribution point").children()
    tags = [part.tag for part in parts]
    flags = [tag for tag in tags if tag in (_ONLY_USER, _ONLY_CA)]
    named = tags[: len(tags) - len(flags)]
    return (
        critical
        and bool(parts)
        and len(flags) <= 1
        and named in ([], [_DISTRIBUTION_POINT])
        and all(part.value == b"\xff" for part in parts if part.tag in flags)
        and all(_is_uris(part) for part in parts if part.tag == _DISTRIBUTION_POINT)
    )


def _is_uris(point: Element) -> bool:
    names = point.children()
    uris = names[0].children() if [name.tag for name in names] == [_FULL_NAME] else []
    return bool(uris) and all(uri.tag == _URI and uri.value.isascii() and uri.value != b"" for uri in uris)


def _is_reason(value: bytes, critical: bool) -> bool:
    reason = read_element(value, ENUMERATED, "reason code").value
    return not critical and len(reason) == 1 and reason[0] in REASONS


def _is_invalidity_date(value: bytes, critical: bool) -> bool:
    _RULES.time(read_element(value, GENERALIZED_TIME, "invalidity date"), "invalidity date", generalized=True)
    return not critical


_CRL_EXTENSIONS: dict[bytes, ExtensionForm] = {
    _AUTHORITY_KEY_IDENTIFIER: _is_key_identifier,
    _CRL_NUMBER: _is_crl_number,
    _ISSUING_DISTRIBUTION_POINT: _is_distribution_point,
}
_ENTRY_EXTENSIONS: dict[bytes, ExtensionForm] = {_REASON_CODE: _is_reason, _INVALIDITY_DATE: _is_invalidity_date}


def _check_one_form(message: bytes, algorithm: Element) -> None:
    """A second reader, not ours, finds the same bytes in it."""
    crl = x509.load_der_x509_crl(encode(SEQUENCE, message, algorithm.encoded, encode(BIT_STRING, b"\0")))
    _require(crl.tbs_certlist_bytes == message, "message is not in its one DER form")
    _ = list(crl.extensions)  # the entries are read above; twice would take long for a long list


def _require(condition: bool, rule: str) -> None:
    _RULES.require(condition, rule)
