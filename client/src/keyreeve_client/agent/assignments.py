"""What the CA lets this agent serve: each assignment verified on its own, so that a bad one is refused and the others go on.

Always true of an Assignment that exists: its chain leads to the bundle of our trust domain, its leaf carries the SPIFFE ID and the public
key that the assignment names, and the key is of a type that we know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keyreeve_common.bundle import bundle_from_proto
from keyreeve_common.errors import ErrorCode, InvalidRequest, KeyNotFound, KeyreeveError, SvidInvalid, error_from_code
from keyreeve_common.grpc_edge import error_from_proto
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.key_id import KeyId, parse_key_id
from keyreeve_common.schemes import KeyType, key_type_of
from keyreeve_common.v1 import ca_pb2, types_pb2
from keyreeve_common.x509_svid import UNREADABLE, X509Svid, load_chain_der, verify_chain

from keyreeve_client.agent.authorisation import Delegate, KeyRules, Selector, Selectors


@dataclass(frozen=True, slots=True)
class Assignment:
    """One identity that this node runs, and the reference to its key."""

    entry_id: str
    revision: int
    svid: X509Svid
    chain: tuple[x509.Certificate, ...]
    key_id: KeyId
    key_type: KeyType
    spki_der: bytes
    selectors: Selectors
    delegates: tuple[Delegate, ...]
    hint: str
    former_key_ids: tuple[KeyId, ...] = ()

    @property
    def spiffe_id(self) -> SpiffeId:
        return self.svid.spiffe_id


@dataclass(frozen=True, slots=True)
class Refused:
    """An assignment that is not used, and why."""

    entry_id: str
    spiffe_id: str
    error: KeyreeveError


@dataclass(frozen=True, slots=True)
class AgentState:
    """All that the agent serves now: replaced whole at each push."""

    sequence: int = 0
    assignments: tuple[Assignment, ...] = ()
    refused: tuple[Refused, ...] = ()
    rules: KeyRules = field(default_factory=KeyRules)
    by_key: dict[KeyId, Assignment] = field(default_factory=dict)

    @classmethod
    def of(cls, sequence: int, assignments: Sequence[Assignment], refused: Sequence[Refused]) -> AgentState:
        by_key: dict[KeyId, Assignment] = {}
        usable = [*_former(assignments), *assignments]
        for assignment in sorted(usable, key=_freshness):
            by_key[assignment.key_id] = assignment
        return cls(sequence, tuple(assignments), tuple(refused), KeyRules.of(usable), by_key)

    def of_spiffe_id(self, spiffe_id: SpiffeId) -> Assignment | None:
        """The freshest assignment of this identity."""
        found = [assignment for assignment in self.assignments if assignment.spiffe_id == spiffe_id]
        return max(found, key=_freshness, default=None)


def _former(assignments: Sequence[Assignment]) -> Iterator[Assignment]:
    """The same identities by their keys' earlier generations: a proxy that has not reloaded yet asks for those."""
    for assignment in assignments:
        for key_id in assignment.former_key_ids:
            yield replace(assignment, key_id=key_id, former_key_ids=())


def _freshness(assignment: Assignment) -> tuple[datetime, str]:
    return assignment.svid.not_after, assignment.entry_id


class Clock(Protocol):
    def __call__(self) -> datetime: ...


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass
class CurrentKeys:
    """What the sign socket asks: the rules of the state of this moment, and the clock."""

    state: AgentState = field(default_factory=AgentState)
    clock: Clock = utc_now

    def kinds_to_learn(self, key_id: KeyId, known: Set[Selector], costly: Set[str]) -> frozenset[str]:
        return self.state.rules.kinds_to_learn(key_id, known, costly)

    def check(self, key_id: KeyId, selectors: Set[Selector]) -> None:
        """Raises: KeyNotFound; SvidExpired, only to a peer that may use the key."""
        self.state.rules.check(key_id, selectors)
        assignment = self.state.by_key.get(key_id)
        if assignment is None:
            raise KeyNotFound
        assignment.svid.check_time(self.clock())


def parse_bundle(bundle: types_pb2.Bundle, trust_domain: TrustDomain) -> list[x509.Certificate]:
    """The authorities in `bundle`. Raises: SvidInvalid when it is of another trust domain, empty, or holds what is no authority."""
    if bundle.trust_domain != trust_domain.name:
        raise SvidInvalid(f"bundle is of trust domain {bundle.trust_domain[:255]!r}, expected is {trust_domain}")
    try:
        authorities = list(bundle_from_proto(bundle).authorities)
    except InvalidRequest as error:
        raise SvidInvalid(error.detail) from error
    if not authorities:
        raise SvidInvalid(f"bundle of {trust_domain} holds no authority; the one in use stays")
    return authorities


def parse_assignments(
    message: ca_pb2.Assignments,
    *,
    trust_domain: TrustDomain,
    authorities: Sequence[x509.Certificate],
    now: datetime,
) -> AgentState:
    """The state that `message` describes; whatever in it does not hold stands in `refused`."""
    good: list[Assignment] = []
    bad: list[Refused] = []
    for item in message.assignments:
        try:
            good.append(_verify(item, trust_domain=trust_domain, authorities=authorities, now=now))
        except KeyreeveError as error:
            bad.append(Refused(item.entry_id, item.spiffe_id, error))
        except UNREADABLE as error:
            bad.append(Refused(item.entry_id, item.spiffe_id, _unreadable(error)))
    return AgentState.of(message.sequence, good, bad)


def _unreadable(error: Exception) -> KeyreeveError:
    return error_from_code(ErrorCode.SVID_INVALID.value, f"assignment cannot be read: {type(error).__name__}")


def _verify(
    item: ca_pb2.Assignment,
    *,
    trust_domain: TrustDomain,
    authorities: Sequence[x509.Certificate],
    now: datetime,
) -> Assignment:
    if item.HasField("error"):
        raise error_from_proto(item.error)
    spiffe_id = SpiffeId.parse(item.spiffe_id)
    chain = load_chain_der(list(item.chain_der))
    svid = verify_chain(chain, trust_domain=trust_domain, authorities=authorities, now=now)
    if svid.spiffe_id != spiffe_id:
        raise SvidInvalid(f"leaf is of {svid.spiffe_id}, the assignment says {spiffe_id}")
    public_key = svid.certificate.public_key()
    if public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != item.spki_der:
        raise SvidInvalid(f"leaf of {spiffe_id} has another public key than the assignment's key")
    return Assignment(
        entry_id=item.entry_id,
        revision=item.revision,
        svid=svid,
        chain=tuple(chain),
        key_id=parse_key_id(item.key_id),
        key_type=key_type_of(public_key),
        spki_der=item.spki_der,
        selectors=_selectors(item.selectors),
        delegates=tuple(
            Delegate(_selectors(delegate.selectors), SpiffeId.parse(delegate.spiffe_id) if delegate.spiffe_id else None)
            for delegate in item.delegates
        ),
        hint=item.hint,
        former_key_ids=tuple(parse_key_id(key_id) for key_id in item.former_key_ids),
    )


def _selectors(items: Sequence[ca_pb2.Selector]) -> Selectors:
    return frozenset(Selector(item.type, item.value) for item in items)
