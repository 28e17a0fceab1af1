"""Registration entries: who a workload is, on which node it runs, how it is recognised, and how its key is kept.

An `Entry` that exists is valid; every refusal names its rule. With key_scope identity there is one key and one certificate per SPIFFE ID and
one grant per agent; with key_scope node there is one of each per (SPIFFE ID, agent). `KeyOwner` says which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from hashlib import sha256

from keyreeve_common.errors import FailedPrecondition, InvalidRequest
from keyreeve_common.identity import SpiffeId
from keyreeve_common.purposes import PURPOSES_OF_ROLE, KeyRole, Purpose
from keyreeve_common.schemes import KeyType
from keyreeve_common.x509_svid import RESERVED_DNS_ZONE

RESERVED_PATH = "/keyreeve"
AGENT_PATH = "/keyreeve/agent/"
MAX_SELECTORS = 32
MAX_DELEGATES = 32
MAX_DNS_NAMES = 64
MAX_SELECTOR_VALUE = 1024
MAX_HINT_BYTES = 1024  # WA-08
MIN_TTL = timedelta(seconds=1)
MAX_TTL = timedelta(days=30)
DEFAULT_PURPOSES = frozenset({Purpose.TLS13_SERVER_VERIFY, Purpose.TLS13_CLIENT_VERIFY})
_OFFERED_PURPOSES = PURPOSES_OF_ROLE[KeyRole.HANDSHAKE]
_SELECTOR_TYPE = re.compile(r"[a-z][a-z0-9_]{0,31}", re.ASCII)
_SELECTOR_VALUE = re.compile(r"[^\x00-\x1f\x7f]+")
_BACKEND = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}", re.ASCII)
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DNS_NAME = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*", re.ASCII)
_UNIX_NUMBERS = ("uid", "gid", "supplementary_gid")
_UNIX_TEXTS = ("user", "group", "supplementary_group", "path", "sha256")


class Custody(StrEnum):
    CLUSTER = "cluster"
    NODE = "node"


class KeyScope(StrEnum):
    IDENTITY = "identity"
    NODE = "node"


@dataclass(frozen=True, slots=True, order=True)
class Selector:
    """A property that an attestor observed, `unix` `uid:1000`. Raises: InvalidRequest."""

    type: str
    value: str

    def __post_init__(self) -> None:
        _require(_SELECTOR_TYPE.fullmatch(self.type) is not None, "selector type is not 1 to 32 of a-z 0-9 _")
        _require(
            _SELECTOR_VALUE.fullmatch(self.value) is not None, "selector value is empty or holds control characters"
        )
        _require(_size(self.value) <= MAX_SELECTOR_VALUE, f"selector value is longer than {MAX_SELECTOR_VALUE} bytes")
        if self.type == "unix":
            _check_unix(self.value)

    def __str__(self) -> str:
        return f"{self.type}:{self.value}"


def _check_unix(value: str) -> None:
    name, _, text = value.partition(":")
    known = ", ".join(_UNIX_NUMBERS + _UNIX_TEXTS)
    _require(name in _UNIX_NUMBERS or name in _UNIX_TEXTS, f"unix selector is none of: {known}")
    _require(bool(text), f"unix selector {name} has no value")
    if name in _UNIX_NUMBERS:
        _require(
            re.fullmatch(r"0|[1-9][0-9]{0,9}", text, re.ASCII) is not None, f"unix selector {name} is not a number"
        )
    if name == "path":
        _require(text.startswith("/"), "unix selector path is not absolute")
    if name == "sha256":
        _require(re.fullmatch(r"[0-9a-f]{64}", text, re.ASCII) is not None, "unix selector sha256 is not 64 hex digits")


@dataclass(frozen=True, slots=True, order=True)
class Delegate:
    """Who else may use an entry's key: a process that has all `selectors`, or one attested as `spiffe_id`; exactly one of them is set.

    Raises: InvalidRequest.
    """

    selectors: tuple[Selector, ...] = ()
    spiffe_id: SpiffeId | None = None

    def __post_init__(self) -> None:
        _require(
            bool(self.selectors) != (self.spiffe_id is not None), "delegate has not exactly one of selectors, spiffe_id"
        )
        _require(len(self.selectors) <= MAX_SELECTORS, f"delegate has more than {MAX_SELECTORS} selectors")
        _require(len(set(self.selectors)) == len(self.selectors), "delegate has a selector twice")


@dataclass(frozen=True, slots=True, order=True)
class KeyOwner:
    """Whose key it is: an identity, or an identity on one node (`agent`)."""

    spiffe_id: SpiffeId
    agent: SpiffeId | None = None

    @property
    def digest(self) -> str:
        """A name of bounded length for storage and request ids."""
        return sha256(f"{self.spiffe_id}\n{self.agent or ''}".encode()).hexdigest()

    def request_id(self, generation: int) -> str:
        """For KeyAdmin.CreateKey: the same owner and generation give the same key again."""
        return f"svid-{self.digest[:40]}-{generation}"


@dataclass(frozen=True, slots=True)
class Entry:
    """Raises: InvalidRequest; FailedPrecondition for custody node, which is not offered yet."""

    entry_id: str
    spiffe_id: SpiffeId
    parent_id: SpiffeId
    selectors: tuple[Selector, ...]
    created_at: datetime
    delegates: tuple[Delegate, ...] = ()
    x509_svid_ttl: timedelta | None = None
    dns_names: tuple[str, ...] = ()
    custody: Custody = Custody.CLUSTER
    key_scope: KeyScope = KeyScope.IDENTITY
    key_type: KeyType = KeyType.EC_P256
    key_backend: str = ""
    hint: str = ""
    revision: int = 1
    expires_at: datetime | None = None
    purposes: frozenset[Purpose] = DEFAULT_PURPOSES

    def __post_init__(self) -> None:
        if self.custody is Custody.NODE:
            raise FailedPrecondition("custody node is not offered yet: keys are made in the key cluster only")
        check_workload_id(self.spiffe_id)
        _require(is_agent_id(self.parent_id), f"parent_id is not an agent's SPIFFE ID ({AGENT_PATH}<name>)")
        _require(self.parent_id.member_of(self.spiffe_id.trust_domain), "parent_id is of another trust domain")
        _require(bool(self.selectors), "entry has no selector: it would match every process")
        _require(len(self.selectors) <= MAX_SELECTORS, f"entry has more than {MAX_SELECTORS} selectors")
        _require(len(set(self.selectors)) == len(self.selectors), "entry has a selector twice")
        _require(len(self.delegates) <= MAX_DELEGATES, f"entry has more than {MAX_DELEGATES} delegates")
        _require(len(set(self.delegates)) == len(self.delegates), "entry has a delegate twice")
        for delegate in self.delegates:
            own = delegate.spiffe_id is None or delegate.spiffe_id.member_of(self.spiffe_id.trust_domain)
            _require(own, "delegate is of another trust domain")
        if self.x509_svid_ttl is not None:
            _require(MIN_TTL <= self.x509_svid_ttl <= MAX_TTL, "x509_svid_ttl is not between 1 second and 30 days")
        check_dns_names(self.dns_names)
        _require(not self.key_backend or _BACKEND.fullmatch(self.key_backend) is not None, "key_backend is not a name")
        _require(_size(self.hint) <= MAX_HINT_BYTES, f"hint is longer than {MAX_HINT_BYTES} bytes")
        _require(not self.expires_at or self.expires_at > self.created_at, "expires_at lies before the creation")
        _require(bool(self.purposes) and self.purposes <= _OFFERED_PURPOSES, "purposes holds one that is not offered")
        no_digest = self.key_type is KeyType.ED25519 and Purpose.DIGEST in self.purposes
        _require(not no_digest, "purposes holds digest, which a key of type ed25519 cannot have")

    @property
    def owner(self) -> KeyOwner:
        return KeyOwner(self.spiffe_id, self.parent_id if self.key_scope is KeyScope.NODE else None)

    @property
    def similarity(self) -> str:
        """Two entries with the same parent, SPIFFE ID and selectors are duplicates."""
        parts = [str(self.parent_id), str(self.spiffe_id), *sorted(map(str, self.selectors))]
        return sha256("\n".join(parts).encode()).hexdigest()

    def is_expired(self, now: datetime) -> bool:
        return self.expires_at is not None and now >= self.expires_at


def is_agent_id(spiffe_id: SpiffeId) -> bool:
    name = spiffe_id.path.removeprefix(AGENT_PATH)
    return spiffe_id.path.startswith(AGENT_PATH) and bool(name) and "/" not in name


def check_workload_id(spiffe_id: SpiffeId) -> None:
    """Raises: InvalidRequest for an ID that an entry cannot have."""
    _require(not spiffe_id.is_trust_domain_id, "X5-04 SPIFFE ID of a workload has no path")
    path = spiffe_id.path
    reserved = path == RESERVED_PATH or path.startswith(RESERVED_PATH + "/")
    _require(not reserved, f"SPIFFE IDs under {RESERVED_PATH} are reserved for agents and services")


def check_dns_names(names: tuple[str, ...]) -> None:
    """Raises: InvalidRequest."""
    _require(len(names) <= MAX_DNS_NAMES, f"more than {MAX_DNS_NAMES} DNS names")
    _require(len(set(names)) == len(names), "a DNS name stands there twice")
    for name in names:
        well_formed = len(name) <= 253 and _DNS_NAME.fullmatch(name) is not None
        _require(well_formed, "DNS name is not lower-case letters, digits, '-' and '.', at most 253 bytes")
        bare = name.removeprefix("*.")
        reserved = bare == RESERVED_DNS_ZONE or bare.endswith("." + RESERVED_DNS_ZONE)
        covers = name.startswith("*.") and RESERVED_DNS_ZONE.endswith("." + bare)
        _require(not reserved and not covers, f"DNS names in {RESERVED_DNS_ZONE} are reserved")


def check_shared_key(entry: Entry, others: Iterable[Entry]) -> None:
    """Entries that share a key must agree on what the key is. Raises: FailedPrecondition."""
    for other in others:
        if other.entry_id == entry.entry_id or other.owner != entry.owner:
            continue
        same = (other.key_type, other.key_backend, other.purposes) == (
            entry.key_type,
            entry.key_backend,
            entry.purposes,
        )
        if not same:
            raise FailedPrecondition(
                f"entry {other.entry_id} shares the key of this SPIFFE ID and says otherwise about its key type, backend or purposes"
            )


def check_update(old: Entry, new: Entry) -> None:
    """What an update may not change, since the key and the grants were made for it. Raises: InvalidRequest."""
    for name in ("spiffe_id", "parent_id", "key_scope", "key_type", "key_backend", "purposes", "custody"):
        _require(
            getattr(old, name) == getattr(new, name), f"{name} cannot be changed; delete the entry and make another"
        )


def _size(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequest("text holds a lone surrogate") from None


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise InvalidRequest(rule)
