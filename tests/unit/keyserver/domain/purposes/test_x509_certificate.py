"""TBSCertificates: those that keep their profile pass, and each rule of the profile refuses by name."""

from __future__ import annotations

import ipaddress
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import ProfileViolation, PurposeMismatch
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_keyserver.domain.keys import AuthorityKind, KeyRecord
from keyreeve_keyserver.domain.purposes import check_request
from keyreeve_testing.tbs import (
    AUTHORITY_KEY,
    AUTHORITY_NAME,
    BOTH,
    CA,
    LEAF,
    LEAF_KEY,
    NOW,
    URI,
    Draft,
    authority_record,
    certification_request_info,
    changed,
    key_usage,
    own_dns_name,
)

P256 = SignatureScheme.ECDSA_SECP256R1_SHA256
ISSUING, ROOT = authority_record(), authority_record(AuthorityKind.ROOT)
URI_NAME = x509.UniformResourceIdentifier(URI)
RSA_KEY = rsa.generate_private_key(65537, 2048)


def judge(message: bytes, record: KeyRecord = ISSUING, scheme: SignatureScheme = P256, now: datetime = NOW) -> None:
    check_request(message, record, purpose=Purpose.X509_CERTIFICATE, scheme=scheme, now=now)


def test_good_certificates_pass() -> None:
    judge(LEAF.tbs())
    judge(CA.tbs(), ROOT)
    judge(changed(CA, key=AUTHORITY_KEY, constraints=x509.BasicConstraints(ca=True, path_length=1)).tbs(), ROOT)


@pytest.mark.parametrize(
    "draft",
    [
        changed(LEAF, constraints=None),
        changed(LEAF, subject=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, own_dns_name(URI))])),
        changed(LEAF, subject=x509.Name([]), san_critical=True),
        changed(LEAF, names=(URI_NAME,)),
        changed(LEAF, names=(URI_NAME, x509.IPAddress(ipaddress.ip_address("10.0.0.1")))),
        changed(LEAF, names=(URI_NAME, x509.DNSName("*.example.org"))),
        changed(LEAF, not_before=NOW - timedelta(minutes=1), not_after=NOW + timedelta(minutes=59)),
        changed(LEAF, not_before=NOW + timedelta(seconds=60), not_after=NOW + timedelta(minutes=30)),
        changed(LEAF, more=((x509.SubjectKeyIdentifier.from_public_key(LEAF_KEY.public_key()), False),)),
        changed(LEAF, serial=1 << 63),
        changed(LEAF, serial=(1 << 159) - 1),
    ],
)
def test_leaves_within_the_profile_pass(draft: Draft) -> None:
    judge(draft.tbs())


LEAF_VIOLATIONS: dict[str, dict[str, Any]] = {
    "issuer is not the subject": {"issuer": x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "another")])},
    "validity is longer than max_validity_s \\(3600\\)": {"not_after": NOW + timedelta(seconds=3601)},
    "not_before lies further back than max_backdate_s \\(60\\)": {
        "not_before": NOW - timedelta(seconds=61),
        "not_after": NOW + timedelta(minutes=5),
    },
    "not_before lies in the future": {"not_before": NOW + timedelta(seconds=61)},
    "not_after lies in the past": {"not_before": NOW - timedelta(seconds=50), "not_after": NOW - timedelta(seconds=1)},
    "X5-03 no subject alternative name": {"names": ()},
    "X5-01 0 URI SANs": {"names": (x509.DNSName("a.example"),)},
    "X5-01 2 URI SANs": {"names": (URI_NAME, x509.UniformResourceIdentifier("https://a.example/"))},
    "SAN of a type other": {"names": (URI_NAME, x509.RFC822Name("a@example.org"))},
    "X5-05 subject is empty": {"subject": x509.Name([])},
    "URI SAN: ID-01": {"names": (x509.UniformResourceIdentifier("https://td.test/a"),)},
    "URI SAN: ID-12": {"names": (x509.UniformResourceIdentifier("spiffe://td.test//a"),)},
    "URI SAN is not in trust domain td.test": {"names": (x509.UniformResourceIdentifier("spiffe://other.test/a"),)},
    "X5-04 URI SAN of a leaf has no path": {"names": (x509.UniformResourceIdentifier("spiffe://td.test"),)},
    "X5-09 an issuing authority signs only leaves": {"constraints": x509.BasicConstraints(ca=True, path_length=0)},
    "X5-10 key usage is missing": {"usage": None},
    "X5-10 key usage is missing or not critical": {"usage_critical": False},
    "X5-12 key usage of a leaf": {"usage": key_usage("digital_signature", "key_cert_sign")},
    "X5-12 .*digitalSignature only": {"usage": key_usage("digital_signature", "key_encipherment")},
    "X5-12 key usage": {"usage": key_usage("key_agreement")},
    "X5-14 extended key usage is missing": {"extended": None},
    "X5-15 extended key usage": {"extended": (ExtendedKeyUsageOID.SERVER_AUTH,)},
    "X5-15 .*serverAuth and clientAuth": {"extended": (*BOTH, ExtendedKeyUsageOID.OCSP_SIGNING)},
    "X5-07 the subject public key is the authority's own": {"key": AUTHORITY_KEY},
    "critical extension 1.2.3": {
        "more": ((x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"\x05\x00"), True),)
    },
    "extension 1.2.3 is not one that": {
        "more": ((x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"\x05\x00"), False),)
    },
    "IP SAN is not one address": {"names": (URI_NAME, x509.IPAddress(ipaddress.ip_network("10.0.0.0/8")))},
    "DNS SAN in .* is not the one of this": {"names": (URI_NAME, x509.DNSName("*.invalid"))},
    "common name is the DNS name of another": {
        "subject": x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, own_dns_name(URI + "x").upper())])
    },
    "critical extension 1.3.6.1.4.1.11129.2.4.3": {"more": ((x509.PrecertPoison(), True),)},
    "name constraints stand in a leaf": {
        "more": ((x509.NameConstraints([x509.DNSName("example")], None), True),),
    },
    "DNS SAN is not lower-case": {"names": (URI_NAME, x509.DNSName("Upper.example"))},
    "DNS SAN in keyreeve.invalid": {"names": (URI_NAME, x509.DNSName(own_dns_name(URI + "x")))},
    "DNS SAN in keyreeve.invalid is not": {"names": (URI_NAME, x509.DNSName("*.keyreeve.invalid"))},
    "DNS SAN in keyreeve.invalid is not the one": {"names": (URI_NAME, x509.DNSName("keyreeve.invalid"))},
    "DNS SAN in keyreeve.invalid is not the one of": {
        "names": (URI_NAME, x509.DNSName("x." + own_dns_name(URI))),
    },
    "subject public key": {"key": ec.derive_private_key(5, ec.SECP521R1())},
}


@pytest.mark.parametrize(("rule", "change"), LEAF_VIOLATIONS.items(), ids=LEAF_VIOLATIONS.keys())
def test_leaf_outside_the_profile_is_refused_by_name(rule: str, change: dict[str, Any]) -> None:
    judge(LEAF.tbs())
    with pytest.raises(ProfileViolation, match=f"^profile_violation: x509_certificate: .*{rule}"):
        judge(changed(LEAF, **change).tbs())


CA_VIOLATIONS: dict[str, dict[str, Any]] = {
    "X5-06 URI SAN of a CA certificate has a path": {"names": (URI_NAME,)},
    "SAN of a CA certificate holds more": {
        "names": (x509.UniformResourceIdentifier("spiffe://td.test"), x509.DNSName("ca.example")),
    },
    "X5-08 a root signs only CA certificates": {"constraints": None},
    "X5-08 .*cA is not true": {"constraints": x509.BasicConstraints(ca=False, path_length=None)},
    "basic constraints of a CA certificate are not critical": {"constraints_critical": False},
    "pathLen exceeds": {"constraints": x509.BasicConstraints(ca=True, path_length=2)},
    "pathLen exceeds max_path_length": {"constraints": x509.BasicConstraints(ca=True, path_length=None)},
    "X5-11 key usage of a CA certificate lacks": {"usage": key_usage("crl_sign")},
    "more than keyCertSign, cRLSign": {"usage": key_usage("key_cert_sign", "digital_signature")},
    "X5-10": {"usage": None},
    "X5-15": {"extended": (ExtendedKeyUsageOID.CODE_SIGNING,)},
    "validity is longer": {"not_after": NOW + timedelta(days=31)},
}


@pytest.mark.parametrize(("rule", "change"), CA_VIOLATIONS.items(), ids=CA_VIOLATIONS.keys())
def test_ca_certificate_outside_the_profile_is_refused_by_name(rule: str, change: dict[str, Any]) -> None:
    judge(CA.tbs(), ROOT)
    with pytest.raises(ProfileViolation, match=f"^profile_violation: x509_certificate: .*{rule}"):
        judge(changed(CA, **change).tbs(), ROOT)


def test_root_signs_no_leaf_and_issuing_no_ca() -> None:
    with pytest.raises(ProfileViolation):
        judge(LEAF.tbs(), ROOT)
    with pytest.raises(ProfileViolation):
        judge(changed(CA, not_after=NOW + timedelta(minutes=1)).tbs(), ISSUING)


def test_path_length_may_be_free() -> None:
    free = authority_record(AuthorityKind.ROOT, max_path_length=None)
    judge(changed(CA, constraints=x509.BasicConstraints(ca=True, path_length=None)).tbs(), free)


def test_name_constraints_may_stand_in_a_ca_certificate() -> None:
    limits = x509.NameConstraints([x509.UniformResourceIdentifier("td.test")], None)
    judge(changed(CA, more=((limits, True),)).tbs(), ROOT)


def rsa_tbs(scheme: SignatureScheme) -> bytes:
    algorithm = {"sha256": hashes.SHA256(), "sha384": hashes.SHA384(), "sha512": hashes.SHA512()}[
        scheme.facts.hash_name
    ]
    builder = (
        x509.CertificateBuilder().subject_name(LEAF.subject).issuer_name(AUTHORITY_NAME).serial_number(LEAF.serial)
    )
    builder = builder.not_valid_before(LEAF.not_before).not_valid_after(LEAF.not_after)
    builder = builder.public_key(LEAF_KEY.public_key())
    for extension in LEAF.certificate().extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    pss = padding.PSS(padding.MGF1(algorithm), algorithm.digest_size)
    form = pss if scheme.name.startswith("RSA_PSS") else padding.PKCS1v15()
    return builder.sign(RSA_KEY, algorithm, rsa_padding=form).tbs_certificate_bytes


RSA_SCHEMES = [scheme for scheme in SignatureScheme if scheme.name.startswith("RSA")]


@pytest.mark.parametrize("scheme", RSA_SCHEMES)
def test_algorithm_inside_is_the_scheme_asked_for(scheme: SignatureScheme) -> None:
    record = authority_record(key=RSA_KEY, key_type=KeyType.RSA_2048)
    for asked in RSA_SCHEMES:
        if asked is scheme:
            judge(rsa_tbs(scheme), record, asked)
        else:
            with pytest.raises(PurposeMismatch, match=f"not that of {asked.iana_name}"):
                judge(rsa_tbs(scheme), record, asked)


def test_ed25519_authority() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    record = authority_record(key=key, key_type=KeyType.ED25519)
    judge(changed(LEAF, authority=key).tbs(), record, SignatureScheme.ED25519)
    with pytest.raises(PurposeMismatch, match="signature algorithm"):
        judge(LEAF.tbs(), record, SignatureScheme.ED25519)


def with_serial(value: bytes) -> bytes:
    """LEAF with another serial number, its length mended."""
    tbs = LEAF.tbs()
    old = b"\x02\x0d" + LEAF.serial.to_bytes(13, "big")
    assert tbs.count(old) == 1
    body = tbs[4:].replace(old, bytes((2, len(value))) + value)
    return b"\x30\x82" + len(body).to_bytes(2, "big") + body


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        ("fewer than 64 bits", b"\x7f" + b"\xff" * 7),
        ("fewer than 64 bits", b"\x01"),
        ("more than 20 octets", b"\x01" + bytes(20)),
        ("not positive", b"\x00"),
        ("not positive", b"\x80" + bytes(9)),
        ("INTEGER is not in its shortest form", b"\x00\x01" + bytes(9)),
        ("INTEGER is empty", b""),
    ],
)
def test_serial_number(rule: str, value: bytes) -> None:
    judge(with_serial(b"\x01" + bytes(9)))
    with pytest.raises(PurposeMismatch, match=rule):
        judge(with_serial(value))


NOT_CERTIFICATES = {
    "empty": b"",
    "a digest": bytes(32),
    "a whole certificate": LEAF.certificate().public_bytes(Encoding.DER),
    "CSR": certification_request_info(LEAF_KEY),
    "TLS 1.3 content": build_tls13_content(Purpose.TLS13_SERVER_VERIFY, bytes(32)),
    "trailing byte": LEAF.tbs() + b"\x00",
    "cut short": LEAF.tbs()[:-1],
    "indefinite length": b"\x30\x80" + LEAF.tbs()[4:] + b"\x00\x00",
    "long length": b"\x30\x83\x00" + LEAF.tbs()[2:],
    "two of them": LEAF.tbs() * 2,
}


@pytest.mark.parametrize("message", NOT_CERTIFICATES.values(), ids=NOT_CERTIFICATES.keys())
def test_what_is_no_tbs_certificate_is_refused(message: bytes) -> None:
    judge(LEAF.tbs())
    with pytest.raises(PurposeMismatch, match="x509_certificate: "):
        judge(message)


def test_doubled_extension_is_refused() -> None:
    tbs = LEAF.tbs()
    usage = next(e for e in LEAF.certificate().extensions if isinstance(e.value, x509.KeyUsage))
    encoded = bytes.fromhex("300e0603551d0f0101ff0404") + usage.value.public_bytes()
    assert tbs.count(encoded) == 1
    at = tbs.index(b"\xa3\x81")
    inner = tbs[at + 6 :] + encoded
    extensions = b"\x30\x82" + len(inner).to_bytes(2, "big") + inner
    body = tbs[4:at] + b"\xa3\x82" + len(extensions).to_bytes(2, "big") + extensions
    with pytest.raises(PurposeMismatch):
        judge(b"\x30\x82" + len(body).to_bytes(2, "big") + body)


@given(st.integers(0, len(LEAF.tbs()) - 1), st.integers(1, 255))
def test_one_changed_byte_never_escapes(at: int, change: int) -> None:
    """Whatever a change does, the answer is yes or one of these two refusals."""
    message = bytearray(LEAF.tbs())
    message[at] ^= change
    with suppress(PurposeMismatch, ProfileViolation):
        judge(bytes(message))
