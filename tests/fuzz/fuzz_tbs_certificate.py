"""TBSCertificates: only our refusals come out, and what a root or an issuing authority accepts passes a check written apart from it."""

from __future__ import annotations

import sys
from datetime import timedelta

from cryptography import x509
from der_mutation import mutate
from harness import main
from keyreeve_common.errors import ProfileViolation, PurposeMismatch
from keyreeve_common.schemes import SignatureScheme
from keyreeve_keyserver.domain.keys import AuthorityKind
from keyreeve_keyserver.domain.purposes.x509_certificate import check_x509_certificate
from keyreeve_testing.tbs import AUTHORITY_NAME, BOTH, NOW, authority_record, own_dns_name

_RECORDS = {kind: authority_record(kind) for kind in AuthorityKind}
_ALGORITHM = bytes.fromhex("300a06082a8648ce3d040302")
_SIGNATURE = bytes.fromhex("030100")


def target(data: bytes) -> str:
    words = []
    for kind, record in _RECORDS.items():
        try:
            check_x509_certificate(data, record, SignatureScheme.ECDSA_SECP256R1_SHA256, NOW)
        except (PurposeMismatch, ProfileViolation) as error:
            words.append(error.detail[:60])
        else:
            recheck(data, kind)
            words.append(f"{kind} accepted")
    return " / ".join(words)


def recheck(data: bytes, kind: AuthorityKind) -> None:
    """The rules once more, from the certificate's fields and without the parser under test. Raises: AssertionError."""
    body = data + _ALGORITHM + _SIGNATURE
    certificate = _load(body)
    expect(certificate.tbs_certificate_bytes == data, "re-encoding differs")
    expect(certificate.issuer == AUTHORITY_NAME, "issuer")
    expect(64 <= certificate.serial_number.bit_length() <= 160, "serial")
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    longest = timedelta(hours=1) if kind is AuthorityKind.ISSUING else timedelta(days=30)
    expect(timedelta(0) < life <= longest and certificate.not_valid_after_utc > NOW, "validity")
    back = NOW - certificate.not_valid_before_utc
    expect(timedelta(minutes=-1) <= back <= timedelta(minutes=1), "back-date")
    found = {extension.oid: extension for extension in certificate.extensions}
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    expect(usage.critical, "key usage critical")
    san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (uri,) = san.get_values_for_type(x509.UniformResourceIdentifier)
    is_ca = x509.BasicConstraints.oid in found and found[x509.BasicConstraints.oid].value.ca
    expect(is_ca == (kind is AuthorityKind.ROOT), "cA")
    if is_ca:
        expect(uri == "spiffe://td.test" and len(list(san)) == 1, "SAN of a CA certificate")
        expect(usage.value.key_cert_sign and not usage.value.digital_signature, "key usage of a CA certificate")
    else:
        expect(uri.startswith("spiffe://td.test/") and len(uri) > len("spiffe://td.test/"), "SAN of a leaf")
        expect(
            usage.value.digital_signature and not usage.value.key_cert_sign and not usage.value.crl_sign, "key usage"
        )
        extended = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        expect(set(extended) == set(BOTH), "extended key usage")
        for name in san.get_values_for_type(x509.DNSName):
            reserved = ("." + name.rstrip(".").lower()).endswith(".keyreeve.invalid")
            expect(not reserved or name == own_dns_name(uri), "reserved zone")


def _load(body: bytes) -> x509.Certificate:
    length = len(body)
    octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
    head = bytes((0x30, length)) if length < 0x80 else bytes((0x30, 0x80 | len(octets))) + octets
    return x509.load_der_x509_certificate(head + body)


def expect(condition: bool, rule: str) -> None:
    if not condition:
        raise AssertionError(f"accepted against the rule: {rule}")


if __name__ == "__main__":
    sys.exit(main(target, "tbs_certificate", mutator=mutate))
