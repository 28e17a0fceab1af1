"""A CertificationRequestInfo whose public key is this very key: a key asks for a certificate for itself and for no other.

Spec: RFC 2986 4.1.
"""

from __future__ import annotations

from cryptography import x509
from keyreeve_common.errors import PurposeMismatch

from keyreeve_keyserver.domain.der import BIT_STRING, INTEGER, OID, SEQUENCE, DerError, check_name, encode, read_element
from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_keyserver.domain.purposes.x509_errors import UNREADABLE

_ATTRIBUTES = 0xA0
_SHAPE = (INTEGER, SEQUENCE, SEQUENCE, _ATTRIBUTES)
# What stands outside the signed part does not matter; it only has to parse.
_OUTER_ALGORITHM = encode(SEQUENCE, encode(OID, bytes.fromhex("2b6570")))
_OUTER_SIGNATURE = encode(BIT_STRING, bytes(65))


def check_certificate_request(message: bytes, record: KeyRecord) -> None:
    """Raises: PurposeMismatch."""
    try:
        fields = read_element(message, SEQUENCE, "CertificationRequestInfo").children()
        _require(tuple(field.tag for field in fields) == _SHAPE, "message is not a CertificationRequestInfo")
        version, subject, spki, _ = fields
        _require(version.value == b"\x00", "version is not v1")
        check_name(subject.encoded)
        request = x509.load_der_x509_csr(encode(SEQUENCE, message, _OUTER_ALGORITHM, _OUTER_SIGNATURE))
        _require(request.tbs_certrequest_bytes == message, "message is not in its one DER form")
        _ = request.subject, list(request.extensions), list(request.attributes)
    except DerError as error:
        raise PurposeMismatch(f"certificate_request: {error}") from None
    except UNREADABLE:
        raise PurposeMismatch("certificate_request: message is not a CertificationRequestInfo") from None
    _require(spki.encoded == record.spki_der, "the public key in the request is not this key")


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise PurposeMismatch(f"certificate_request: {rule}")
