"""The life cycle of issuing authorities: prepared, active, old. One is active, at most one is prepared.

The next one is prepared when half of the active one's life is over (at the latest 30 days before its end) and activated when a sixth is left
(at most 7 days): so an SVID of at most a sixth of an authority's life is never cut short. Spec: spiffe.md 4.4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum, StrEnum

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from keyreeve_common.errors import Conflict, FailedPrecondition, NotFound

PREPARE_CAP = timedelta(days=30)
ACTIVATE_CAP = timedelta(days=7)
UPSTREAM_KEY = (
    "upstream:"  # begins the key_id of a root whose key is not ours; no key id of the key cluster has a colon
)


class AuthorityState(StrEnum):
    PREPARED = "prepared"
    ACTIVE = "active"
    OLD = "old"


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA certificate and where its key is. A root is ACTIVE for as long as it is trusted and takes no part in the life cycle."""

    authority_id: str  # SKI of the certificate, hex
    state: AuthorityState
    key_id: str
    certificate: x509.Certificate
    root: bool = False
    number: int = 1

    @property
    def is_upstream(self) -> bool:
        """Whether it is a root whose key the key cluster does not hold."""
        return self.key_id.startswith(UPSTREAM_KEY)

    @property
    def not_after(self) -> datetime:
        return self.certificate.not_valid_after_utc

    @property
    def life(self) -> timedelta:
        return self.not_after - self.certificate.not_valid_before_utc

    @property
    def certificate_der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def prepare_next_at(self) -> datetime:
        return self.not_after - min(self.life / 2, PREPARE_CAP)

    @property
    def activate_next_at(self) -> datetime:
        return self.not_after - min(self.life / 6, ACTIVATE_CAP)

    def is_expired(self, now: datetime) -> bool:
        return now >= self.not_after


class AuthorityAction(Enum):
    """What is due."""

    NONE = "none"
    PREPARE = "prepare"
    ACTIVATE = "activate"


def authority_id_of(certificate: x509.Certificate) -> str:
    return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest.hex()


def active_authority(authorities: Iterable[Authority]) -> Authority:
    """Raises: FailedPrecondition when there is none."""
    for authority in authorities:
        if not authority.root and authority.state is AuthorityState.ACTIVE:
            return authority
    raise FailedPrecondition("no issuing authority is active; run keyreeve init")


def prepared_authority(authorities: Iterable[Authority]) -> Authority | None:
    found = (each for each in authorities if not each.root and each.state is AuthorityState.PREPARED)
    return next(found, None)


def due_action(authorities: Iterable[Authority], now: datetime) -> AuthorityAction:
    """What the rotation has to do now; a prepared one that expired unused counts for nothing."""
    everything = list(authorities)
    active = active_authority(everything)
    prepared = prepared_authority(everything)
    usable = prepared is not None and not prepared.is_expired(now)
    if usable and now >= active.activate_next_at:
        return AuthorityAction.ACTIVATE
    if not usable and now >= active.prepare_next_at:
        return AuthorityAction.PREPARE
    return AuthorityAction.NONE


def check_can_prepare(authorities: Iterable[Authority], now: datetime) -> None:
    """Raises: Conflict when a usable one is prepared already."""
    prepared = prepared_authority(authorities)
    if prepared is not None and not prepared.is_expired(now):
        raise Conflict(f"authority {prepared.authority_id} is prepared already; activate it first")


def activate(authorities: Iterable[Authority], authority_id: str, now: datetime) -> tuple[Authority, ...]:
    """All authorities after the prepared one became active and the active one old.

    Raises: NotFound; FailedPrecondition when it is not prepared or has expired.
    """
    everything = tuple(authorities)
    chosen = next((each for each in everything if each.authority_id == authority_id and not each.root), None)
    if chosen is None:
        raise NotFound("no such issuing authority")
    if chosen.state is not AuthorityState.PREPARED:
        raise FailedPrecondition(f"authority is {chosen.state}; only a prepared one can be activated")
    if chosen.is_expired(now):
        raise FailedPrecondition("authority has expired; prepare another one")
    return tuple(_after_activation(each, authority_id) for each in everything)


def _after_activation(authority: Authority, chosen: str) -> Authority:
    if authority.root:
        return authority
    if authority.authority_id == chosen:
        return replace(authority, state=AuthorityState.ACTIVE)
    if authority.state is AuthorityState.ACTIVE:
        return replace(authority, state=AuthorityState.OLD)
    return authority


def prepare(authorities: Iterable[Authority], fresh: Authority, now: datetime) -> tuple[Authority, ...]:
    """All authorities with `fresh` prepared; the very first one is active at once. A prepared one that expired becomes old.

    Raises: Conflict.
    """
    everything = tuple(authorities)
    check_can_prepare(everything, now)
    kept = tuple(
        replace(each, state=AuthorityState.OLD) if not each.root and each.state is AuthorityState.PREPARED else each
        for each in everything
    )
    first = not any(each.state is AuthorityState.ACTIVE and not each.root for each in kept)
    return (*kept, replace(fresh, state=AuthorityState.ACTIVE if first else AuthorityState.PREPARED))


def next_number(authorities: Iterable[Authority], *, root: bool) -> int:
    return 1 + max((each.number for each in authorities if each.root is root), default=0)
