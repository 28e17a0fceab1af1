"""One strict parser per purpose, and the order in which a request is judged.

The key cluster never signs what it does not understand. `FORMS` is the one table of what it understands: every purpose is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from keyreeve_common.errors import (
    KeyreeveError,
    MessageTooLarge,
    PurposeMismatch,
    PurposeNotPermitted,
    SchemeNotSupported,
)
from keyreeve_common.purposes import PURPOSES_OF_ROLE, Purpose
from keyreeve_common.schemes import SignatureScheme, check_scheme_fits, parse_scheme

from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_keyserver.domain.purposes.certificate_request import check_certificate_request
from keyreeve_keyserver.domain.purposes.digest import check_digest
from keyreeve_keyserver.domain.purposes.jwt_svid import check_jwt_svid
from keyreeve_keyserver.domain.purposes.ocsp_response import check_ocsp_response
from keyreeve_keyserver.domain.purposes.tls12_client_verify import check_tls12_client_verify
from keyreeve_keyserver.domain.purposes.tls12_server_key_exchange import check_server_key_exchange
from keyreeve_keyserver.domain.purposes.tls13 import (
    FIXED_FORMS,
    FixedForm,
    check_client_verify,
    check_server_verify,
)
from keyreeve_keyserver.domain.purposes.x509_certificate import check_x509_certificate
from keyreeve_keyserver.domain.purposes.x509_crl import check_x509_crl

Form = Callable[[bytes, KeyRecord, SignatureScheme, datetime], None]
FORMS: dict[Purpose, Form] = {
    Purpose.TLS13_SERVER_VERIFY: lambda message, _record, _scheme, _now: check_server_verify(message),
    Purpose.TLS13_CLIENT_VERIFY: lambda message, _record, _scheme, _now: check_client_verify(message),
    Purpose.TLS12_SERVER_KEY_EXCHANGE: lambda message, _record, _scheme, _now: check_server_key_exchange(message),
    Purpose.TLS12_CLIENT_VERIFY: lambda message, record, scheme, _now: check_tls12_client_verify(
        message, record, scheme
    ),
    Purpose.X509_CERTIFICATE: check_x509_certificate,
    Purpose.X509_CRL: check_x509_crl,
    Purpose.OCSP_RESPONSE: check_ocsp_response,
    Purpose.CERTIFICATE_REQUEST: lambda message, record, _scheme, _now: check_certificate_request(message, record),
    Purpose.JWT_SVID: check_jwt_svid,
    Purpose.DIGEST: lambda message, _record, scheme, _now: check_digest(message, scheme),
}
# The caller chooses so much of these that a message could be made to have a second form: the first bytes are random numbers of his.
_AMBIGUOUS = frozenset({Purpose.TLS12_SERVER_KEY_EXCHANGE, Purpose.TLS12_CLIENT_VERIFY, Purpose.CERTIFICATE_REQUEST})
_TLS13 = frozenset({Purpose.TLS13_SERVER_VERIFY, Purpose.TLS13_CLIENT_VERIFY})
_KNOWN: dict[int, Purpose] = {purpose.value: purpose for purpose in Purpose if purpose is not Purpose.UNSPECIFIED}


def check_length(message: bytes, high: int) -> None:
    """Raises: MessageTooLarge."""
    if len(message) > high:
        raise MessageTooLarge(f"message has {len(message)} bytes, the limit is {high}")


@dataclass(frozen=True, slots=True)
class Rule:
    """What a key may do for one purpose with one scheme, and the form that it demands of each message.

    `fixed` is the form where it is a head and some lengths: then a message that fits it needs no other look.
    """

    record: KeyRecord
    purpose: Purpose
    scheme: SignatureScheme
    form: Form
    fixed: FixedForm | None

    def check(self, message: bytes, now: datetime) -> None:
        """Order: form, no second form. Raises: PurposeMismatch, SchemeNotSupported, ProfileViolation."""
        self.form(message, self.record, self.scheme, now)
        if self.purpose in _AMBIGUOUS:
            _check_single_form(message, self.record, self.purpose, self.scheme, now)


def rule_for(record: KeyRecord, *, purpose: int, scheme: int) -> Rule:
    """The rule by which this key signs for this purpose with this scheme: what needs no message is settled here.

    Order: purpose known, role and purposes of the sealed record, scheme against key type and purpose.
    Raises: PurposeNotPermitted, SchemeNotSupported.
    """
    known = _check_purpose(record, purpose)
    wanted = parse_scheme(scheme)
    check_scheme_fits(wanted, record.key_type)
    if known in _TLS13 and not wanted.facts.tls13:
        raise SchemeNotSupported(f"scheme {wanted.iana_name} is not one of TLS 1.3, as {known.label} needs")
    return Rule(record, known, wanted, FORMS[known], FIXED_FORMS.get(known))


def check_request(message: bytes, record: KeyRecord, *, purpose: int, scheme: int, now: datetime) -> SignatureScheme:
    """The scheme to sign with, if this key may sign this message for this purpose.

    Raises: PurposeNotPermitted, SchemeNotSupported, PurposeMismatch, ProfileViolation.
    """
    rule = rule_for(record, purpose=purpose, scheme=scheme)
    rule.check(message, now)
    return rule.scheme


def _check_single_form(
    message: bytes, record: KeyRecord, purpose: Purpose, scheme: SignatureScheme, now: datetime
) -> None:
    """A signature must not serve for something that it was not asked for. `digest` fits everything: a key that has it is past this help."""
    for other in sorted((record.purposes & _AMBIGUOUS) - {purpose}):
        try:
            FORMS[other](message, record, scheme, now)
        except KeyreeveError:
            continue
        raise PurposeMismatch(f"{purpose.label}: the message has the form of {other.label} as well")


def _check_purpose(record: KeyRecord, code: int) -> Purpose:
    purpose = _KNOWN.get(code)
    if purpose is None:
        raise PurposeNotPermitted(f"purpose {code} is not known")
    if purpose not in PURPOSES_OF_ROLE[record.role]:
        raise PurposeNotPermitted(f"a key of role {record.role.value} never signs for {purpose.label}")
    if purpose not in record.purposes:
        raise PurposeNotPermitted(f"key was not created for {purpose.label}")
    return purpose
