"""Catalog values and protobuf messages, both ways. Closed sets are matched by name, so a new member is noticed by its test."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from keyreeve_common.errors import InvalidRequest
from keyreeve_common.identity import TrustDomain
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType, schemes_of
from keyreeve_common.v1 import keyserver_pb2, types_pb2

from keyreeve_keyserver.catalog.records import KeyEntry, NewKey
from keyreeve_keyserver.domain.keys import (
    MAX_LABEL_BYTES,
    MAX_NAME_BYTES,
    MAX_PROFILE_SECONDS,
    AuthorityKind,
    AuthorityProfile,
    JwtProfile,
    KeyState,
    check_purposes,
)
from keyreeve_keyserver.domain.policy import Grant
from keyreeve_keyserver.domain.rates import Rate

M = TypeVar("M")
N = TypeVar("N", bound=int)
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}", re.ASCII)
_BACKEND = re.compile(rf"[a-z0-9-]{{1,{MAX_NAME_BYTES}}}", re.ASCII)
_KEY_TYPES = {types_pb2.KeyType.Value(f"KEY_TYPE_{key_type.name}"): key_type for key_type in KeyType}
_ROLES = {keyserver_pb2.KeyRole.Value(f"KEY_ROLE_{role.name}"): role for role in KeyRole}
_STATES = {keyserver_pb2.KeyState.Value(f"KEY_STATE_{state.name}"): state for state in KeyState}
_KINDS = {keyserver_pb2.AuthorityProfile.Kind.Value(f"KIND_{kind.name}"): kind for kind in AuthorityKind}
_KEY_TYPE_NUMBERS = {member: number for number, member in _KEY_TYPES.items()}
_ROLE_NUMBERS = {member: number for number, member in _ROLES.items()}
_STATE_NUMBERS = {member: number for number, member in _STATES.items()}
_KIND_NUMBERS = {member: number for number, member in _KINDS.items()}
_SECOND = timedelta(seconds=1)
_MAX_WAIT_SECONDS = 10 * 366 * 86_400


def new_key_from_proto(request: keyserver_pb2.CreateKeyRequest, own: TrustDomain) -> NewKey:
    """Raises: InvalidRequest, which names the field."""
    checked_request_id(request.request_id)
    if len(request.label.encode()) > MAX_LABEL_BYTES or not request.label.isprintable():
        raise InvalidRequest(f"label: at most {MAX_LABEL_BYTES} bytes, printable")
    if request.backend and _BACKEND.fullmatch(request.backend) is None:
        raise InvalidRequest("backend: is not 1 to 64 of a-z, 0-9 and '-'")
    role = _member(_ROLES, request.role, "role")
    purposes = purposes_from_proto(request.purposes)
    profile = _profile_from_proto(request.authority_profile) if request.HasField("authority_profile") else None
    if profile is not None and profile.trust_domain != own:
        raise InvalidRequest(f"authority_profile: trust domain is not {own}, the one of this key cluster")
    jwt_profile = _jwt_profile_from_proto(request.jwt_profile) if request.HasField("jwt_profile") else None
    if jwt_profile is not None and jwt_profile.trust_domain != own:
        raise InvalidRequest(f"jwt_profile: trust domain is not {own}, the one of this key cluster")
    key_type = _member(_KEY_TYPES, request.key_type, "key_type")
    check_purposes(role, purposes, profile, jwt_profile, key_type=key_type)
    return NewKey(
        request_id=request.request_id,
        key_type=key_type,
        role=role,
        purposes=purposes,
        backend=request.backend,
        label=request.label,
        authority_profile=profile,
        jwt_profile=jwt_profile,
    )


def checked_request_id(text: str) -> str:
    """Raises: InvalidRequest."""
    if _REQUEST_ID.fullmatch(text) is None:
        raise InvalidRequest("request_id: 1 to 128 visible ASCII characters, chosen anew for each key")
    return text


def key_to_proto(entry: KeyEntry, *, signatures: int) -> keyserver_pb2.Key:
    assert entry.state is not None  # noqa: S101 - entries in creation never leave the catalog's own flow
    attributes = entry.attributes
    message = keyserver_pb2.Key(
        key_id=entry.key_id,
        key_type=_KEY_TYPE_NUMBERS[entry.key_type],
        role=_ROLE_NUMBERS[entry.role],
        purposes=purposes_to_proto(entry.purposes),
        state=_STATE_NUMBERS[entry.state],
        backend=entry.backend,
        label=entry.label,
        spki_der=entry.spki_der,
        schemes=[int(scheme) for scheme in schemes_of(entry.key_type)],
        attributes=keyserver_pb2.KeyAttributes(
            token=str(attributes.get("token") or ""),
            object=str(attributes.get("object_label") or attributes.get("object") or ""),
            sensitive=bool(attributes.get("sensitive", False)),
            extractable=bool(attributes.get("extractable", False)),
            generated_in_token=bool(attributes.get("generated_in_token", False)),
        ),
        created_at=_timestamp(entry.created_at),
        signatures=signatures,
        generation=entry.life.generation,
        predecessor=entry.life.predecessor,
        successor=entry.life.successor,
        life=keyserver_pb2.KeyLife(
            state_reason=entry.life.state_reason,
            retire_at=_timestamp(entry.life.retire_at),
            destroy_at=_timestamp(entry.life.destroy_at),
        ),
    )
    if entry.authority_profile is not None:
        message.authority_profile.CopyFrom(_profile_to_proto(entry.authority_profile))
    if entry.jwt_profile is not None:
        message.jwt_profile.trust_domain = entry.jwt_profile.trust_domain.name
        message.jwt_profile.max_ttl.FromTimedelta(entry.jwt_profile.max_ttl)
    return message


def grant_to_proto(grant: Grant) -> keyserver_pb2.Grant:
    return keyserver_pb2.Grant(
        key_id=grant.key_id,
        holder=grant.holder,
        purposes=purposes_to_proto(grant.purposes),
        expires_at=_timestamp(grant.expires_at),
        created_at=_timestamp(grant.created_at),
        revoked_at=_timestamp(grant.revoked_at),
        rate=None
        if grant.rate is None
        else keyserver_pb2.Rate(per_second=grant.rate.per_second, burst=grant.rate.burst),
    )


def rate_from_proto(message: keyserver_pb2.Rate) -> Rate:
    """Raises: InvalidRequest."""
    return Rate(message.per_second, message.burst)


def purposes_from_proto(numbers: Sequence[int]) -> frozenset[Purpose]:
    """Raises: InvalidRequest."""
    try:
        purposes = frozenset(Purpose(number) for number in numbers)
    except ValueError:
        raise InvalidRequest("purposes: holds a purpose that Keyreeve does not know") from None
    if Purpose.UNSPECIFIED in purposes or len(purposes) != len(numbers):
        raise InvalidRequest("purposes: holds an unspecified one, or one twice")
    return purposes


def purposes_to_proto(purposes: frozenset[Purpose]) -> list[types_pb2.Purpose.ValueType]:
    return [types_pb2.Purpose.Value(f"PURPOSE_{purpose.name}") for purpose in sorted(purposes)]


def key_type_to_proto(name: str) -> types_pb2.KeyType.ValueType:
    """The number of a key type by its name; unspecified for one that this program does not know."""
    found = _KEY_TYPE_NUMBERS.get(KeyType(name)) if name in set(KeyType) else None
    return found if found is not None else types_pb2.KEY_TYPE_UNSPECIFIED


def wait_from_proto(message: Duration) -> timedelta:
    """Raises: InvalidRequest for a duration that is no whole number of seconds, or out of bounds."""
    if not 0 <= message.seconds <= _MAX_WAIT_SECONDS or message.nanos:
        raise InvalidRequest(f"after: allowed are 0 to {_MAX_WAIT_SECONDS} s, whole seconds")
    return _SECOND * message.seconds


def time_to_proto(time: datetime | None) -> Timestamp | None:
    return _timestamp(time)


def time_from_proto(message: Timestamp, field: str) -> datetime:
    """Raises: InvalidRequest for a time outside the years 1 to 9999."""
    try:
        return message.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise InvalidRequest(f"{field}: is not a time") from None


def _timestamp(time: datetime | None) -> Timestamp | None:
    if time is None:
        return None
    message = Timestamp()
    message.FromDatetime(time)
    return message


def _profile_from_proto(message: keyserver_pb2.AuthorityProfile) -> AuthorityProfile:
    kind = _member(_KINDS, message.kind, "authority_profile.kind")
    if kind is AuthorityKind.ISSUING and message.max_path_length:
        raise InvalidRequest("authority_profile.max_path_length: is only for KIND_ROOT")
    return AuthorityProfile(
        trust_domain=TrustDomain(message.trust_domain),
        kind=kind,
        subject_der=message.subject_der,
        max_validity=_duration(message.max_validity, "authority_profile.max_validity"),
        max_backdate=_duration(message.max_backdate, "authority_profile.max_backdate"),
        max_path_length=message.max_path_length if kind is AuthorityKind.ROOT else None,
    )


def _jwt_profile_from_proto(message: keyserver_pb2.JwtProfile) -> JwtProfile:
    return JwtProfile(TrustDomain(message.trust_domain), _duration(message.max_ttl, "jwt_profile.max_ttl"))


def _duration(message: Duration, field: str) -> timedelta:
    """Whole seconds, as the sealed record keeps them."""
    if not 0 <= message.seconds <= MAX_PROFILE_SECONDS:
        raise InvalidRequest(f"{field}: allowed are 0 to {MAX_PROFILE_SECONDS} s")
    return _SECOND * message.seconds


def _profile_to_proto(profile: AuthorityProfile) -> keyserver_pb2.AuthorityProfile:
    message = keyserver_pb2.AuthorityProfile(
        trust_domain=profile.trust_domain.name,
        kind=_KIND_NUMBERS[profile.kind],
        subject_der=profile.subject_der,
        max_path_length=profile.max_path_length or 0,
    )
    message.max_validity.FromTimedelta(profile.max_validity)
    message.max_backdate.FromTimedelta(profile.max_backdate)
    return message


def _member(table: Mapping[N, M], number: N, field: str) -> M:
    found = table.get(number)
    if found is None:
        raise InvalidRequest(f"{field}: is missing, or not one that Keyreeve knows")
    return found
