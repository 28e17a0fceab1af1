"""Who may use which key: pure. A key without a live grant and a key that does not exist are the same refusal, word for word.

Order of the rules: is there a key that this caller may know of; may the caller use it so; is it in use at all. So the answers to a stranger say
nothing of a key's existence, purposes or state.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from keyreeve_common.errors import InvalidRequest, KeyDisabled, KeyNotFound, PurposeNotPermitted
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import OPT_IN_PURPOSES, KeyRole, Purpose

from keyreeve_keyserver.domain.keys import KeyState
from keyreeve_keyserver.domain.rates import Rate

_OPT_IN = "; it is opt-in: name it in the entry, or for the key and the grant, or let the program use TLS 1.3 alone"
LOCAL_PURPOSES = frozenset({Purpose.X509_CERTIFICATE, Purpose.CERTIFICATE_REQUEST})


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """What policy needs to know of a key. `work_class` is what its signatures cost and where: "rsa-4096/software"."""

    key_id: KeyId
    role: KeyRole
    purposes: frozenset[Purpose]
    state: KeyState
    work_class: str = ""


@dataclass(frozen=True, slots=True)
class Grant:
    """Lets `holder` (a SPIFFE ID) use one key for some purposes until `expires_at`, or until it is revoked, at some rate at each replica."""

    key_id: KeyId
    holder: str
    purposes: frozenset[Purpose]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    rate: Rate | None = None

    def is_live(self, now: datetime) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


def authorize_holder(key: KeyFacts | None, grant: Grant | None, purpose: int, now: datetime) -> Grant:
    """The grant, when it covers this use; `grant` is the caller's for this key, if there is one.

    Raises: KeyNotFound, PurposeNotPermitted, KeyDisabled.
    """
    if grant is None or key is None or not grant.is_live(now) or key.state is KeyState.DESTROYED:
        raise KeyNotFound()
    _check_use(key, grant.purposes & key.purposes, purpose, "grant")
    return grant


def authorize_local(key: KeyFacts | None, purpose: int) -> None:
    """The operator on the key host, at bootstrap: certificates by authority keys, nothing else.

    Raises: KeyNotFound, PurposeNotPermitted, KeyDisabled.
    """
    if key is None or key.state is KeyState.DESTROYED:
        raise KeyNotFound()
    allowed = LOCAL_PURPOSES & key.purposes if key.role is KeyRole.AUTHORITY else frozenset()
    _check_use(key, allowed, purpose, "admin socket")


def _check_use(key: KeyFacts, allowed: frozenset[Purpose], purpose: int, source: str) -> None:
    if purpose not in allowed:
        hint = _OPT_IN if purpose in OPT_IN_PURPOSES else ""
        raise PurposeNotPermitted(f"the {source} does not cover purpose {_label(purpose)} for this key{hint}")
    if key.state is not KeyState.ENABLED:
        raise KeyDisabled("the key is disabled; a key administrator can enable it")


def _label(purpose: int) -> str:
    try:
        return Purpose(purpose).label
    except ValueError:
        return str(purpose)


def check_grantable(key: KeyFacts, purposes: frozenset[Purpose], expires_at: datetime | None, now: datetime) -> None:
    """Raises: InvalidRequest, KeyNotFound when no grant of this kind can be made for the key."""
    if key.state is KeyState.DESTROYED:
        raise KeyNotFound("the key is destroyed")
    if not purposes:
        raise InvalidRequest("a grant needs at least one purpose")
    foreign = sorted(purpose.label for purpose in purposes - key.purposes)
    if foreign:
        raise InvalidRequest(f"the key does not have purpose {', '.join(foreign)}")
    check_expiry(expires_at, now)


def check_expiry(expires_at: datetime | None, now: datetime) -> None:
    """Raises: InvalidRequest."""
    if expires_at is not None and expires_at <= now:
        raise InvalidRequest(f"expires_at {expires_at.isoformat()} is not in the future; check the clocks")
