"""CRLs: of this very authority, complete, and not for longer than the profile lets them live."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import KeyreeveError, ProfileViolation, PurposeMismatch, PurposeNotPermitted
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_keyserver.domain.der import OCTET_STRING, OID, SEQUENCE, encode, read_element
from keyreeve_keyserver.domain.keys import AuthorityKind, KeyRecord
from keyreeve_keyserver.domain.purposes import check_request
from keyreeve_testing import tbs
from keyreeve_testing.statements import HOUR, Crl, authority_record, changed
from keyreeve_testing.tbs import NOW, certification_request_info

P256 = SignatureScheme.ECDSA_SECP256R1_SHA256
RECORD = authority_record()
GOOD = Crl()
MESSAGE = GOOD.tbs()
OTHER_NAME = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "another")])
URI = x509.UniformResourceIdentifier("https://crl.td.test/1")
ISSUER_AND_SERIAL = x509.AuthorityKeyIdentifier(b"k", [x509.DirectoryName(OTHER_NAME)], 1)
REASON_NOT_CRITICAL = encode(
    SEQUENCE, encode(OID, b"\x55\x1d\x15"), b"\x01\x01\x00", encode(OCTET_STRING, b"\x0a\x01\x01")
)
KEY_IDENTIFIER, NUMBER = GOOD.extensions


def judge(message: bytes, record: KeyRecord = RECORD, scheme: SignatureScheme = P256, now: datetime = NOW) -> None:
    check_request(message, record, purpose=Purpose.X509_CRL, scheme=scheme, now=now)


def point(**changes: object) -> x509.IssuingDistributionPoint:
    fields: dict[str, object] = {
        "full_name": [URI],
        "relative_name": None,
        "only_contains_user_certs": False,
        "only_contains_ca_certs": False,
        "only_some_reasons": None,
        "indirect_crl": False,
        "only_contains_attribute_certs": False,
    }
    return x509.IssuingDistributionPoint(**(fields | changes))  # type: ignore[arg-type]  # by name, as the class has them


def entries(*extensions: tuple[x509.ExtensionType, bool]) -> Crl:
    return changed(GOOD, entry_extensions=extensions)


def extended(*extensions: tuple[x509.ExtensionType, bool]) -> Crl:
    return changed(GOOD, extensions=(*GOOD.extensions, *extensions))


@pytest.mark.parametrize(
    "crl",
    [
        GOOD,
        changed(GOOD, serials=()),
        changed(GOOD, serials=(1, (1 << 159) - 1)),
        changed(GOOD, this_update=NOW - timedelta(seconds=60), next_update=NOW + timedelta(minutes=59)),
        changed(GOOD, this_update=NOW + timedelta(seconds=60)),
        entries(),
        entries(
            (x509.CRLReason(x509.ReasonFlags.superseded), False), (x509.InvalidityDate(datetime(2026, 1, 1)), False)
        ),
        extended((point(), True)),
        extended((point(only_contains_user_certs=True), True)),
        extended((point(full_name=None, only_contains_ca_certs=True), True)),
    ],
)
def test_crls_of_this_authority_pass(crl: Crl) -> None:
    judge(crl.tbs())


def test_a_root_may_say_it_for_longer_but_not_for_ever() -> None:
    root = authority_record(AuthorityKind.ROOT)
    judge(changed(GOOD, next_update=NOW + timedelta(days=30)).tbs(), root)
    with pytest.raises(ProfileViolation, match="nextUpdate is more than 2592000 s"):
        judge(changed(GOOD, next_update=NOW + timedelta(days=31)).tbs(), root)


def test_other_key_types() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    record = authority_record(key=key, key_type=KeyType.ED25519)
    judge(changed(GOOD, key=key).tbs(), record, SignatureScheme.ED25519)
    with pytest.raises(PurposeMismatch, match="signature algorithm in the message is not that of ed25519"):
        judge(MESSAGE, record, SignatureScheme.ED25519)


OUTSIDE: dict[str, tuple[Crl, str]] = {
    "another issuer": (changed(GOOD, issuer=OTHER_NAME), "issuer is not the subject"),
    "too long": (changed(GOOD, next_update=NOW + HOUR + timedelta(seconds=1)), "nextUpdate is more than 3600 s after"),
    "too early": (
        changed(GOOD, this_update=NOW - timedelta(seconds=61)),
        r"further back than max_backdate_s \(60\)|more than 3600",
    ),
    "in the future": (changed(GOOD, this_update=NOW + timedelta(seconds=61)), "thisUpdate lies in the future"),
    "revoked in the future": (
        changed(GOOD, revoked_at=NOW + timedelta(seconds=61)),
        "revocationDate lies in the future",
    ),
    "delta": (extended((x509.DeltaCRLIndicator(1), True)), r"crlExtensions hold 2\.5\.29\.27"),
    "freshest": (
        extended((x509.FreshestCRL([x509.DistributionPoint([URI], None, None, None)]), False)),
        r"hold 2\.5\.29\.46",
    ),
    "unknown": (
        extended((x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), False)),
        r"hold 1\.2\.3\.4,",
    ),
    "indirect entry": (entries((x509.CertificateIssuer([URI]), True)), r"crlEntryExtensions hold 2\.5\.29\.29"),
}
MISFORMED: dict[str, tuple[Crl, str]] = {
    "no number": (changed(GOOD, extensions=(KEY_IDENTIFIER,)), "CRL number is missing"),
    "no key identifier": (changed(GOOD, extensions=(NUMBER,)), "authority key identifier or CRL number is missing"),
    "no extensions": (changed(GOOD, extensions=()), "crlExtensions are missing"),
    "critical number": (changed(GOOD, extensions=(KEY_IDENTIFIER, (NUMBER[0], True))), r"hold 2\.5\.29\.20 in a wrong form"),
    "issuer and serial": (changed(GOOD, extensions=((ISSUER_AND_SERIAL, False), NUMBER)), r"2\.5\.29\.35 in a wrong"),
    "indirect": (extended((point(indirect_crl=True), True)), r"2\.5\.29\.28 in a wrong form"),
    "some reasons": (extended((point(only_some_reasons=frozenset({x509.ReasonFlags.key_compromise})), True)), r"2\.5\.29\.28 in"),
    "attribute certificates": (extended((point(only_contains_attribute_certs=True), True)), r"2\.5\.29\.28 in a wrong form"),
    "point not critical": (extended((point(), False)), r"2\.5\.29\.28 in a wrong form"),
    "remove from CRL": (entries((x509.CRLReason(x509.ReasonFlags.remove_from_crl), False)), r"2\.5\.29\.21 in a wrong form"),
    "unspecified reason": (entries((x509.CRLReason(x509.ReasonFlags.unspecified), False)), r"2\.5\.29\.21 in a wrong form"),
    "critical reason": (entries((x509.CRLReason(x509.ReasonFlags.superseded), True)), r"2\.5\.29\.21 in a wrong form"),
    "listed twice": (changed(GOOD, serials=(9, 9)), "listed twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_the_profile_does_not_allow_is_refused(name: str) -> None:
    crl, rule = OUTSIDE[name]
    with pytest.raises(ProfileViolation, match=f"x509_crl: .*{rule}"):
        judge(crl.tbs())


@pytest.mark.parametrize("name", MISFORMED)
def test_other_forms_are_refused(name: str) -> None:
    crl, rule = MISFORMED[name]
    with pytest.raises(PurposeMismatch, match=f"x509_crl: .*{rule}"):
        judge(crl.tbs())


def test_a_crl_of_yesterday_is_refused() -> None:
    for now in (NOW + HOUR, NOW + timedelta(minutes=2)):
        with pytest.raises(ProfileViolation, match="back than max_backdate_s"):
            judge(MESSAGE, now=now)


def fields() -> list[bytes]:
    return [field.encoded for field in read_element(MESSAGE, SEQUENCE, "TBSCertList").children()]


def rebuilt(change: Callable[[list[bytes]], None]) -> bytes:
    parts = fields()
    change(parts)
    return encode(SEQUENCE, *parts)


def put(at: int, value: bytes) -> Callable[[list[bytes]], None]:
    return lambda parts: parts.__setitem__(at, value)


def entry(*parts: bytes) -> Callable[[list[bytes]], None]:
    return put(5, encode(SEQUENCE, encode(SEQUENCE, *parts)))


SERIAL, TIME = encode(2, b"\x09"), encode(0x17, b"260101000000Z")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (put(0, encode(2, b"\x00")), "version is not v2"),
        (lambda parts: parts.pop(0), "version is not v2|not a TBSCertList"),
        (lambda parts: parts.pop(4), "TBSCertList|no time|nextUpdate"),
        (put(3, encode(0x18, b"20261123040000Z")), "thisUpdate is GeneralizedTime before 2050"),
        (put(3, encode(0x17, b"2611230400Z")), "thisUpdate is no time"),
        (put(3, encode(0x17, b"261123040000+0000")), "thisUpdate is no time"),
        (put(3, encode(0x17, b"261323040000Z")), "thisUpdate is no time"),
        (put(5, encode(SEQUENCE)), "revokedCertificates is empty"),
        (put(5, encode(0x31)), "revokedCertificates is empty, or no SEQUENCE"),
        (entry(SERIAL), "no serial number and time"),
        (entry(encode(2, b"\x80"), TIME), "serial number is not positive"),
        (entry(encode(2, b"\x00"), TIME), "serial number is not positive"),
        (entry(encode(2, b"\x7f" * 21), TIME), "more than 20 octets"),
        (entry(encode(4, b"\x09"), TIME), "serial number is not an INTEGER"),
        (entry(SERIAL, TIME, encode(SEQUENCE)), "crlEntryExtensions are empty"),
        (entry(SERIAL, TIME, encode(SEQUENCE, encode(SEQUENCE, encode(OID, b"\x55\x1d\x15")))), "has no form"),
        (
            entry(SERIAL, TIME, encode(SEQUENCE, REASON_NOT_CRITICAL)),
            "has no form",
        ),
        (put(6, encode(0xA1, b"")), "crlExtensions are missing"),
        (lambda parts: parts.append(encode(0xA0)), "not a TBSCertList"),
    ],
)  # fmt: skip
def test_bent_structures_are_refused(change: Callable[[list[bytes]], None], rule: str) -> None:
    assert encode(SEQUENCE, *fields()) == MESSAGE
    with pytest.raises(PurposeMismatch, match=rule):
        judge(rebuilt(change))


def test_what_else_an_authority_signs_is_no_crl() -> None:
    for message in (tbs.LEAF.tbs(), certification_request_info(tbs.AUTHORITY_KEY), b"", bytes(32), MESSAGE + b"\x00"):
        with pytest.raises(PurposeMismatch):
            judge(message)
    for purpose in (Purpose.X509_CERTIFICATE, Purpose.CERTIFICATE_REQUEST, Purpose.OCSP_RESPONSE):
        with pytest.raises(PurposeMismatch):
            check_request(MESSAGE, RECORD, purpose=purpose, scheme=P256, now=NOW)


def test_only_keys_made_for_it_sign_crls() -> None:
    with pytest.raises(PurposeNotPermitted, match="key was not created for x509_crl"):
        judge(MESSAGE, tbs.authority_record())
    with pytest.raises(PurposeNotPermitted, match="handshake never signs for x509_crl"):
        judge(MESSAGE, tbs.handshake_record())


@given(
    st.lists(st.integers(1, (1 << 159) - 1), unique=True, max_size=12),
    st.integers(-60, 60),
    st.integers(61, 3_500),
)
def test_any_list_within_the_bounds_passes(serials: list[int], back: int, life: int) -> None:
    begins = NOW + timedelta(seconds=back)
    judge(changed(GOOD, serials=serials, this_update=begins, next_update=begins + timedelta(seconds=life)).tbs())


@given(st.integers(0, len(MESSAGE) - 1), st.integers(1, 255))
def test_one_changed_byte_never_escapes(at: int, change: int) -> None:
    """It passes only where the meaning stays within the bounds, and then another reader finds the same authority in it."""
    message = bytearray(MESSAGE)
    message[at] ^= change
    try:
        judge(bytes(message))
    except KeyreeveError as error:
        assert isinstance(error, (PurposeMismatch, ProfileViolation))  # noqa: PT017 - one of two
        return
    outer = encode(
        SEQUENCE, bytes(message), encode(SEQUENCE, encode(OID, bytes.fromhex("2a8648ce3d040302"))), b"\x03\x01\x00"
    )
    crl = x509.load_der_x509_crl(outer)
    assert crl.issuer == tbs.AUTHORITY_NAME
    assert crl.last_update_utc <= NOW + timedelta(minutes=1)
    assert crl.next_update_utc is not None
    assert crl.next_update_utc <= NOW + HOUR + timedelta(minutes=1)
