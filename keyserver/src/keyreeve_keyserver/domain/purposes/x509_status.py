"""What CRLs and OCSP responses have in common: times, serial numbers, extensions, and how long a statement about revocation may live.

A statement begins near now and ends in bounded time, so that one signed today cannot hide a revocation of next year.
Spec: RFC 5280 4.1.2.2, 4.1.2.5, 4.2, 5.1.2; CA/Browser Forum BR 4.9.7, 4.9.10 (the longest lives).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from keyreeve_common.errors import ProfileViolation, PurposeMismatch
from keyreeve_common.purposes import Purpose

from keyreeve_keyserver.domain.der import BOOLEAN, INTEGER, OCTET_STRING, OID, SEQUENCE, Element
from keyreeve_keyserver.domain.keys import AuthorityKind, AuthorityProfile, KeyRecord

UTC_TIME, GENERALIZED_TIME, ENUMERATED = 0x17, 0x18, 0x0A
CLOCK_TOLERANCE = timedelta(seconds=60)
MAX_SERIAL_OCTETS = 20
# unspecified (0) is to be left out, 7 is not used, removeFromCRL (8) is for delta CRLs. Spec: RFC 5280 5.3.1.
REASONS = frozenset({1, 2, 3, 4, 5, 6, 9, 10})
_LONGEST = {AuthorityKind.ISSUING: timedelta(days=10), AuthorityKind.ROOT: timedelta(days=366)}
ExtensionForm = Callable[[bytes, bool], bool]


@dataclass(frozen=True, slots=True)
class StatusRules:
    """The checks of one purpose, which say its name in their refusals. Raises: PurposeMismatch, ProfileViolation; DerError by der.py."""

    purpose: Purpose

    def require(self, condition: bool, rule: str) -> None:
        """Of the form: what the bytes are."""
        if not condition:
            raise PurposeMismatch(f"{self.purpose.label}: {rule}")

    def demand(self, condition: bool, rule: str) -> None:
        """Of the profile: what this authority may say."""
        if not condition:
            raise ProfileViolation(f"{self.purpose.label}: {rule}")

    def profile_of(self, record: KeyRecord) -> AuthorityProfile:
        profile = record.authority_profile
        if profile is None:
            raise ProfileViolation(f"{self.purpose.label}: key has no authority profile")
        return profile

    def time(self, element: Element, what: str, *, generalized: bool = False) -> datetime:
        """UTCTime through 2049 and GeneralizedTime from 2050, or always GeneralizedTime: in each case to the second, with Z."""
        text = element.value
        utc = element.tag == UTC_TIME and not generalized
        self.require(utc or element.tag == GENERALIZED_TIME, f"{what} is not a time of the right type")
        digits = 12 if utc else 14
        self.require(len(text) == digits + 1 and text[:digits].isdigit() and text[-1:] == b"Z", f"{what} is no time")
        century = (b"19" if text[:2] >= b"50" else b"20") if utc else b""
        whole = century + text[:digits]
        month, day, hour, minute, second = (int(whole[at : at + 2]) for at in range(4, 14, 2))
        try:
            found = datetime(int(whole[:4]), month, day, hour, minute, second, tzinfo=UTC)
        except ValueError:
            raise PurposeMismatch(f"{self.purpose.label}: {what} is no time") from None
        self.require(utc or generalized or found.year >= 2050, f"{what} is GeneralizedTime before 2050")
        return found

    def serial(self, element: Element) -> int:
        self.require(element.tag == INTEGER, "serial number is not an INTEGER")
        serial = int.from_bytes(element.value, "big", signed=True)
        self.require(serial > 0, "serial number is not positive")
        self.require(len(element.value) <= MAX_SERIAL_OCTETS, "serial number has more than 20 octets")
        return serial

    def extensions(self, element: Element, known: Mapping[bytes, ExtensionForm], what: str) -> set[bytes]:
        """Holds each extension to its form; the OIDs. `known` says whether value and criticality are right."""
        self.require(element.tag == SEQUENCE, f"{what} are not a SEQUENCE")
        found: set[bytes] = set()
        for extension in element.children():
            parts = extension.children() if extension.tag == SEQUENCE else []
            critical = len(parts) == 3 and parts[1].tag == BOOLEAN and parts[1].value == b"\xff"
            shaped = (len(parts) == 2 or critical) and parts[0].tag == OID and parts[-1].tag == OCTET_STRING
            self.require(shaped, f"one of the {what} has no form")
            oid = parts[0].value
            self.demand(oid in known, f"{what} hold {_dotted(oid)}, which this authority does not sign")
            self.require(oid not in found, f"{what} hold one twice")
            self.require(known[oid](parts[-1].value, critical), f"{what} hold {_dotted(oid)} in a wrong form")
            found.add(oid)
        self.require(bool(found), f"{what} are empty")
        return found

    def life(self, profile: AuthorityProfile, this_update: datetime, next_update: datetime, now: datetime) -> None:
        longest = min(profile.max_validity, _LONGEST[profile.kind])
        self.demand(this_update < next_update, "nextUpdate does not lie after thisUpdate")
        self.demand(next_update - this_update <= longest, f"nextUpdate is more than {_s(longest)} s after thisUpdate")
        self.recent(profile, this_update, "thisUpdate", now)
        self.demand(next_update > now, "nextUpdate lies in the past")

    def recent(self, profile: AuthorityProfile, time: datetime, what: str, now: datetime) -> None:
        back = profile.max_backdate
        self.demand(time >= now - back, f"{what} lies further back than max_backdate_s ({_s(back)})")
        self.past(time, what, now)

    def past(self, time: datetime, what: str, now: datetime) -> None:
        self.demand(time <= now + CLOCK_TOLERANCE, f"{what} lies in the future")


def _dotted(oid: bytes) -> str:
    """For people; what is no OID is shown as its bytes."""
    arcs, arc = [], 0
    for octet in oid[:32]:
        arc = arc << 7 | octet & 0x7F
        if octet < 0x80:
            arcs.append(arc)
            arc = 0
    if not arcs or arc:
        return oid[:32].hex()
    first = min(arcs[0] // 40, 2)
    return ".".join(str(number) for number in (first, arcs[0] - 40 * first, *arcs[1:]))


def _s(span: timedelta) -> int:
    return int(span / timedelta(seconds=1))
