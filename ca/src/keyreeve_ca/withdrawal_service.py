"""Taking away: grants that no entry or agent stands behind any more are revoked, keys that no entry needs are disabled."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from keyreeve_client.key_admin import KeyState
from keyreeve_common.errors import FailedPrecondition, KeyreeveError, NotFound
from keyreeve_common.identity import SpiffeId
from keyreeve_common.telemetry import log

from keyreeve_ca.domain.entries import KeyOwner
from keyreeve_ca.domain.grants import GrantState, NodeGrant, decide_withdrawal
from keyreeve_ca.domain.records import KeyUse, ManagedKey
from keyreeve_ca.service import Ca

_ALL = 1_000_000


def withdraw_grants(ca: Ca) -> None:
    """Revokes what is marked so, and disables keys that no entry needs. What fails is tried again at the next call.

    Raises: storage errors, and the first error of the key cluster after all were tried.
    """
    failure: KeyreeveError | None = None
    for grant in ca.store.withdrawing_grants():
        try:
            with ca.locks(grant.agent):
                _withdraw(ca, grant)
        except KeyreeveError as error:
            failure = failure or error
    for key in ca.store.list_managed_keys(unused=True):
        try:
            with ca.locks(key.owner.digest):
                _retire(ca, key)
        except KeyreeveError as error:
            failure = failure or error
    if failure is not None:
        raise failure


def _withdraw(ca: Ca, grant: NodeGrant) -> None:
    known = ca.store.get_node_grant(grant.owner, grant.agent)
    if known is None or known.state is not GrantState.WITHDRAWING:
        return
    for former in ca.store.former_keys(grant.owner):  # first: a crash behind it leaves the row as it is
        for live in ca.cluster.list_grants(key_id=former.key_id, holder=grant.agent):
            if not live.is_revoked and former.key_id != grant.key_id:
                ca.cluster.revoke_grant(former.key_id, grant.agent)
    found = ca.cluster.list_grants(key_id=grant.key_id, holder=grant.agent)
    seen = found[0] if found else None
    state = decide_withdrawal(known, seen)
    if state is None:
        revoked = ca.cluster.revoke_grant(grant.key_id, grant.agent)
        known = replace(known, state=GrantState.WITHDRAWN, revoked_at=revoked.revoked_at)
        log("grant_withdrawn", key_id=grant.key_id, holder=str(grant.agent))
        ca.store.save_node_grant(_without_copy(ca, known))
    else:  # another CA instance may have been first: then it knows better
        ca.store.save_node_grant(_without_copy(ca, replace(known, state=state)), expected=GrantState.WITHDRAWING)


def _without_copy(ca: Ca, known: NodeGrant) -> NodeGrant:
    """Takes away what a rotation copied to the newest key too, where nothing was assigned since: the row names the key before.

    Called when the grant of that one is revoked: a rotation that comes later still finds it so (`carry_revocations`).
    """
    newest = ca.store.get_managed_key(known.owner)
    if newest is None or newest.key_id == known.key_id:
        return known
    for copy in ca.cluster.list_grants(key_id=newest.key_id, holder=known.agent):
        if not copy.is_revoked:
            revoked = ca.cluster.revoke_grant(newest.key_id, known.agent)
            log("grant_withdrawn", key_id=newest.key_id, holder=str(known.agent))
            known = replace(known, key_id=newest.key_id, revoked_at=revoked.revoked_at)
    return known


def carry_revocations(ca: Ca, owner: KeyOwner, former_key_id: str, key_id: str) -> None:
    """Revokes the copies of grants that were revoked after a rotation had copied them. A grant that was made anew since is no copy."""
    revoked = {grant.holder: grant for grant in ca.cluster.list_grants(key_id=former_key_id) if grant.is_revoked}
    for copy in ca.cluster.list_grants(key_id=key_id) if revoked else ():
        origin = revoked.get(copy.holder)
        if copy.is_revoked or origin is None or origin.created_at != copy.created_at:
            continue
        holder = SpiffeId.parse(copy.holder)
        taken = ca.cluster.revoke_grant(key_id, holder)
        log("grant_withdrawn", key_id=key_id, holder=copy.holder)
        known = ca.store.get_node_grant(owner, holder)
        if known is not None and known.state is GrantState.WITHDRAWN and known.revoked_at == origin.revoked_at:
            ours = replace(known, key_id=key_id, revoked_at=taken.revoked_at)  # else it would look like an operator's
            ca.store.save_node_grant(ours, expected=GrantState.WITHDRAWN)


def _retire(ca: Ca, key: ManagedKey) -> None:
    if _is_used(ca, key.owner):
        return
    for former in ca.store.former_keys(key.owner):
        with suppress(FailedPrecondition, NotFound):  # it is to be destroyed, or gone
            ca.cluster.disable_key(former.key_id)
    if key.use is KeyUse.IN_USE:
        stopped = ca.cluster.get_key(key.key_id).state is not KeyState.ENABLED
        intent = replace(key, use=KeyUse.STOPPED if stopped else KeyUse.RETIRING)
        if not ca.store.save_managed_key(intent, expected=KeyUse.IN_USE) or stopped:
            return
    ca.cluster.disable_key(key.key_id)
    ca.store.save_managed_key(replace(key, use=KeyUse.RETIRED))
    log("key_disabled", key_id=key.key_id, spiffe_id=str(key.owner.spiffe_id))


def _is_used(ca: Ca, owner: KeyOwner) -> bool:
    return any(each.owner == owner for each in ca.store.list_entries(spiffe_id=owner.spiffe_id, limit=_ALL))
