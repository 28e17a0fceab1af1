"""Command-line arguments, parsed into what the services take. A wrong argument is a usage error (exit code 2) that names it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from keyreeve_common.config import parse_duration
from keyreeve_common.errors import KeyreeveError
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.key_id import parse_key_id
from keyreeve_common.purposes import Purpose, parse_purpose
from keyreeve_common.schemes import KeyType
from keyreeve_common.v1 import ca_pb2, keyserver_pb2, types_pb2

T = TypeVar("T")
_RATE = re.compile(r"([0-9]{1,7})/([smh])", re.ASCII)
_MAX_BURST = 2**31 - 1
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def spiffe_id(text: str) -> str:
    return str(_checked(SpiffeId.parse, text))


def key_id(text: str) -> str:
    return _checked(parse_key_id, text)


def duration(text: str) -> timedelta:
    return _checked(parse_duration, text)


def duration_proto(text: str | None) -> Duration | None:
    if text is None:
        return None
    message = Duration()
    message.FromTimedelta(duration(text))
    return message


def expiry_proto(text: str | None, *, now: datetime | None = None) -> Timestamp | None:
    """A time in RFC 3339 with its zone, or a duration from now."""
    if text is None:
        return None
    try:
        when = _instant(text) or (now or datetime.now(UTC)) + duration(text)
    except OverflowError:
        raise typer.BadParameter(f"{text[:64]!r} lies beyond the year 9999") from None
    message = Timestamp()
    message.FromDatetime(when)
    return message


def rate_proto(text: str | None, burst: int | None) -> keyserver_pb2.Rate | None:
    """A number and a unit of time, such as `500/s`, `10/m` or `1/h`."""
    if text is None:
        if burst is not None:
            raise typer.BadParameter("--burst goes with --rate")
        return None
    match = _RATE.fullmatch(text)
    if match is None or not int(match[1]):
        raise typer.BadParameter(f"{text[:32]!r} is not a rate such as 500/s, 10/m or 1/h")
    if burst is not None and burst > _MAX_BURST:
        raise typer.BadParameter(f"--burst: at most {_MAX_BURST}")
    count = int(match[1])
    return keyserver_pb2.Rate(per_second=count / _SECONDS[match[2]], burst=2 * count if burst is None else burst)


def instant(text: str) -> datetime:
    """A time in RFC 3339 with its zone."""
    when = _instant(text)
    if when is None:
        raise typer.BadParameter(f"{text[:64]!r} is not a time such as 2030-01-31T12:00:00Z")
    return when


def _instant(text: str) -> datetime | None:
    if "T" not in text:
        return None
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text[:64]!r} is not a time such as 2030-01-31T12:00:00Z") from None
    if when.tzinfo is None:
        raise typer.BadParameter(f"{text[:64]!r} has no zone: add Z for UTC")
    try:
        return when.astimezone(UTC)
    except OverflowError:
        raise typer.BadParameter(f"{text[:64]!r} lies outside of the years 1 to 9999 in UTC") from None


def selector(text: str) -> ca_pb2.Selector:
    """`unix:uid:1000` is of type `unix` and has the value `uid:1000`."""
    kind, colon, value = text.partition(":")
    if not (kind and colon and value):
        raise typer.BadParameter(f"{text[:64]!r} is not a selector such as unix:uid:1000")
    return ca_pb2.Selector(type=kind, value=value)


def selectors(texts: Iterable[str]) -> list[ca_pb2.Selector]:
    return [selector(text) for text in texts]


def delegate(text: str) -> ca_pb2.Delegate:
    """A SPIFFE ID, or selectors that a process must all have, with commas between."""
    if text.startswith("spiffe://"):
        return ca_pb2.Delegate(spiffe_id=spiffe_id(text))
    return ca_pb2.Delegate(selectors=selectors(text.split(",")))


def purposes(texts: Iterable[str]) -> list[types_pb2.Purpose.ValueType]:
    return [types_pb2.Purpose.ValueType(_checked(parse_purpose, text).value) for text in texts]


def jwt_profile(purposes: Iterable[str], trust_domain: str, max_ttl: str) -> keyserver_pb2.JwtProfile | None:
    """The profile of a JWT authority's key; None for the keys of other purposes, which have none."""
    if Purpose.JWT_SVID.label not in purposes:
        if trust_domain or max_ttl:
            raise typer.BadParameter("--trust-domain and --max-ttl are for --purpose jwt_svid")
        return None
    if not (trust_domain and max_ttl):
        raise typer.BadParameter("--purpose jwt_svid needs --trust-domain and --max-ttl")
    domain = _checked(TrustDomain, trust_domain)
    return keyserver_pb2.JwtProfile(trust_domain=domain.name, max_ttl=duration_proto(max_ttl))


def hexadecimal(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise typer.BadParameter(f"{text[:64]!r} is not hexadecimal") from None


def key_type(value: KeyType | None) -> types_pb2.KeyType.ValueType:
    if value is None:
        return types_pb2.KEY_TYPE_UNSPECIFIED
    return types_pb2.KeyType.Value("KEY_TYPE_" + value.value.replace("-", "_").upper())


def _checked(parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except KeyreeveError as error:
        raise typer.BadParameter(error.detail) from None
