"""One strict parser per purpose, and the order in which a request is judged.

The key cluster never signs what it does not understand. `FORMS` is the one table of what it understands; a purpose that is not in it is not
offered.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from keyreeve_common.errors import MessageTooLarge, PurposeNotPermitted, SchemeNotSupported
from keyreeve_common.purposes import PURPOSES_OF_ROLE, Purpose
from keyreeve_common.schemes import SignatureScheme, check_scheme_fits, parse_scheme

from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_keyserver.domain.purposes.certificate_request import check_certificate_request
from keyreeve_keyserver.domain.purposes.tls13 import check_client_verify, check_server_verify
from keyreeve_keyserver.domain.purposes.x509_certificate import check_x509_certificate

Form = Callable[[bytes, KeyRecord, SignatureScheme, datetime], None]
FORMS: dict[Purpose, Form] = {
    Purpose.TLS13_SERVER_VERIFY: lambda message, _record, _scheme, _now: check_server_verify(message),
    Purpose.TLS13_CLIENT_VERIFY: lambda message, _record, _scheme, _now: check_client_verify(message),
    Purpose.X509_CERTIFICATE: check_x509_certificate,
    Purpose.CERTIFICATE_REQUEST: lambda message, record, _scheme, _now: check_certificate_request(message, record),
}
_TLS13 = frozenset({Purpose.TLS13_SERVER_VERIFY, Purpose.TLS13_CLIENT_VERIFY})
_KNOWN: dict[int, Purpose] = {purpose.value: purpose for purpose in Purpose if purpose is not Purpose.UNSPECIFIED}


def check_length(message: bytes, high: int) -> None:
    """Raises: MessageTooLarge."""
    if len(message) > high:
        raise MessageTooLarge(f"message has {len(message)} bytes, the limit is {high}")


def check_request(message: bytes, record: KeyRecord, *, purpose: int, scheme: int, now: datetime) -> SignatureScheme:
    """The scheme to sign with, if this key may sign this message for this purpose.

    Order: purpose offered, role and purposes of the sealed record, scheme against key type and purpose, form.
    Raises: PurposeNotPermitted, SchemeNotSupported, PurposeMismatch, ProfileViolation.
    """
    known = _check_purpose(record, purpose)
    wanted = parse_scheme(scheme)
    check_scheme_fits(wanted, record.key_type)
    if known in _TLS13 and not wanted.facts.tls13:
        raise SchemeNotSupported(f"scheme {wanted.iana_name} is not one of TLS 1.3, as {known.label} needs")
    FORMS[known](message, record, wanted, now)
    return wanted


def _check_purpose(record: KeyRecord, code: int) -> Purpose:
    purpose = _KNOWN.get(code)
    if purpose is None:
        raise PurposeNotPermitted(f"purpose {code} is not known")
    if purpose not in FORMS:
        raise PurposeNotPermitted(f"purpose {purpose.label} is not offered by this key cluster")
    if purpose not in PURPOSES_OF_ROLE[record.role]:
        raise PurposeNotPermitted(f"a key of role {record.role.value} never signs for {purpose.label}")
    if purpose not in record.purposes:
        raise PurposeNotPermitted(f"key was not created for {purpose.label}")
    return purpose
