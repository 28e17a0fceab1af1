"""What the store says of one agent at a time, read in a number of statements that does not grow with its entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from keyreeve_ca.domain.entries import Entry
from keyreeve_ca.domain.grants import NodeGrant
from keyreeve_ca.domain.records import ManagedKey, SvidRecord


@dataclass(frozen=True, slots=True)
class SvidWish:
    """What the entries that share one key want of its certificate: all their DNS names, the shortest of their lives.

    `ttl`: the shortest that is given; `undecided`: at least one of them leaves its life to the CA.
    """

    dns_names: tuple[str, ...] = ()
    ttl: timedelta | None = None
    undecided: bool = True

    def life(self, default: timedelta) -> timedelta:
        """The shortest of their lives."""
        lives = [each for each in (self.ttl, default if self.undecided else None) if each is not None]
        return min(lives, default=default)

    def joined(self, other: SvidWish) -> SvidWish:
        lives = [each for each in (self.ttl, other.ttl) if each is not None]
        names = tuple(sorted({*self.dns_names, *other.dns_names}))
        return SvidWish(names, min(lives, default=None), self.undecided or other.undecided)


@dataclass(frozen=True, slots=True)
class OwnersView:
    """By the digest of the key's owner: its key, its current SVID, what its entries want, key ids of earlier generations."""

    keys: Mapping[str, ManagedKey] = field(default_factory=dict)
    svids: Mapping[str, SvidRecord] = field(default_factory=dict)
    wishes: Mapping[str, SvidWish] = field(default_factory=dict)
    former_key_ids: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AgentView:
    """An agent's entries that have not expired, with its grants by owner digest."""

    entries: tuple[Entry, ...]
    grants: Mapping[str, NodeGrant]
    owners: OwnersView
