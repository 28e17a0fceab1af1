"""The ResponseData of an OCSP response by the authority itself, about certificates of its own. Spec: RFC 6960 4.2.1; RFC 9654 2.1 (nonce).

The responder is this key, by its authority's name or by the hash of its public key, and so is the issuer of every certificate asked about. A
delegated responder (RFC 6960 4.2.2.2) has a key and a certificate of its own and is not offered.
"""

from __future__ import annotations

import hashlib
from datetime import datetime

from cryptography.x509 import ocsp
from keyreeve_common.errors import PurposeMismatch
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import SignatureScheme

from keyreeve_keyserver.domain.der import (
    BIT_STRING,
    OCTET_STRING,
    OID,
    SEQUENCE,
    DerError,
    Element,
    encode,
    read_element,
)
from keyreeve_keyserver.domain.keys import AuthorityProfile, KeyRecord
from keyreeve_keyserver.domain.purposes.tbs_certificate import ALGORITHM_DER
from keyreeve_keyserver.domain.purposes.x509_errors import UNREADABLE
from keyreeve_keyserver.domain.purposes.x509_status import ENUMERATED, REASONS, StatusRules

MAX_RESPONSES = 64
MAX_NONCE_BYTES = 128
_RULES = StatusRules(Purpose.OCSP_RESPONSE)
_BY_NAME, _BY_KEY, _RESPONSE_EXTENSIONS = 0xA1, 0xA2, 0xA1
_GOOD, _REVOKED, _UNKNOWN, _NEXT_UPDATE, _REASON = 0x80, 0xA1, 0x82, 0xA0, 0xA0
_NONCE = bytes.fromhex("2b0601050507300102")
_BASIC = bytes.fromhex("2b0601050507300101")
_NULL = bytes.fromhex("0500")
_HASH_OIDS = {
    "sha1": "2b0e03021a",  # names a certificate, protects nothing: what clients send. Spec: RFC 6960 4.3
    "sha256": "608648016503040201",
    "sha384": "608648016503040202",
    "sha512": "608648016503040203",
}
_HASHES = {
    encode(SEQUENCE, encode(OID, bytes.fromhex(oid)), parameters): name
    for name, oid in _HASH_OIDS.items()
    for parameters in (b"", _NULL)
}


def check_ocsp_response(message: bytes, record: KeyRecord, scheme: SignatureScheme, now: datetime) -> None:
    """Raises: PurposeMismatch when it is no ResponseData, ProfileViolation when this authority may not say it."""
    try:
        _check(message, record, _RULES.profile_of(record), now)
        _check_one_form(message, scheme)
    except DerError as error:
        raise PurposeMismatch(f"ocsp_response: {error}") from None
    except UNREADABLE:
        raise PurposeMismatch("ocsp_response: message is not a ResponseData") from None


def _check(message: bytes, record: KeyRecord, profile: AuthorityProfile, now: datetime) -> None:
    fields = read_element(message, SEQUENCE, "ResponseData").children()
    _require(len(fields) in (3, 4), "message is not a ResponseData of version 1")
    responder, produced, responses, *extensions = fields
    _check_responder(responder, record, profile)
    _RULES.recent(profile, _RULES.time(produced, "producedAt", generalized=True), "producedAt", now)
    singles = responses.children() if responses.tag == SEQUENCE else []
    _require(1 <= len(singles) <= MAX_RESPONSES, f"responses is no SEQUENCE of 1 to {MAX_RESPONSES}")
    for single in singles:
        _check_single(single, record, profile, now)
    for wrapper in extensions:
        parts = wrapper.children() if wrapper.tag == _RESPONSE_EXTENSIONS else []
        _require(len(parts) == 1, "responseExtensions have no form")
        _RULES.extensions(parts[0], {_NONCE: _is_nonce}, "responseExtensions")


def _check_responder(responder: Element, record: KeyRecord, profile: AuthorityProfile) -> None:
    _require(responder.tag in (_BY_NAME, _BY_KEY), "responderID is neither byName nor byKey")
    if responder.tag == _BY_NAME:
        own = encode(_BY_NAME, profile.subject_der)
    else:
        own = encode(_BY_KEY, encode(OCTET_STRING, _key_hash(record, "sha1")))
    _RULES.demand(responder.encoded == own, "responder is not this authority")


def _check_single(single: Element, record: KeyRecord, profile: AuthorityProfile, now: datetime) -> None:
    parts = single.children() if single.tag == SEQUENCE else []
    _require(len(parts) == 4, "a response is not certID, status, thisUpdate and nextUpdate")
    certificate, status, this_update, wrapper = parts
    _check_certificate_id(certificate, record, profile)
    _check_status(status, now)
    ends = wrapper.children() if wrapper.tag == _NEXT_UPDATE else []
    _require(len(ends) == 1, "nextUpdate is missing")
    begins = _RULES.time(this_update, "thisUpdate", generalized=True)
    _RULES.life(profile, begins, _RULES.time(ends[0], "nextUpdate", generalized=True), now)


def _check_certificate_id(element: Element, record: KeyRecord, profile: AuthorityProfile) -> None:
    parts = element.children() if element.tag == SEQUENCE else []
    shaped = len(parts) == 4 and parts[1].tag == parts[2].tag == OCTET_STRING
    name = _HASHES.get(parts[0].encoded) if shaped else None
    if name is None:
        raise PurposeMismatch("ocsp_response: certID has no form, or a hash that is not known")
    own_name = hashlib.new(name, profile.subject_der).digest()
    is_own = parts[1].value == own_name and parts[2].value == _key_hash(record, name)
    _RULES.demand(is_own, "the certificate's issuer is not this authority")
    _RULES.serial(parts[3])


def _check_status(status: Element, now: datetime) -> None:
    if status.tag in (_GOOD, _UNKNOWN):
        _require(status.value == b"", "status good or unknown is not NULL")
        return
    parts = status.children() if status.tag == _REVOKED else []
    _require(len(parts) in (1, 2), "status is none of good, revoked, unknown")
    _RULES.past(_RULES.time(parts[0], "revocationTime", generalized=True), "revocationTime", now)
    for wrapper in parts[1:]:
        reasons = wrapper.children() if wrapper.tag == _REASON else []
        known = len(reasons) == 1 and reasons[0].tag == ENUMERATED and len(reasons[0].value) == 1
        _require(known and reasons[0].value[0] in REASONS, "revocationReason is not known")


def _is_nonce(value: bytes, critical: bool) -> bool:
    return not critical and 1 <= len(read_element(value, OCTET_STRING, "nonce").value) <= MAX_NONCE_BYTES


def _key_hash(record: KeyRecord, name: str) -> bytes:
    """Of the BIT STRING's value in the SPKI, without tag, length and number of unused bits."""
    bits = read_element(record.spki_der, SEQUENCE, "SubjectPublicKeyInfo").children()[1].value[1:]
    return hashlib.new(name, bits).digest()


def _check_one_form(message: bytes, scheme: SignatureScheme) -> None:
    """A second reader, not ours, finds the same bytes in it."""
    basic = encode(SEQUENCE, message, ALGORITHM_DER[scheme], encode(BIT_STRING, b"\0"))
    body = encode(SEQUENCE, encode(OID, _BASIC), encode(OCTET_STRING, basic))
    whole = encode(SEQUENCE, encode(ENUMERATED, b"\0"), encode(0xA0, body))
    response = ocsp.load_der_ocsp_response(whole)
    _require(response.tbs_response_bytes == message, "message is not in its one DER form")
    _ = list(response.extensions), list(response.responses)


def _require(condition: bool, rule: str) -> None:
    _RULES.require(condition, rule)
