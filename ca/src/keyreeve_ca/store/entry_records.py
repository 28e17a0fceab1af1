"""Entries, managed keys and node grants: who may use which key."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from keyreeve_common.errors import Conflict, NotFound
from keyreeve_common.identity import SpiffeId
from sqlalchemy import Connection, delete, exists, func, select, update

from keyreeve_ca.domain.entries import Entry, KeyOwner
from keyreeve_ca.domain.grants import GrantState, NodeGrant
from keyreeve_ca.domain.records import FormerKey, KeyUse, ManagedKey, SvidState
from keyreeve_ca.store import schema
from keyreeve_ca.store.change_log import agents_sharing, announce
from keyreeve_ca.store.engine import read_transaction, write_transaction
from keyreeve_ca.store.rows import (
    Part,
    entry_from_row,
    entry_to_row,
    grant_from_row,
    grant_to_row,
    hash_of,
    key_from_row,
    key_to_row,
    owner_from_row,
)

_A = schema.agents.c
_E = schema.entries.c
_G = schema.node_grants.c
_K = schema.managed_keys.c
_F = schema.former_keys.c
_S = schema.svids.c


class EntryRecords(Part):
    def create_entry(self, entry: Entry) -> None:
        with write_transaction(self.engine) as connection:
            _check_no_twin(connection, entry)
            connection.execute(schema.entries.insert().values(**entry_to_row(entry)))
            _announce(connection, entry)

    def get_entry(self, entry_id: str) -> Entry:
        with read_transaction(self.engine) as connection:
            return _get(connection, entry_id)

    def list_entries(
        self,
        *,
        spiffe_id: SpiffeId | None = None,
        parent_id: SpiffeId | None = None,
        limit: int = 1000,
        after: str = "",
    ) -> list[Entry]:
        query = select(schema.entries).where(_E.entry_id > after).order_by(_E.entry_id).limit(limit)
        if spiffe_id is not None:
            query = query.where(_E.spiffe_id == str(spiffe_id))
        if parent_id is not None:
            query = query.where(_E.parent_id == str(parent_id))
        with read_transaction(self.engine) as connection:
            return [entry_from_row(row) for row in connection.execute(query).mappings()]

    def expired_entries(self, now: datetime) -> list[Entry]:
        query = select(schema.entries).where(_E.expires_at <= now).order_by(_E.entry_id)
        with read_transaction(self.engine) as connection:
            return [entry_from_row(row) for row in connection.execute(query).mappings()]

    def update_entry(self, entry: Entry, *, read_revision: int) -> Entry:
        with write_transaction(self.engine) as connection:
            stored = _get(connection, entry.entry_id)
            if stored.revision != read_revision:
                raise Conflict(f"entry is at revision {stored.revision}, not {read_revision}; read it again")
            _check_no_twin(connection, entry)
            fresh = replace(entry, revision=read_revision + 1)
            connection.execute(
                update(schema.entries).where(_E.entry_id == entry.entry_id).values(**entry_to_row(fresh))
            )
            _announce(connection, fresh)
            return fresh

    def delete_entry(self, entry_id: str) -> Entry:
        with write_transaction(self.engine) as connection:
            entry = _get(connection, entry_id)
            connection.execute(delete(schema.entries).where(_E.entry_id == entry_id))
            still_needed = select(_E.entry_id).where(
                _E.owner == entry.owner.digest, _E.parent_id == str(entry.parent_id)
            )
            if connection.execute(still_needed).first() is None:
                withdraw(connection, entry.parent_id, owner=entry.owner)
            _announce(connection, entry)
            return entry

    def get_managed_key(self, owner: KeyOwner) -> ManagedKey | None:
        with read_transaction(self.engine) as connection:
            row = connection.execute(select(schema.managed_keys).where(_K.owner == owner.digest)).mappings().first()
            return key_from_row(row) if row else None

    def save_managed_key(self, key: ManagedKey, *, expected: KeyUse | None = None) -> bool:
        row = key_to_row(key)
        query = update(schema.managed_keys).where(_K.owner == row["owner"])
        if expected is not None:
            query = query.where(_K.use == expected.value)
        with write_transaction(self.engine) as connection:
            saved = connection.execute(query.values(**row)).rowcount == 1
            if not saved and expected is None:
                connection.execute(schema.managed_keys.insert().values(**row))
            return saved or expected is None

    def replace_managed_key(self, fresh: ManagedKey, *, former: ManagedKey) -> bool:
        row = key_to_row(fresh)
        query = update(schema.managed_keys).where(_K.owner == row["owner"], _K.key_id == former.key_id)
        with write_transaction(self.engine) as connection:
            if not connection.execute(query.values(**row)).rowcount:
                return False
            kept = {"key_id": former.key_id, "owner": row["owner"], "generation": former.generation}
            connection.execute(schema.former_keys.insert().values(**kept))
            return True

    def former_keys(self, owner: KeyOwner | None = None) -> list[FormerKey]:
        query = select(schema.former_keys).order_by(_F.owner, _F.generation)
        if owner is not None:
            query = query.where(_F.owner == owner.digest)
        with read_transaction(self.engine) as connection:
            return [
                FormerKey(row.key_id, row.owner, row.generation, row.retire_at) for row in connection.execute(query)
            ]

    def save_retirement(self, key_id: str, retire_at: datetime) -> None:
        with write_transaction(self.engine) as connection:
            same = _F.key_id == key_id
            connection.execute(update(schema.former_keys).where(same).values(retire_at=retire_at))

    def forget_former_key(self, key_id: str) -> None:
        with write_transaction(self.engine) as connection:
            connection.execute(delete(schema.former_keys).where(_F.key_id == key_id))

    def last_not_after(self, key_id: str) -> datetime | None:
        wanted = _S.state != SvidState.FAILED.value
        query = select(func.max(_S.not_after)).where(_S.key_id == key_id, wanted)
        with read_transaction(self.engine) as connection:
            return connection.execute(query).scalar()

    def list_managed_keys(self, *, unused: bool = False) -> list[ManagedKey]:
        query = select(schema.managed_keys).order_by(_K.owner)
        if unused:
            query = query.where(
                _K.use.in_([KeyUse.IN_USE.value, KeyUse.RETIRING.value]), ~exists().where(_E.owner == _K.owner)
            )
        with read_transaction(self.engine) as connection:
            return [key_from_row(row) for row in connection.execute(query).mappings()]

    def get_node_grant(self, owner: KeyOwner, agent: SpiffeId) -> NodeGrant | None:
        query = select(schema.node_grants).where(_G.owner == owner.digest, _G.agent_hash == hash_of(agent))
        with read_transaction(self.engine) as connection:
            row = connection.execute(query).mappings().first()
            return grant_from_row(row, owner) if row else None

    def save_node_grant(self, grant: NodeGrant, *, expected: GrantState | None = None) -> bool:
        row = grant_to_row(grant)
        query = update(schema.node_grants).where(_G.owner == row["owner"], _G.agent_hash == row["agent_hash"])
        if expected is not None:
            query = query.where(_G.state == expected.value)
        with write_transaction(self.engine) as connection:
            saved = connection.execute(query.values(**row)).rowcount == 1
            if not saved and expected is None:
                connection.execute(schema.node_grants.insert().values(**row))
            return saved or expected is None

    def claim_node_grant(self, grant: NodeGrant) -> bool:
        row = grant_to_row(grant)
        needing = select(_E.entry_id).where(_E.owner == row["owner"], _E.parent_id == row["agent"])
        barred = select(_A.spiffe_id).where(_A.spiffe_id == row["agent"], _A.banned | _A.evicted)
        with write_transaction(self.engine) as connection:
            if connection.execute(needing).first() is None or connection.execute(barred).first() is not None:
                return False
            same = update(schema.node_grants).where(_G.owner == row["owner"], _G.agent_hash == row["agent_hash"])
            if not connection.execute(same.values(**row)).rowcount:
                connection.execute(schema.node_grants.insert().values(**row))
            return True

    def withdrawing_grants(self) -> list[NodeGrant]:
        joined = schema.node_grants.join(schema.managed_keys, _G.owner == _K.owner)
        query = (
            select(schema.node_grants, _K.spiffe_id, _K.agent.label("owner_agent"))
            .select_from(joined)
            .where(_G.state == GrantState.WITHDRAWING.value)
        )
        with read_transaction(self.engine) as connection:
            rows = connection.execute(query).mappings().all()
        return [
            grant_from_row(row, owner_from_row({"spiffe_id": row["spiffe_id"], "agent": row["owner_agent"]}))
            for row in rows
        ]


def withdraw(connection: Connection, agent: SpiffeId, *, owner: KeyOwner | None = None) -> None:
    """Marks an agent's grants, or the one for `owner`, as to be revoked. What an operator revoked stays as it is."""
    live = _G.state.in_([GrantState.INTENDED.value, GrantState.LIVE.value])
    query = update(schema.node_grants).where(_G.agent_hash == hash_of(agent), live)
    if owner is not None:
        query = query.where(_G.owner == owner.digest)
    connection.execute(query.values(state=GrantState.WITHDRAWING.value))


def _announce(connection: Connection, entry: Entry) -> None:
    """To its agent, and to those that share its key, since they share its certificate."""
    announce(connection, [entry.parent_id, *agents_sharing(connection, [entry.owner.digest])])


def _get(connection: Connection, entry_id: str) -> Entry:
    row = connection.execute(select(schema.entries).where(_E.entry_id == entry_id)).mappings().first()
    if row is None:
        raise NotFound("no such entry")
    return entry_from_row(row)


def _check_no_twin(connection: Connection, entry: Entry) -> None:
    query = select(_E.entry_id).where(_E.similarity == entry.similarity, _E.entry_id != entry.entry_id)
    twin = connection.execute(query).scalar()
    if twin is not None:
        raise Conflict(f"entry {twin} has the same parent, SPIFFE ID and selectors")
