"""What one agent's sync reads: always the same few statements, whatever the number of its entries."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from keyreeve_common.identity import SpiffeId
from sqlalchemy import ColumnElement, Connection, Float, Text, and_, cast, func, or_, select, type_coerce

from keyreeve_ca.domain.entries import KeyOwner
from keyreeve_ca.domain.grants import GrantState
from keyreeve_ca.domain.records import renewal_time
from keyreeve_ca.domain.views import AgentView, OwnersView, SvidWish
from keyreeve_ca.store import schema
from keyreeve_ca.store.engine import read_transaction
from keyreeve_ca.store.rows import Part, entry_from_row, grant_from_row, hash_of, key_from_row, svid_from_row

_A = schema.agents.c
_E = schema.entries.c
_G = schema.node_grants.c
_K = schema.managed_keys.c
_F = schema.former_keys.c
_S = schema.svids.c
EARLIEST_RENEWAL = 0.45  # of a life: `renewal_time` is never before
_UNSETTLED = [GrantState.INTENDED.value, GrantState.WITHDRAWING.value, GrantState.WITHDRAWN.value]


class AgentViews(Part):
    def read_agent_view(self, agent: SpiffeId, now: datetime) -> AgentView:
        of_agent = _E.parent_id == str(agent)
        owners = select(_E.owner).where(of_agent)
        query = select(schema.entries).where(of_agent, _not_expired(now)).order_by(_E.entry_id)
        with read_transaction(self.engine) as connection:
            entries = tuple(entry_from_row(row) for row in connection.execute(query).mappings())
            if not entries:
                return AgentView((), {}, OwnersView())
            by_owner = {entry.owner.digest: entry.owner for entry in entries}
            rows = connection.execute(select(schema.node_grants).where(_G.agent_hash == hash_of(agent))).mappings()
            grants = {
                row["owner"]: grant_from_row(row, by_owner[row["owner"]]) for row in rows if row["owner"] in by_owner
            }
            return AgentView(entries, grants, _owners_view(connection, owners, now))

    def read_owners_view(self, owners: Sequence[KeyOwner], now: datetime) -> OwnersView:
        with read_transaction(self.engine) as connection:
            return _owners_view(connection, [owner.digest for owner in owners], now)

    def agents_due(self, now: datetime) -> list[SpiffeId]:
        """Agents that may act and have an entry without a current SVID, with one that is to be renewed, or without a settled grant."""
        created, until = type_coerce(_S.created_at, Float), type_coerce(_S.not_after, Float)
        old = created + (until - created) * EARLIEST_RENEWAL <= now.timestamp()
        missing = or_(_S.serial.is_(None), _G.owner.is_(None), _G.state.in_(_UNSETTLED))
        joined = (
            schema.entries.join(schema.agents, _A.spiffe_id == _E.parent_id)
            .outerjoin(schema.svids, and_(_S.subject == _E.owner, _S.current.is_(True)))
            .outerjoin(schema.node_grants, and_(_G.owner == _E.owner, _G.agent == _E.parent_id))
        )
        query = select(_E.parent_id, _S.serial, _S.created_at, _S.not_after, missing.label("missing"))
        query = query.select_from(joined).where(~_A.banned, ~_A.evicted, _not_expired(now), or_(missing, old))
        with read_transaction(self.engine) as connection:
            rows = connection.execute(query).all()
        due = {
            row.parent_id
            for row in rows
            if row.missing or renewal_time(row.serial, row.created_at, row.not_after) <= now
        }
        return [SpiffeId.parse(text) for text in sorted(due)]


def _not_expired(now: datetime) -> ColumnElement[bool]:
    return or_(_E.expires_at.is_(None), _E.expires_at > now)


def _owners_view(connection: Connection, owners: Any, now: datetime) -> OwnersView:
    """`owners`: digests, or a query of them."""
    keys = connection.execute(select(schema.managed_keys).where(_K.owner.in_(owners))).mappings()
    current = select(schema.svids).where(_S.subject.in_(owners), _S.current.is_(True))
    svids = connection.execute(current).mappings()
    formers: dict[str, list[str]] = defaultdict(list)
    older = select(_F.owner, _F.key_id).where(_F.owner.in_(owners)).order_by(_F.owner, _F.generation)
    for row in connection.execute(older):
        formers[row.owner].append(row.key_id)
    return OwnersView(
        keys={row["owner"]: key_from_row(row) for row in keys},
        svids={row["subject"]: svid_from_row(row) for row in svids},
        wishes=_wishes(connection, owners, now),
        former_key_ids={owner: tuple(key_ids) for owner, key_ids in formers.items()},
    )


def _wishes(connection: Connection, owners: Any, now: datetime) -> dict[str, SvidWish]:
    """One row for each list of DNS names, not one for each entry: an identity may have an entry on every node."""
    names = cast(_E.dns_names, Text)
    query = (
        select(_E.owner, names.label("names"), func.min(_E.x509_svid_ttl).label("ttl"))
        .add_columns((func.count() - func.count(_E.x509_svid_ttl)).label("undecided"))
        .where(_E.owner.in_(owners), _not_expired(now))
        .group_by(_E.owner, names)
    )
    found: dict[str, SvidWish] = {}
    for row in connection.execute(query):
        ttl = timedelta(seconds=row.ttl) if row.ttl else None
        wish = SvidWish(tuple(sorted(json.loads(row.names))), ttl, bool(row.undecided))
        found[row.owner] = found[row.owner].joined(wish) if row.owner in found else wish
    return found
