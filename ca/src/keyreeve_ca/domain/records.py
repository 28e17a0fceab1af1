"""What the CA keeps records of beside entries and authorities: agents, managed keys, issued SVIDs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from hashlib import sha256

from keyreeve_common.identity import SpiffeId

from keyreeve_ca.domain.entries import KeyOwner


@dataclass(frozen=True, slots=True)
class Agent:
    """A node that attested. Its SVIDs with one of `serials` may act for it: the newest, and the one it was renewed from."""

    spiffe_id: SpiffeId
    attestation_type: str
    serials: tuple[str, ...]
    svid_not_after: datetime
    attested_at: datetime
    last_seen_at: datetime
    banned: bool = False
    evicted: bool = False
    agent_version: str = ""

    @property
    def may_act(self) -> bool:
        return not self.banned and not self.evicted


class KeyUse(StrEnum):
    IN_USE = "in_use"
    RETIRING = "retiring"  # the CA is about to disable it
    RETIRED = "retired"  # the CA disabled it when its last entry went; a new entry enables it
    STOPPED = "stopped"  # an operator had disabled or destroyed it before: only an operator enables it


@dataclass(frozen=True, slots=True)
class ManagedKey:
    """The key of one owner in the key cluster."""

    owner: KeyOwner
    generation: int
    key_id: str
    spki_der: bytes
    fingerprint: str
    use: KeyUse = KeyUse.IN_USE


@dataclass(frozen=True, slots=True)
class FormerKey:
    """An earlier generation of an owner's key. `retire_at`: what the key cluster was told; None while it was told nothing."""

    key_id: str
    owner_digest: str
    generation: int
    retire_at: datetime | None = None


class SvidState(StrEnum):
    INTENDED = "intended"  # recorded; not signed, or the signature never came
    ISSUED = "issued"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class SvidRecord:
    """One line of the inventory. `subject` groups the SVIDs that follow one another; `wanted` is a digest of what was ordered."""

    serial: str
    spiffe_id: SpiffeId
    subject: str
    authority_id: str
    state: SvidState
    not_before: datetime
    not_after: datetime
    created_at: datetime
    entry_id: str = ""
    key_id: str = ""
    wanted: str = ""
    chain_der: tuple[bytes, ...] = ()
    failure: str = ""
    current: bool = False


def renewal_time(serial: str, created_at: datetime, not_after: datetime) -> datetime:
    """When an SVID is due: at half of its life after issuance, give or take a twentieth by the serial, so that a fleet does not renew as one.

    The back-date does not count: one that is longer than the life would make every SVID due as soon as it is issued.
    """
    jitter = (int(serial[-4:], 16) / 0xFFFF - 0.5) / 10
    return created_at + (not_after - created_at) * (0.5 + jitter)


@dataclass(frozen=True, slots=True)
class Changes:
    """What happened up to a step of the change sequence: digests of the agents concerned; None: everyone may be."""

    number: int
    agents: frozenset[str] | None


def digest_of(*parts: object) -> str:
    """A short digest of what was ordered, to see whether an order changed."""
    return sha256("\n".join(map(str, parts)).encode()).hexdigest()
