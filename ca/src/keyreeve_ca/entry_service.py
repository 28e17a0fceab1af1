"""Use cases on registration entries. What follows from a change (keys, SVIDs, grants) is `assignment_service`'s."""

from __future__ import annotations

from dataclasses import replace

from keyreeve_common.errors import InvalidRequest
from keyreeve_common.identity import SpiffeId
from keyreeve_common.telemetry import log

from keyreeve_ca.domain.entries import Entry, check_shared_key, check_update
from keyreeve_ca.service import Ca

_ALL = 1_000_000


def create_entry(ca: Ca, entry: Entry) -> Entry:
    """Raises: InvalidRequest; Conflict for a duplicate; FailedPrecondition when it disagrees about a key that it shares."""
    _check(ca, entry)
    ca.store.create_entry(entry)
    log("entry_created", entry_id=entry.entry_id, spiffe_id=str(entry.spiffe_id), parent_id=str(entry.parent_id))
    return entry


def get_entry(ca: Ca, entry_id: str) -> Entry:
    """Raises: NotFound."""
    return ca.store.get_entry(entry_id)


def list_entries(ca: Ca, *, spiffe_id: str, parent_id: str, limit: int, after: str) -> list[Entry]:
    return ca.store.list_entries(
        spiffe_id=SpiffeId.parse(spiffe_id) if spiffe_id else None,
        parent_id=SpiffeId.parse(parent_id) if parent_id else None,
        limit=limit,
        after=after,
    )


def update_entry(ca: Ca, entry: Entry, *, read_revision: int) -> Entry:
    """Raises: NotFound; Conflict for a stale revision; InvalidRequest for what an update cannot change."""
    stored = ca.store.get_entry(entry.entry_id)
    fresh = replace(entry, created_at=stored.created_at)
    check_update(stored, fresh)
    _check(ca, fresh)
    saved = ca.store.update_entry(fresh, read_revision=read_revision)
    log("entry_updated", entry_id=saved.entry_id, revision=saved.revision)
    return saved


def delete_entry(ca: Ca, entry_id: str) -> Entry:
    """The grant that hung on it alone is marked to be revoked in the same transaction. Raises: NotFound."""
    entry = ca.store.delete_entry(entry_id)
    log("entry_deleted", entry_id=entry_id, spiffe_id=str(entry.spiffe_id))
    return entry


def prune_expired_entries(ca: Ca) -> int:
    """Deletes entries whose time is over; how many."""
    expired = ca.store.expired_entries(ca.clock())
    for entry in expired:
        delete_entry(ca, entry.entry_id)
    return len(expired)


def _check(ca: Ca, entry: Entry) -> None:
    ca.check_own(entry.spiffe_id)
    now = ca.clock()
    if entry.x509_svid_ttl is not None and entry.x509_svid_ttl > ca.policy.workload.max_ttl:
        longest = int(ca.policy.workload.max_ttl.total_seconds())
        raise InvalidRequest(f"x509_svid_ttl is longer than this CA's maximum of {longest} s")
    if entry.is_expired(now):
        raise InvalidRequest("expires_at lies in the past")
    check_shared_key(entry, ca.store.list_entries(spiffe_id=entry.spiffe_id, limit=_ALL))
