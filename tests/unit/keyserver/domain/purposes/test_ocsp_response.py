"""OCSP responses: by this very authority, about certificates of its own, and not for longer than the profile lets them live."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import ocsp
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import KeyreeveError, ProfileViolation, PurposeMismatch, PurposeNotPermitted
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import SignatureScheme
from keyreeve_keyserver.domain.der import OCTET_STRING, SEQUENCE, encode, read_element
from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_keyserver.domain.purposes import check_request
from keyreeve_keyserver.domain.purposes.ocsp_response import check_ocsp_response
from keyreeve_testing import tbs
from keyreeve_testing.statements import HOUR, Crl, Ocsp, at_production, authority_certificate, authority_record, changed
from keyreeve_testing.tbs import NOW, certification_request_info

P256 = SignatureScheme.ECDSA_SECP256R1_SHA256
RECORD = authority_record()
GOOD = Ocsp()
MESSAGE = at_production(GOOD.tbs())
STRANGER = ec.derive_private_key(99, ec.SECP256R1())
OTHER_NAME = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "another")])
EARLY = NOW - timedelta(seconds=61)
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
REVOKED = changed(GOOD, status=ocsp.OCSPCertStatus.REVOKED, revoked_at=NOW - HOUR)


def judge(message: bytes, record: KeyRecord = RECORD, now: datetime = NOW) -> None:
    check_request(message, record, purpose=Purpose.OCSP_RESPONSE, scheme=P256, now=now)


def refused(message: bytes, kind: type[KeyreeveError], rule: str) -> None:
    with pytest.raises(kind, match=f"ocsp_response: .*({rule})"):
        judge(message)


@pytest.mark.parametrize(
    "response",
    [
        GOOD,
        changed(GOOD, by_name=True),
        changed(GOOD, algorithm=hashes.SHA256),
        changed(GOOD, status=ocsp.OCSPCertStatus.UNKNOWN),
        REVOKED,
        changed(REVOKED, reason=x509.ReasonFlags.key_compromise),
        changed(GOOD, extensions=()),
        changed(GOOD, this_update=NOW - timedelta(seconds=60), next_update=NOW + timedelta(minutes=59)),
    ],
)
def test_responses_of_this_authority_pass(response: Ocsp) -> None:
    judge(at_production(response.tbs()))


OUTSIDE: dict[str, tuple[Ocsp, str]] = {
    "responder by another key": (changed(GOOD, key=STRANGER, issuer=authority_certificate()), "responder is not this authority"),
    "responder by another name": (changed(GOOD, by_name=True, responder=authority_certificate(name=OTHER_NAME)), "responder is not this"),
    "issuer of another name": (changed(GOOD, leaf=replace(tbs.LEAF, issuer=OTHER_NAME)), "issuer is not this authority"),
    "issuer of another key": (changed(GOOD, issuer=authority_certificate(STRANGER)), "issuer is not this authority"),
    "too long": (changed(GOOD, next_update=NOW + HOUR + timedelta(seconds=1)), "nextUpdate is more than 3600 s"),
    "too early": (changed(GOOD, this_update=EARLY, next_update=NOW + timedelta(minutes=9)), "thisUpdate lies further back"),
    "in the future": (changed(GOOD, this_update=NOW + timedelta(seconds=61)), "thisUpdate lies in the future"),
    "revoked in the future": (changed(REVOKED, revoked_at=NOW + HOUR), "revocationTime lies in the future"),
    "unknown extension": (changed(GOOD, extensions=((UNKNOWN, False),)), r"hold 1\.2\.3\.4"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_the_profile_does_not_allow_is_refused(name: str) -> None:
    response, rule = OUTSIDE[name]
    refused(at_production(response.tbs()), ProfileViolation, rule)


def test_other_forms_are_refused() -> None:
    for response, rule in (
        (changed(GOOD, next_update=None), "certID, status, thisUpdate and nextUpdate"),
        (changed(GOOD, extensions=((x509.OCSPNonce(b"n" * 129), False),)), "in a wrong form"),
        (changed(GOOD, extensions=((x509.OCSPNonce(b"n"), True),)), "in a wrong form"),
        (changed(REVOKED, reason=x509.ReasonFlags.remove_from_crl), "revocationReason is not known"),
    ):
        refused(at_production(response.tbs()), PurposeMismatch, rule)


def test_produced_long_ago_or_later_is_refused() -> None:
    refused(at_production(MESSAGE, NOW - timedelta(seconds=61)), ProfileViolation, "producedAt lies further back")
    refused(at_production(MESSAGE, NOW + timedelta(seconds=61)), ProfileViolation, "producedAt lies in the future")
    with pytest.raises(ProfileViolation, match="further back"):
        judge(MESSAGE, now=NOW + timedelta(minutes=2))


def parts() -> list[bytes]:
    return [part.encoded for part in read_element(MESSAGE, SEQUENCE, "ResponseData").children()]


def single(change: Callable[[list[bytes]], None]) -> bytes:
    """The message with its one response changed."""
    whole = parts()
    inside = [part.encoded for part in read_element(whole[2], SEQUENCE, "responses").children()[0].children()]
    change(inside)
    whole[2] = encode(SEQUENCE, encode(SEQUENCE, *inside))
    return encode(SEQUENCE, *whole)


def put(at: int, value: bytes) -> Callable[[list[bytes]], None]:
    return lambda inside: inside.__setitem__(at, value)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (put(0, encode(SEQUENCE)), "certID has no form"),
        (put(0, encode(SEQUENCE, encode(SEQUENCE), encode(4, b"a"), encode(4, b"b"), encode(2, b"\x01"))), "certID has no"),
        (put(1, b"\x80\x01\x00"), "good or unknown is not NULL"),
        (put(1, b"\x83\x00"), "status is none of"),
        (put(1, b"\xa1\x00"), "status is none of"),
        (put(1, encode(0xA1, encode(0x17, b"260101000000Z"))), "revocationTime is not a time of the right type"),
        (put(2, encode(0x17, b"261123040000Z")), "thisUpdate is not a time of the right type"),
        (put(2, encode(0x18, b"20261123040000.5Z")), "thisUpdate is no time"),
        (put(3, encode(0xA0)), "nextUpdate is missing"),
        (put(3, encode(0xA1, encode(0x18, b"20261123050000Z"))), "nextUpdate is missing"),
        (lambda inside: inside.append(encode(0xA1, encode(SEQUENCE))), "certID, status, thisUpdate and nextUpdate"),
    ],
)  # fmt: skip
def test_bent_responses_are_refused(change: Callable[[list[bytes]], None], rule: str) -> None:
    refused(single(change), PurposeMismatch, rule)


def test_bent_structures_are_refused() -> None:
    responder, produced, responses, extensions = parts()
    one = read_element(responses, SEQUENCE, "responses").children()[0].encoded
    for message, rule in (
        (
            encode(SEQUENCE, encode(0xA0, encode(2, b"\x00")), responder, produced, responses),
            "neither byName nor byKey",
        ),
        (encode(SEQUENCE, responder, produced), "not a ResponseData"),
        (encode(SEQUENCE, responder, produced, encode(SEQUENCE)), "no SEQUENCE of 1 to 64"),
        (encode(SEQUENCE, responder, produced, encode(SEQUENCE, one * 65)), "no SEQUENCE of 1 to 64"),
        (encode(SEQUENCE, responder, produced, responses, encode(0xA2, b"")), "responseExtensions have no form"),
        (
            encode(SEQUENCE, responder, produced, responses, encode(0xA1, encode(SEQUENCE))),
            "responseExtensions are empty",
        ),
        (encode(SEQUENCE, responder, encode(0x17, b"261123040000Z"), responses), "producedAt is not a time"),
        (encode(SEQUENCE, encode(0xA3, b""), produced, responses), "neither byName nor byKey"),
        (MESSAGE + b"\x00", "bytes stand after ResponseData"),
        (encode(OCTET_STRING, MESSAGE), "ResponseData has tag"),
        (b"", "cut short"),
    ):
        refused(message, PurposeMismatch, rule)
    judge(encode(SEQUENCE, responder, produced, encode(SEQUENCE, one * 64), extensions))


def test_what_else_an_authority_signs_is_no_response() -> None:
    for message in (tbs.LEAF.tbs(), certification_request_info(tbs.AUTHORITY_KEY), Crl().tbs(), bytes(32)):
        with pytest.raises((PurposeMismatch, ProfileViolation)):
            judge(message)
    for purpose in (Purpose.X509_CERTIFICATE, Purpose.CERTIFICATE_REQUEST, Purpose.X509_CRL):
        with pytest.raises(PurposeMismatch):
            check_request(MESSAGE, RECORD, purpose=purpose, scheme=P256, now=NOW)


def test_only_keys_made_for_it_sign_responses() -> None:
    with pytest.raises(PurposeNotPermitted, match="key was not created for ocsp_response"):
        judge(MESSAGE, tbs.authority_record())
    with pytest.raises(ProfileViolation, match="no authority profile"):
        check_ocsp_response(MESSAGE, tbs.handshake_record(), P256, NOW)


@given(st.integers(0, len(MESSAGE) - 1), st.integers(1, 255))
def test_one_changed_byte_outside_the_free_fields_is_refused(at: int, change: int) -> None:
    """Free are the serial number, the status' kind, the nonce, and times within their bounds."""
    message = bytearray(MESSAGE)
    message[at] ^= change
    try:
        judge(bytes(message))
    except (PurposeMismatch, ProfileViolation):
        return
    assert at in FREE


def _free() -> set[int]:
    free: set[int] = set()
    serial = encode(2, tbs.SERIAL.to_bytes(13, "big"))
    for field in (serial, b"\x80\x00", b"n" * 16, NOW.strftime("%Y%m%d%H%M%SZ").encode()):
        at = MESSAGE.find(field)
        while at >= 0:
            free.update(range(at, at + len(field)))
            at = MESSAGE.find(field, at + 1)
    at = MESSAGE.index(b"20261123050000Z")
    return free | set(range(at, at + 15))


FREE = _free()
