"""The signing input of a JWT-SVID: `BASE64URL(header) . BASE64URL(claims)`, every character and every name of it accounted for.

The header says the algorithm that is asked for and this key's id as `kid`; the claims are those that RFC 7519 registers, the subject lies in the
profile's trust domain, and the token ends within the profile's bound. Spec: JWT-SVID 2 and 3 (JW-01 to JW-09); RFC 7515 3.1; RFC 7519 4.1.
"""

from __future__ import annotations

import base64
import binascii
import json
from datetime import datetime, timedelta
from typing import Any

from keyreeve_common.errors import InvalidSpiffeId, ProfileViolation, PurposeMismatch
from keyreeve_common.identity import SpiffeId
from keyreeve_common.jws import jws_algorithm
from keyreeve_common.schemes import SignatureScheme

from keyreeve_keyserver.domain.keys import JwtProfile, KeyRecord

MAX_INPUT_BYTES = 8_192
MAX_AUDIENCES = 16
MAX_TEXT_CHARACTERS = 2_048
CLOCK_TOLERANCE = timedelta(seconds=60)
_TYPES = ("JWT", "JOSE")
_REQUIRED = {"sub", "aud", "exp"}
_TEXTS, _TIMES = {"iss", "jti"}, {"iat", "nbf"}
_KNOWN = _REQUIRED | _TEXTS | _TIMES


def check_jwt_svid(message: bytes, record: KeyRecord, scheme: SignatureScheme, now: datetime) -> None:
    """Raises: SchemeNotSupported, PurposeMismatch when it is no such signing input, ProfileViolation when it is outside the profile."""
    algorithm = jws_algorithm(scheme)
    profile = record.jwt_profile
    if profile is None:
        raise ProfileViolation("jwt_svid: key has no JWT profile")
    _require(len(message) <= MAX_INPUT_BYTES, f"signing input is longer than {MAX_INPUT_BYTES} bytes")
    parts = message.split(b".")
    _require(len(parts) == 2, "message is not two parts with one dot between them")
    header, claims = (_object(part, what) for part, what in zip(parts, ("header", "claims"), strict=True))
    _check_header(header, record, algorithm)
    _check_claims(claims, profile, now)


def _check_header(header: dict[str, Any], record: KeyRecord, algorithm: str) -> None:
    """Spec: JW-02, JW-03, JW-05. No name besides: no `crit`, `jwk`, `jku`, `x5u`, `x5c`."""
    unknown = sorted(header.keys() - {"alg", "kid", "typ"})
    _require(not unknown, f"header holds more than alg, kid and typ: {_shown(unknown)}")
    _require(header.get("alg") == algorithm, f"alg is not {algorithm}, the one of the scheme")
    _require(header.get("kid") == record.key_id, "kid is not the id of this key")
    _require("typ" not in header or header["typ"] in _TYPES, "typ is neither JWT nor JOSE")


def _check_claims(claims: dict[str, Any], profile: JwtProfile, now: datetime) -> None:
    missing, unknown = sorted(_REQUIRED - claims.keys()), sorted(claims.keys() - _KNOWN)
    _require(not missing, f"claims lack {', '.join(missing)}")
    _require(not unknown, f"claims hold a name that this key does not sign: {_shown(unknown)}")
    for name in _TEXTS & claims.keys():
        _require(_is_text(claims[name]), f"{name} is not a text")
    _check_audience(claims["aud"])
    _check_subject(claims["sub"], profile)
    _check_times({name: claims[name] for name in ("exp", "iat", "nbf") if name in claims}, profile, now)


def _check_audience(value: object) -> None:
    """Spec: JW-07."""
    audiences = value if isinstance(value, list) else [value]
    _require(1 <= len(audiences) <= MAX_AUDIENCES, f"aud has {len(audiences)} values")
    _require(all(_is_text(audience) for audience in audiences), "aud holds something other than a text")
    _require(len(set(audiences)) == len(audiences), "aud holds a value twice")


def _check_subject(value: object, profile: JwtProfile) -> None:
    """Spec: JW-06, JW-10."""
    _require(isinstance(value, str), "sub is not a text")
    try:
        subject = SpiffeId.parse(str(value))
    except InvalidSpiffeId as error:
        raise ProfileViolation(f"jwt_svid: sub: {error.detail}") from None
    _demand(subject.member_of(profile.trust_domain), f"sub is not in trust domain {profile.trust_domain}")
    _demand(not subject.is_trust_domain_id, "sub has no path")


def _check_times(times: dict[str, Any], profile: JwtProfile, now: datetime) -> None:
    """Spec: JW-08, JW-09. `exp` has no tolerance: no token of this key is good for longer than the profile says, from now on."""
    for name, value in times.items():
        # bool is an int in Python, and 2^53 is where JSON's numbers end for others (RFC 8259 6).
        whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
        _require(whole, f"{name} is not a whole number of seconds")
    clock, longest, tolerance = now.timestamp(), profile.max_ttl.total_seconds(), CLOCK_TOLERANCE.total_seconds()
    expiry = times["exp"]
    _demand(expiry > clock, "exp lies in the past")
    _demand(expiry <= clock + longest, f"exp lies more than max_ttl_s ({longest:.0f}) ahead")
    for name in _TIMES & times.keys():
        _demand(times[name] <= clock + tolerance, f"{name} lies in the future")
        _demand(times[name] >= clock - longest - tolerance, f"{name} lies too far back")
        _demand(times[name] < expiry, f"{name} does not lie before exp")


def _object(part: bytes, what: str) -> dict[str, Any]:
    """The JSON object that base64url without padding spells; each has one spelling."""
    try:
        data = base64.b64decode(part + b"=" * (-len(part) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        data = b""
    _require(bool(data) and base64.urlsafe_b64encode(data).rstrip(b"=") == part, f"{what} is not base64url unpadded")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except _Repeated:
        raise PurposeMismatch(f"jwt_svid: {what} holds a name twice") from None
    except (ValueError, RecursionError):
        raise PurposeMismatch(f"jwt_svid: {what} is not JSON") from None
    if not isinstance(value, dict):
        raise PurposeMismatch(f"jwt_svid: {what} is not an object")
    return value


class _Repeated(Exception):
    """A name stands twice in one object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Repeated
    return found


def _no_constant(name: str) -> None:
    """NaN and Infinity are no JSON."""
    raise ValueError(name)


def _is_text(value: object) -> bool:
    """Not empty, bounded, and printable: no control characters, no lone surrogates."""
    return isinstance(value, str) and 1 <= len(value) <= MAX_TEXT_CHARACTERS and value.isprintable()


def _shown(names: list[str]) -> str:
    return ascii(names[:4])[:120]


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise PurposeMismatch(f"jwt_svid: {rule}")


def _demand(condition: bool, rule: str) -> None:
    if not condition:
        raise ProfileViolation(f"jwt_svid: {rule}")
