"""Which local process may use which key: pure rules over selectors.

A peer may use a key when all selectors of one of the key's entries, or of one of that entry's delegates, are among the peer's own, or when
the peer is itself attested as a delegate's SPIFFE ID. An empty set of selectors matches nobody. Being a delegate is not handed on: whoever
may use a key only as a delegate is not thereby attested as its SPIFFE ID.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import Protocol

from keyreeve_common.errors import KeyNotFound
from keyreeve_common.identity import SpiffeId
from keyreeve_common.key_id import KeyId


@dataclass(frozen=True, slots=True, order=True)
class Selector:
    """`type` "unix", `value` "uid:1000"; the kind is the value up to its first colon."""

    type: str
    value: str

    @property
    def kind(self) -> str:
        return f"{self.type}:{self.value.partition(':')[0]}"

    def __str__(self) -> str:
        return f"{self.type}:{self.value}"


Selectors = frozenset[Selector]


@dataclass(frozen=True, slots=True)
class Delegate:
    """A process with all these selectors, or one attested as this SPIFFE ID."""

    selectors: Selectors = frozenset()
    spiffe_id: SpiffeId | None = None


class Entry(Protocol):
    """What authorisation needs of an assignment."""

    @property
    def spiffe_id(self) -> SpiffeId: ...
    @property
    def key_id(self) -> KeyId: ...
    @property
    def selectors(self) -> Selectors: ...
    @property
    def delegates(self) -> tuple[Delegate, ...]: ...


@dataclass(frozen=True, slots=True)
class KeyRules:
    """For each key the selector sets of which a peer must have one whole; delegates' SPIFFE IDs are resolved to their own selectors."""

    alternatives: dict[KeyId, frozenset[Selectors]] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> KeyRules:
        entries = list(entries)
        attested_by: dict[SpiffeId, set[Selectors]] = defaultdict(set)
        for entry in entries:
            attested_by[entry.spiffe_id].add(entry.selectors)
        found: dict[KeyId, set[Selectors]] = defaultdict(set)
        for entry in entries:
            found[entry.key_id].add(entry.selectors)
            for delegate in entry.delegates:
                found[entry.key_id].add(delegate.selectors)
                if delegate.spiffe_id is not None:
                    found[entry.key_id] |= attested_by.get(delegate.spiffe_id, set())
        return cls({key_id: frozenset(sets - {frozenset()}) for key_id, sets in found.items()})

    def check(self, key_id: KeyId, selectors: Set[Selector]) -> None:
        """Raises: KeyNotFound, the same for a key that does not exist and for one that this peer may not use."""
        if not any(needed <= selectors for needed in self.alternatives.get(key_id, ())):
            raise KeyNotFound

    def kinds_to_learn(self, key_id: KeyId, known: Set[Selector], costly: Set[str]) -> frozenset[str]:
        """The kinds among `costly` that could still decide for this peer, given all its cheap selectors.

        Nothing costly is learnt about a peer that the cheap selectors rule out already.
        """
        kinds: set[str] = set()
        for needed in self.alternatives.get(key_id, ()):
            missing = {selector.kind for selector in needed - known}
            if missing <= costly:
                kinds |= missing
        return frozenset(kinds)
