"""Certificates that `cryptography` cannot read are refused by our own errors, whatever it raises for them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID
from keyreeve_common.bundle import parse_bundle_pem
from keyreeve_common.errors import InvalidRequest, SvidInvalid
from keyreeve_common.identity import TrustDomain
from keyreeve_common.x509_svid import load_chain_der, parse_x509_svid

NAME = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])


def certificate(san_der: bytes = b"\x30\x00") -> x509.Certificate:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(NAME)
        .issuer_name(NAME)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, san_der), critical=True)
        .sign(key, hashes.SHA256())
    )


def test_a_version_that_does_not_exist() -> None:
    der = certificate().public_bytes(Encoding.DER).replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x05", 1)
    with pytest.raises(SvidInvalid):
        load_chain_der([der])


@pytest.mark.parametrize("san_der", [b"\x30\x02\xa3\x00", b"\x30\x02\xa5\x00", b"\x30\x01"], ids=["x400", "edi", "cut"])
def test_a_name_that_cannot_be_read(san_der: bytes) -> None:
    with pytest.raises(SvidInvalid, match="cannot be read"):
        parse_x509_svid(certificate(san_der))
    with pytest.raises(InvalidRequest):
        parse_bundle_pem(certificate(san_der).public_bytes(Encoding.PEM), TrustDomain("example.org"))
