"""Rotation of entries' keys: a new generation and an SVID for it at once, the old key until the last certificate for it has ended.

Every step can be repeated. The key cluster makes one successor for each request id and copies the grants; the store remembers the former key
before anything else happens to it, so that whatever takes an identity away takes the former key away too. What is revoked while a rotation is
under way, or cut off, is revoked for the new key as well.
"""

from __future__ import annotations

from keyreeve_common.errors import Conflict, FailedPrecondition, KeyreeveError, NotFound
from keyreeve_common.telemetry import log

from keyreeve_ca.assignment_service import ensure_svid
from keyreeve_ca.domain.grants import EXPIRY_MARGIN
from keyreeve_ca.domain.records import FormerKey, KeyUse, ManagedKey, SvidRecord
from keyreeve_ca.service import Ca
from keyreeve_ca.withdrawal_service import carry_revocations


def rotate_entry_key(ca: Ca, entry_id: str) -> SvidRecord:
    """The SVID over the new key. Raises: NotFound, FailedPrecondition, Conflict, Unavailable."""
    entry = ca.store.get_entry(entry_id)
    owner = entry.owner
    with ca.locks(owner.digest):
        known = ca.store.get_managed_key(owner)
        if known is None or known.use is not KeyUse.IN_USE:
            raise FailedPrecondition(
                "the entry has no key in use: its agent has not been served yet, or its key is disabled"
            )
        generation = known.generation + 1
        key = ca.cluster.rotate_key(known.key_id, request_id=f"{owner.request_id(generation)}-rotation")
        carry_revocations(ca, owner, known.key_id, key.key_id)  # the key may be older than this call
        fresh = ManagedKey(owner, generation, key.key_id, key.spki_der, known.fingerprint)
        if not ca.store.replace_managed_key(fresh, former=known):
            raise Conflict("another CA instance rotated this key meanwhile")
        carry_revocations(ca, owner, known.key_id, key.key_id)  # withdrawals under way, which knew of one key only
        log("key_rotated", key_id=known.key_id, successor=key.key_id, spiffe_id=str(entry.spiffe_id))
    _, record = ensure_svid(ca, entry)
    retire_former_keys(ca)
    return record


def retire_former_keys(ca: Ca) -> None:
    """Tells the key cluster until when former keys are needed, again where that changed; forgets those whose time is over.

    Raises: storage errors, and the first error of the key cluster after all were tried.
    """
    failure: KeyreeveError | None = None
    for former in ca.store.former_keys():
        try:
            _retire(ca, former)
        except KeyreeveError as error:
            failure = failure or error
    if failure is not None:
        raise failure


def _retire(ca: Ca, former: FormerKey) -> None:
    now, current = ca.clock(), ca.store.current_svid(former.owner_digest)
    if current is not None and current.key_id == former.key_id and current.not_after > now:
        return  # the SVID over the new key is not there yet
    until = (ca.store.last_not_after(former.key_id) or now) + EXPIRY_MARGIN
    if former.retire_at is None or until > former.retire_at:
        try:
            ca.cluster.retire_key(former.key_id, at=until)
            log("key_retirement_set", key_id=former.key_id, retire_at=until.isoformat())
        except (FailedPrecondition, NotFound):
            pass  # it is disabled or gone already
        ca.store.save_retirement(former.key_id, until)
    elif now > former.retire_at + EXPIRY_MARGIN:
        ca.store.forget_former_key(former.key_id)
