"""Issuing: the one story by which every certificate of this CA comes to be. What is common to all use cases is in `Ca`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keyreeve_common.bundle import Bundle
from keyreeve_common.errors import ErrorCode, InvalidRequest, KeyreeveError
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.schemes import KeyType, key_type_of
from keyreeve_common.telemetry import log, log_error

from keyreeve_ca.domain.authority import Authority, active_authority
from keyreeve_ca.domain.issuance import (
    SERIAL_BYTES,
    LeafOrder,
    build_leaf,
    chain_without_root,
    check_issued,
    make_serial,
    sign_builder,
    validity,
)
from keyreeve_ca.domain.profiles import CA_PATH, KEY_SERVER_PATH, AuthorityLives, SvidProfile
from keyreeve_ca.domain.records import SvidRecord, SvidState
from keyreeve_ca.domain.svid_lint import LintContext, check_svid, spki_hash
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
    """One lock per name, so that one node's sync does not wait for another's. Locks are few: one per node and identity."""

    _locks: dict[str, threading.Lock] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def __call__(self, name: object) -> Iterator[None]:
        with self._guard:
            lock = self._locks.setdefault(str(name), threading.Lock())
        with lock:
            yield


@dataclass(frozen=True)
class Ca:
    """The CA's parts. `lint_key` gives a throw-away key of a type."""

    policy: Policy
    store: Store
    cluster: KeyCluster
    clock: Callable[[], datetime]
    entropy: Entropy
    lint_key: Callable[[KeyType], Any]
    upstream: UpstreamAuthority | None = None
    locks: Locks = field(default_factory=Locks)
    failures: dict[str, ErrorCode] = field(default_factory=dict)  # by entry: what was logged last

    def check_own(self, spiffe_id: SpiffeId) -> None:
        """Raises: InvalidRequest for another trust domain's ID."""
        if not spiffe_id.member_of(self.policy.trust_domain):
            raise InvalidRequest(f"SPIFFE ID is not in trust domain {self.policy.trust_domain}")


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


def issue_x509_svid(ca: Ca, order: SvidOrder) -> SvidRecord:
    """Issues one SVID, or leaves a record of why not.

    Raises: InvalidRequest, ProfileViolation, FailedPrecondition, Unavailable, Internal. Spec: spiffe.md 9.4; boulder.
    """
    # 1. Authorise: the ID is of this trust domain and of the profile's kind.
    ca.check_own(order.spiffe_id)
    order.profile.check_id(order.spiffe_id)
    now = ca.clock()
    authorities = ca.store.list_authorities()
    issuer = active_authority(authorities)
    # 2. Allocate a serial, 3. build.
    serial = make_serial(ca.entropy(SERIAL_BYTES))
    life = order.profile.life(order.ttl)
    start, end = validity(now, life, backdate=order.profile.backdate, issuer=issuer.certificate)
    leaf = LeafOrder(
        order.spiffe_id, order.public_key, serial, start, end, order.dns_names, order.profile.is_infrastructure
    )
    builder = build_leaf(leaf, issuer.certificate)
    # 4. Lint a certificate of the very same TBS, signed by a throw-away key.
    issuer_key: Any = issuer.certificate.public_key()
    linted = sign_builder(builder, ca.lint_key(key_type_of(issuer_key)))
    check_svid(linted, _lint_context(ca, order, issuer, authorities, now=now))
    # 5. Record the intent: from here on the serial is taken.
    record = SvidRecord(
        serial=f"{serial:x}",
        spiffe_id=order.spiffe_id,
        subject=order.subject,
        authority_id=issuer.authority_id,
        state=SvidState.INTENDED,
        not_before=start,
        not_after=end,
        created_at=now,
        entry_id=order.entry_id,
        key_id=order.key_id,
        wanted=order.wanted,
    )
    ca.store.record_intent(record)
    try:
        # 6. Sign, 7. verify against the TBS and the authority.
        issued = sign_builder(builder, _private_key(ca, issuer))
        check_issued(issued, linted, issuer.certificate)
    except KeyreeveError as error:
        _record_failure(ca, record, error)
        raise
    # 8. Record the result; an SVID that is not on record is not given out.
    chain = chain_without_root(issued, [issuer.certificate])
    done = ca.store.record_issued(record.serial, [each.public_bytes(Encoding.DER) for each in chain])
    log("svid_issued", spiffe_id=str(order.spiffe_id), serial=record.serial, not_after=end.isoformat())
    return done


def _private_key(ca: Ca, authority: Authority) -> Any:
    spki_der = authority.certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return ca.cluster.private_key(authority.key_id, spki_der)


def _lint_context(
    ca: Ca, order: SvidOrder, issuer: Authority, authorities: list[Authority], *, now: datetime
) -> LintContext:
    authority_keys = frozenset(spki_hash(each.certificate.public_key()) for each in authorities)
    return LintContext(
        trust_domain=ca.policy.trust_domain,
        issuer=issuer.certificate,
        now=now,
        max_life=order.profile.max_ttl,
        max_backdate=ca.policy.lives.max_backdate,
        infrastructure=order.profile.is_infrastructure,
        blocked=ca.policy.blocked | authority_keys,
    )


def _record_failure(ca: Ca, record: SvidRecord, error: KeyreeveError) -> None:
    try:
        ca.store.record_failed(record.serial, str(error))
    except KeyreeveError as second:
        log_error("svid_failure_not_recorded", serial=record.serial, detail=second.detail)


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
