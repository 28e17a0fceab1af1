"""What the CA does about the grant of one key to one node, from what it did before and what the key cluster says now.

A grant that an operator revoked stays revoked: no re-sync, renewal or new entry brings it back, only an operator's own CreateGrant. A grant that
the CA itself withdrew (entry deleted, agent evicted) comes back with a new entry or a new attestation.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, StrEnum

from keyreeve_client.key_admin import Grant
from keyreeve_common.identity import SpiffeId

from keyreeve_ca.domain.entries import KeyOwner

EXPIRY_MARGIN = timedelta(minutes=5)


class GrantState(StrEnum):
    """What the CA last did or learned."""

    INTENDED = "intended"  # CreateGrant was about to be sent
    LIVE = "live"
    WITHDRAWING = "withdrawing"  # is to be revoked, perhaps not yet done
    WITHDRAWN = "withdrawn"  # revoked by the CA
    REVOKED = "revoked"  # revoked by an operator


@dataclass(frozen=True, slots=True)
class NodeGrant:
    """One row: `revoked_at` is what the key cluster answered when the CA withdrew it, kept until a grant is live again."""

    owner: KeyOwner
    agent: SpiffeId
    key_id: str
    state: GrantState
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


class GrantAction(Enum):
    NONE = "none"
    CREATE = "create"
    EXTEND = "extend"
    RESPECT = "respect"  # an operator revoked it


def decide(known: NodeGrant | None, seen: Grant | None, wanted_until: datetime, now: datetime) -> GrantAction:
    """What is to be done so that the node may use the key until `wanted_until`."""
    if seen is not None and not seen.is_revoked:
        if seen.expires_at is None or seen.expires_at >= wanted_until:
            return GrantAction.NONE
        return GrantAction.CREATE if seen.expires_at <= now else GrantAction.EXTEND
    if known is not None and known.state is GrantState.REVOKED:
        return GrantAction.RESPECT
    if seen is None:
        return GrantAction.CREATE
    ours = known is not None and known.revoked_at == seen.revoked_at
    return GrantAction.CREATE if ours else GrantAction.RESPECT


def decide_withdrawal(known: NodeGrant, seen: Grant | None) -> GrantState | None:
    """Before the CA revokes: the state to record instead when there is nothing to revoke or an operator was first."""
    if known.state is GrantState.REVOKED:
        return GrantState.REVOKED
    if seen is not None and seen.is_revoked:
        return GrantState.WITHDRAWN if seen.revoked_at == known.revoked_at else GrantState.REVOKED
    return None if seen is not None else GrantState.WITHDRAWN
