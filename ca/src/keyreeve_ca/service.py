"""What is common to all use cases is in `Ca`: policy, store, key cluster, clock. How an SVID is issued is in `issuance_service`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keyreeve_common.bundle import Bundle
from keyreeve_common.errors import ErrorCode, InvalidRequest, KeyreeveError
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.schemes import KeyType

from keyreeve_ca.domain.authority import Authority
from keyreeve_ca.domain.issuance import (
    sign_builder,
)
from keyreeve_ca.domain.profiles import CA_PATH, KEY_SERVER_PATH, AuthorityLives, SvidProfile
from keyreeve_ca.domain.records import SvidRecord
from keyreeve_ca.issuance_flow import Flow
from keyreeve_ca.ports import Entropy, KeyCluster, Store, UpstreamAuthority


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator decided, checked."""

    trust_domain: TrustDomain
    workload: SvidProfile
    agent: SvidProfile
    service: SvidProfile
    lives: AuthorityLives = field(default_factory=AuthorityLives)
    authority_key_type: KeyType = KeyType.EC_P256
    authority_backend: str = ""
    refresh_hint: timedelta = timedelta(minutes=5)
    blocked: frozenset[bytes] = frozenset()  # SHA-256 of SPKIs

    @property
    def ca_id(self) -> SpiffeId:
        return SpiffeId(self.trust_domain, CA_PATH)

    @property
    def key_server_id(self) -> SpiffeId:
        return SpiffeId(self.trust_domain, KEY_SERVER_PATH)


@dataclass
class Locks:
    """One lock per name, so that one node's sync does not wait for another's. A lock is there while somebody holds it or waits."""

    _locks: dict[str, _Counted] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self._locks)

    @contextmanager
    def __call__(self, *names: object) -> Iterator[None]:
        """Holds the locks of all these names, taken in one order by everybody, so that no two wait for each other."""
        with ExitStack() as stack:
            for name in sorted({str(name) for name in names}):
                stack.enter_context(self._one(name))
            yield

    @contextmanager
    def _one(self, name: str) -> Iterator[None]:
        with self._guard:
            counted = self._locks.setdefault(name, _Counted())
            counted.users += 1
        try:
            with counted.lock:
                yield
        finally:
            with self._guard:
                counted.users -= 1
                if not counted.users:
                    del self._locks[name]


@dataclass(slots=True)
class _Counted:
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0


@dataclass(frozen=True, slots=True)
class SvidOrder:
    """An SVID that is wanted. `subject` groups the SVIDs that follow one another."""

    profile: SvidProfile
    spiffe_id: SpiffeId
    public_key: CertificatePublicKeyTypes
    subject: str
    dns_names: tuple[str, ...] = ()
    ttl: timedelta | None = None
    entry_id: str = ""
    key_id: str = ""
    wanted: str = ""


Outcome: TypeAlias = SvidRecord | KeyreeveError
"""What became of an order: its record with the chain, or why there is no SVID."""


@dataclass(frozen=True)
class Ca:
    """The CA's parts. `lint_key` gives a throw-away key of a type, for the lint of authorities."""

    policy: Policy
    store: Store
    cluster: KeyCluster
    clock: Callable[[], datetime]
    entropy: Entropy
    lint_key: Callable[[KeyType], Any]
    upstream: UpstreamAuthority | None = None
    locks: Locks = field(default_factory=Locks)
    flow: Flow[SvidOrder, Outcome] = field(default_factory=Flow)
    failures: dict[str, ErrorCode] = field(default_factory=dict)  # by entry: what was logged last

    def check_own(self, spiffe_id: SpiffeId) -> None:
        """Raises: InvalidRequest for another trust domain's ID."""
        if not spiffe_id.member_of(self.policy.trust_domain):
            raise InvalidRequest(f"SPIFFE ID is not in trust domain {self.policy.trust_domain}")


def _private_key(ca: Ca, authority: Authority) -> Any:
    spki_der = authority.certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return ca.cluster.private_key(authority.key_id, spki_der)


def current_bundle(ca: Ca) -> Bundle:
    """The trust domain's bundle: its roots that have not expired."""
    now = ca.clock()
    roots = [each.certificate for each in ca.store.list_authorities() if each.root and not each.is_expired(now)]
    return Bundle(ca.policy.trust_domain, tuple(roots), ca.store.bundle_sequence(), ca.policy.refresh_hint)


def list_svids(
    ca: Ca, *, spiffe_id: str = "", serial: str = "", current_only: bool = False, limit: int = 100, after: str = ""
) -> list[SvidRecord]:
    """Newest first. Raises: InvalidRequest."""
    wanted = SpiffeId.parse(spiffe_id) if spiffe_id else None
    found = ca.store.list_svids(
        spiffe_id=wanted, serial=serial.lower(), current_only=current_only, limit=limit, after=after
    )
    return [replace(each, current=each.current and each.not_after > ca.clock()) for each in found]


def sign_as(ca: Ca, authority: Authority, builder: x509.CertificateBuilder) -> x509.Certificate:
    """The certificate that `builder` says, signed by an authority's key in the cluster."""
    return sign_builder(builder, _private_key(ca, authority))
