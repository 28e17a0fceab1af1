"""What the catalog keeps, as values, and how rows become values."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import KeyRole, Purpose, parse_purpose
from keyreeve_common.schemes import KeyType
from sqlalchemy import Row

from keyreeve_keyserver.domain.keys import (
    AuthorityProfile,
    JwtProfile,
    KeyState,
    parse_authority_profile,
    parse_jwt_profile,
)
from keyreeve_keyserver.domain.policy import Grant, KeyFacts
from keyreeve_keyserver.domain.quarantine import Quarantine
from keyreeve_keyserver.domain.rates import Rate

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class NewKey:
    """What CreateKey asks for; `request_id` is its caller's."""

    request_id: str
    key_type: KeyType
    role: KeyRole
    purposes: frozenset[Purpose]
    backend: str
    label: str
    authority_profile: AuthorityProfile | None = None
    jwt_profile: JwtProfile | None = None
    predecessor: str = ""  # the key that this one is the next generation of


@dataclass(frozen=True, slots=True)
class KeyLife:
    """Where a key stands among its generations, what is to become of it and when, and why the cluster itself disabled it."""

    generation: int = 1
    predecessor: str = ""
    successor: str = ""
    retire_at: datetime | None = None
    destroy_at: datetime | None = None
    state_reason: str = ""


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """A key of the catalog, without its sealed record. `state` is None while the signer has not answered yet."""

    key_id: KeyId
    key_type: KeyType
    role: KeyRole
    purposes: frozenset[Purpose]
    backend: str
    label: str
    authority_profile: AuthorityProfile | None
    state: KeyState | None
    spki_der: bytes
    attributes: dict[str, Any] = field(hash=False)
    created_at: datetime
    seq: int
    life: KeyLife = field(default_factory=KeyLife)
    jwt_profile: JwtProfile | None = None

    @property
    def facts(self) -> KeyFacts:
        assert self.state is not None  # noqa: S101 - entries in creation never leave the catalog's own flow
        return KeyFacts(self.key_id, self.role, self.purposes, self.state, _work_class(self.key_type, self.backend))


@dataclass(frozen=True, slots=True)
class GrantEntry:
    grant: Grant
    seq: int


@dataclass(frozen=True, slots=True)
class QuarantineEntry:
    quarantine: Quarantine
    seq: int


@dataclass(frozen=True, slots=True)
class Changes:
    """Everything written after one value of the change counter, up to `seq`."""

    seq: int
    keys: tuple[tuple[KeyFacts, int], ...]
    grants: tuple[GrantEntry, ...]
    quarantines: tuple[QuarantineEntry, ...] = ()


def key_entry(row: Row[Any]) -> KeyEntry:
    profile = json.loads(row.authority_profile) if row.authority_profile else None
    jwt_profile = json.loads(row.jwt_profile) if row.jwt_profile else None
    return KeyEntry(
        key_id=KeyId(row.key_id),
        key_type=KeyType(row.key_type),
        role=KeyRole(row.role),
        purposes=purposes_from_text(row.purposes),
        backend=row.backend,
        label=row.label,
        authority_profile=parse_authority_profile(profile) if profile else None,
        state=_state(row.state, row.destroy_at),
        spki_der=bytes(row.spki_der or b""),
        attributes=json.loads(row.attributes),
        created_at=time_from_number(row.created_at),
        seq=row.seq,
        life=KeyLife(
            generation=row.generation or 1,
            predecessor=row.predecessor or "",
            successor=row.successor or "",
            retire_at=_time(row.retire_at),
            destroy_at=_time(row.destroy_at),
            state_reason=row.state_reason or "",
        ),
        jwt_profile=parse_jwt_profile(jwt_profile) if jwt_profile else None,
    )


def key_facts(row: Row[Any]) -> tuple[KeyFacts, int]:
    facts = KeyFacts(
        KeyId(row.key_id),
        KeyRole(row.role),
        purposes_from_text(row.purposes),
        KeyState(row.state),
        _work_class(row.key_type, row.backend),
    )
    return facts, row.seq


def _work_class(key_type: str, backend: str) -> str:
    return f"{key_type}/{backend}"


def grant_entry(row: Row[Any]) -> GrantEntry:
    grant = Grant(
        key_id=KeyId(row.key_id),
        holder=row.holder,
        purposes=purposes_from_text(row.purposes),
        created_at=time_from_number(row.created_at),
        expires_at=None if row.expires_at is None else time_from_number(row.expires_at),
        revoked_at=None if row.revoked_at is None else time_from_number(row.revoked_at),
        rate=None if row.rate_per_second is None else Rate(row.rate_per_second, row.rate_burst),
    )
    return GrantEntry(grant, row.seq)


def _state(text: str, destroy_at: int | None) -> KeyState | None:
    """A key that waits for its destruction is stored as a disabled one, which is what replicas of the release before know of it."""
    if text == KeyState.DISABLED and destroy_at is not None:
        return KeyState.PENDING_DESTRUCTION
    return KeyState(text) if text in set(KeyState) else None


def _time(number: int | None) -> datetime | None:
    return None if number is None else time_from_number(number)


def purposes_to_text(purposes: frozenset[Purpose]) -> str:
    return " ".join(sorted(purpose.label for purpose in purposes))


_PURPOSES_BY_TEXT: dict[str, frozenset[Purpose]] = {}


def purposes_from_text(text: str) -> frozenset[Purpose]:
    """Equal texts give one object: a million grants share a handful of sets."""
    found = _PURPOSES_BY_TEXT.get(text)
    if found is None:
        found = _PURPOSES_BY_TEXT[text] = frozenset(parse_purpose(label) for label in text.split())
    return found


def time_to_number(time: datetime) -> int:
    return (time - _EPOCH) // _MICROSECOND


def time_from_number(number: int) -> datetime:
    return _EPOCH + number * _MICROSECOND
