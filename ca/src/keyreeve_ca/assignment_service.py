"""What one agent may serve: for each of its entries a key, an SVID and a grant, made and renewed here.

Each entry stands for itself: what fails for one is reported with it and the others go on. Everything here can be repeated: keys by request
id, grants by what the key cluster says of them (`domain.grants`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TypeAlias, cast

from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import load_der_public_key
from keyreeve_client.key_admin import Grant, KeySpec, KeyState
from keyreeve_common.errors import (
    FailedPrecondition,
    Internal,
    KeyDisabled,
    KeyreeveError,
    NotFound,
    PermissionDenied,
    RateLimited,
    Unavailable,
)
from keyreeve_common.identity import SpiffeId
from keyreeve_common.purposes import KeyRole
from keyreeve_common.telemetry import log, log_warning

from keyreeve_ca.domain.entries import Entry, check_shared_key
from keyreeve_ca.domain.grants import (
    EXPIRY_MARGIN,
    GrantAction,
    GrantState,
    NodeGrant,
    decide,
)
from keyreeve_ca.domain.records import KeyUse, ManagedKey, SvidRecord, digest_of, renewal_time
from keyreeve_ca.domain.views import AgentView, OwnersView, SvidWish
from keyreeve_ca.issuance_service import issue_x509_svids
from keyreeve_ca.service import Ca, SvidOrder

_ALL = 1_000_000
_Seen = dict[str, Grant]
Certified: TypeAlias = tuple[ManagedKey, SvidRecord] | KeyreeveError
"""An owner's key with its current SVID, or why there is none."""
# What may be over at the next round: meanwhile an SVID that is valid stays assigned. A refusal takes it away at once.
_PASSING = (Unavailable, RateLimited, Internal)


@dataclass(frozen=True, slots=True)
class Assignment:
    """One entry with what the agent needs to serve it, or why it cannot be served."""

    entry: Entry
    key: ManagedKey | None = None
    svid: SvidRecord | None = None
    former_key_ids: tuple[str, ...] = ()
    error: KeyreeveError | None = None

    @property
    def is_ready(self) -> bool:
        return self.error is None


def sync_agent(ca: Ca, agent: SpiffeId) -> list[Assignment]:
    """All assignments of this agent, after doing what is missing. Raises: storage errors only.

    Where nothing is missing it reads the agent's view, asks the key cluster for the agent's grants, and that is all.
    """
    with ca.locks(agent):
        view = ca.store.read_agent_view(agent, ca.clock())
        if not view.entries:
            return []
        seen = _grants_of(ca, agent)
        if isinstance(seen, KeyreeveError):
            return [_without(ca, entry, seen, _still_good(ca, entry, view)) for entry in view.entries]
        certified = _certify(ca, view)
        return [_assign(ca, entry, view, certified[entry.entry_id], seen) for entry in view.entries]


def _grants_of(ca: Ca, agent: SpiffeId) -> _Seen | KeyreeveError:
    try:
        return {grant.key_id: grant for grant in ca.cluster.list_grants(holder=agent)}
    except KeyreeveError as error:
        return error


def _certify(ca: Ca, view: AgentView) -> dict[str, Certified]:
    """By entry id. Locks are taken, and owners read anew, for those alone whose SVID or key is missing or due."""
    found = {entry.entry_id: _settled(ca, entry, view.owners) for entry in view.entries}
    due = [entry for entry in view.entries if found[entry.entry_id] is None]
    made = ensure_svids(ca, due) if due else {}
    return {entry_id: each or made[entry_id] for entry_id, each in found.items()}


def _settled(ca: Ca, entry: Entry, owners: OwnersView) -> tuple[ManagedKey, SvidRecord] | None:
    key = owners.keys.get(entry.owner.digest)
    if key is None or key.use is not KeyUse.IN_USE or key.fingerprint != _fingerprint(entry):
        return None
    current = _current(ca, entry, key, owners)
    return None if current is None else (key, current)


def _assign(ca: Ca, entry: Entry, view: AgentView, certified: Certified, seen: _Seen) -> Assignment:
    try:
        if isinstance(certified, KeyreeveError):
            raise certified
        key, svid = certified
        _ensure_grant(ca, entry, key, svid, known=view.grants.get(entry.owner.digest), seen=seen)
    except KeyreeveError as error:
        passing = isinstance(error, _PASSING)
        return _without(ca, entry, error, _still_good(ca, entry, _anew(ca, entry)) if passing else None)
    ca.failures.pop(entry.entry_id, None)
    return Assignment(entry, key, svid, view.owners.former_key_ids.get(entry.owner.digest, ()))


def _without(ca: Ca, entry: Entry, error: KeyreeveError, kept: Assignment | None) -> Assignment:
    """What is kept where something failed; else the error, which is logged where it is not the one of the last time."""
    if kept is not None and isinstance(error, _PASSING):
        return kept
    if ca.failures.get(entry.entry_id) is not error.code:
        log_warning("assignment_failed", entry_id=entry.entry_id, code=error.code.value, detail=error.detail)
        ca.failures[entry.entry_id] = error.code
    return Assignment(entry, error=error)


def _anew(ca: Ca, entry: Entry) -> AgentView:
    """What the store says of one entry now: its key may have been replaced before the error."""
    grant = ca.store.get_node_grant(entry.owner, entry.parent_id)
    grants = {entry.owner.digest: grant} if grant is not None else {}
    return AgentView((entry,), grants, ca.store.read_owners_view([entry.owner], ca.clock()))


def _still_good(ca: Ca, entry: Entry, view: AgentView) -> Assignment | None:
    """While the key cluster is away or fails: what was assigned before and has not expired."""
    now, digest = ca.clock(), entry.owner.digest
    key, svid, grant = view.owners.keys.get(digest), view.owners.svids.get(digest), view.grants.get(digest)
    if (
        key is None
        or key.use is not KeyUse.IN_USE
        or svid is None
        or svid.not_after <= now
        or svid.key_id != key.key_id
    ):
        return None
    if (
        grant is None
        or grant.state is not GrantState.LIVE
        or (grant.expires_at is not None and grant.expires_at <= now)
    ):
        return None
    return Assignment(entry, key, svid, view.owners.former_key_ids.get(digest, ()))


def ensure_svid(ca: Ca, entry: Entry, *, renew: bool = False) -> tuple[ManagedKey, SvidRecord]:
    """The key of the entry's owner and its current SVID, issued anew at half life, when the order changed, or when `renew`."""
    certified = ensure_svids(ca, [entry], renew=renew)[entry.entry_id]
    if isinstance(certified, KeyreeveError):
        raise certified
    return certified


def ensure_svids(ca: Ca, entries: Sequence[Entry], *, renew: bool = False) -> dict[str, Certified]:
    """The same for many entries, by entry id: what is to be issued leaves as one batch. Raises: storage errors."""
    with ca.locks(*(entry.owner.digest for entry in entries)):
        owners = ca.store.read_owners_view([entry.owner for entry in entries], ca.clock())
        keys = _ensure_keys(ca, entries, owners)
        found: dict[str, Certified] = {}
        orders: dict[str, SvidOrder] = {}  # by owner digest: entries that share a key share the SVID
        for entry in entries:
            digest, key = entry.owner.digest, keys[entry.entry_id]
            if isinstance(key, KeyreeveError):
                found[entry.entry_id] = key
            elif not renew and (current := _current(ca, entry, key, owners)) is not None:
                found[entry.entry_id] = (key, current)
            else:
                orders[digest] = _order(ca, entry, key, owners.wishes.get(digest, SvidWish()))
        issued = dict(zip(orders, issue_x509_svids(ca, list(orders.values())), strict=True)) if orders else {}
        for entry in entries:
            if entry.entry_id not in found:
                key, outcome = keys[entry.entry_id], issued[entry.owner.digest]
                assert not isinstance(key, KeyreeveError)  # noqa: S101 - those are in `found`
                found[entry.entry_id] = outcome if isinstance(outcome, KeyreeveError) else (key, outcome)
        return found


def _ensure_keys(ca: Ca, entries: Sequence[Entry], owners: OwnersView) -> dict[str, ManagedKey | KeyreeveError]:
    """By entry id."""
    known = dict(owners.keys)
    found: dict[str, ManagedKey | KeyreeveError] = {}
    for entry in entries:
        digest = entry.owner.digest
        try:
            found[entry.entry_id] = known[digest] = _ensure_key(ca, entry, known.get(digest))
        except KeyreeveError as error:
            found[entry.entry_id] = error
    return found


def _life_and_digest(ca: Ca, key: ManagedKey, wish: SvidWish) -> tuple[timedelta, str]:
    """How long the certificate is to live, and the digest of all that is wanted of it."""
    ttl = wish.life(ca.policy.workload.ttl)
    return ttl, digest_of(key.key_id, ttl, *wish.dns_names)


def _order(ca: Ca, entry: Entry, key: ManagedKey, wish: SvidWish) -> SvidOrder:
    ttl, wanted = _life_and_digest(ca, key, wish)
    return SvidOrder(
        profile=ca.policy.workload,
        spiffe_id=entry.spiffe_id,
        public_key=cast("CertificatePublicKeyTypes", load_der_public_key(key.spki_der)),
        subject=entry.owner.digest,
        dns_names=wish.dns_names,
        ttl=ttl,
        entry_id=entry.entry_id,
        key_id=key.key_id,
        wanted=wanted,
    )


def _current(ca: Ca, entry: Entry, key: ManagedKey, owners: OwnersView) -> SvidRecord | None:
    """The current SVID, if it is what would be ordered, valid, and not yet to be renewed."""
    current, now = owners.svids.get(entry.owner.digest), ca.clock()
    if current is None or current.key_id != key.key_id or not current.not_before <= now < current.not_after:
        return None
    _, wanted = _life_and_digest(ca, key, owners.wishes.get(entry.owner.digest, SvidWish()))
    return current if current.wanted == wanted and now < renew_at(current) else None


def renew_at(record: SvidRecord) -> datetime:
    return renewal_time(record.serial, record.created_at, record.not_after)


def _fingerprint(entry: Entry) -> str:
    return digest_of(entry.key_type, entry.key_backend, *sorted(entry.purposes))


def _ensure_key(ca: Ca, entry: Entry, known: ManagedKey | None) -> ManagedKey:
    owner, fingerprint = entry.owner, _fingerprint(entry)
    if known is not None and known.fingerprint == fingerprint:
        if known.use is KeyUse.IN_USE:
            return known
        state = ca.cluster.get_key(known.key_id).state
        if state is KeyState.DISABLED and known.use in (KeyUse.RETIRING, KeyUse.RETIRED):
            ca.cluster.enable_key(known.key_id)
            state = KeyState.ENABLED
        if state is KeyState.DISABLED:
            raise KeyDisabled("an operator disabled this identity's key; `keyreeve key enable` brings it back")
        if state is KeyState.ENABLED:
            known = replace(known, use=KeyUse.IN_USE)
            ca.store.save_managed_key(known)
            return known
    # A new generation: never because two entries, created at the same moment, disagree about the key that they share.
    check_shared_key(entry, ca.store.list_entries(spiffe_id=owner.spiffe_id, limit=_ALL))
    in_use = known is not None and known.use in (KeyUse.IN_USE, KeyUse.RETIRING)
    if known is not None and in_use and ca.cluster.get_key(known.key_id).state is KeyState.ENABLED:
        ca.cluster.disable_key(known.key_id)  # its grants die with it, whatever becomes of their rows
    generation = known.generation + 1 if known is not None else 1
    key = ca.cluster.create_key(
        KeySpec(
            request_id=owner.request_id(generation),
            key_type=entry.key_type,
            role=KeyRole.HANDSHAKE,
            purposes=entry.purposes,
            label=str(entry.spiffe_id)[:256],
            backend=entry.key_backend,
        )
    )
    managed = ManagedKey(owner, generation, key.key_id, key.spki_der, fingerprint)
    ca.store.save_managed_key(managed)
    log("key_created", key_id=key.key_id, spiffe_id=str(entry.spiffe_id))
    return managed


def _ensure_grant(
    ca: Ca, entry: Entry, key: ManagedKey, svid: SvidRecord, *, known: NodeGrant | None, seen: _Seen
) -> None:
    """`known`: the row as the view has it; it is read anew before anything is done. Raises: PermissionDenied when an operator revoked it."""
    now, agent = ca.clock(), entry.parent_id
    until = svid.not_after + EXPIRY_MARGIN
    if entry.expires_at is not None:
        until = min(until, entry.expires_at)
    row = NodeGrant(entry.owner, agent, key.key_id, GrantState.LIVE, until)
    seen_grant = seen.get(key.key_id)
    settled = replace(row, expires_at=seen_grant.expires_at) if seen_grant is not None else None
    if known is not None and known == settled and decide(known, seen_grant, until, now) is GrantAction.NONE:
        return
    known = ca.store.get_node_grant(entry.owner, agent)
    match decide(known, seen_grant, until, now):
        case GrantAction.NONE:
            _claim(ca, known, replace(row, expires_at=seen_grant.expires_at if seen_grant else None))
        case GrantAction.CREATE:
            # The CA's own revocation stays on record until the new grant is there: else it would look like an operator's.
            withdrawn_at = known.revoked_at if known is not None else None
            _claim(ca, known, replace(row, state=GrantState.INTENDED, revoked_at=withdrawn_at))
            seen[key.key_id] = ca.cluster.create_grant(key.key_id, agent, purposes=entry.purposes, expires_at=until)
            # Where the entry went meanwhile the row says withdrawing, and stays so: the grant is revoked next. Where another CA instance was
            # done with the withdrawal before there was a grant, it has to look again.
            if not ca.store.save_node_grant(row, expected=GrantState.INTENDED):
                ca.store.save_node_grant(replace(row, state=GrantState.WITHDRAWING), expected=GrantState.WITHDRAWN)
            log("grant_created", key_id=key.key_id, holder=str(agent))
        case GrantAction.EXTEND:
            _claim(ca, known, row)
            seen[key.key_id] = _extend(ca, row, until)
        case GrantAction.RESPECT:
            _respect(ca, known, row)


def _extend(ca: Ca, row: NodeGrant, until: datetime) -> Grant:
    try:
        return ca.cluster.extend_grant(row.key_id, row.agent, expires_at=until)
    except (FailedPrecondition, NotFound) as error:
        latest = [grant for grant in ca.cluster.list_grants(key_id=row.key_id, holder=row.agent) if grant.is_revoked]
        if latest:
            _respect(ca, None, row)
        raise Unavailable("grant expired while it was being extended", retry_after=timedelta(seconds=1)) from error


def _respect(ca: Ca, known: NodeGrant | None, row: NodeGrant) -> None:
    _claim(ca, known, replace(row, state=GrantState.REVOKED, expires_at=None))
    if known is None or known.state is not GrantState.REVOKED:
        log_warning("grant_revoked_by_operator", key_id=row.key_id, holder=str(row.agent))
    raise PermissionDenied("an operator revoked this node's grant; only an operator's CreateGrant brings it back")


def _claim(ca: Ca, known: NodeGrant | None, row: NodeGrant) -> None:
    """Raises: NotFound when the entry was deleted or the agent barred since they were read."""
    if known != row and not ca.store.claim_node_grant(row):
        raise NotFound("entry is gone, or its agent may not act any more")


def renew_entry_svid(ca: Ca, entry_id: str) -> SvidRecord:
    """Renews the SVID of an entry now. It touches no grant. Raises: NotFound, Unavailable."""
    _, record = ensure_svid(ca, ca.store.get_entry(entry_id), renew=True)
    return record
