"""Agents and join tokens."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from keyreeve_common.errors import NotFound
from keyreeve_common.identity import SpiffeId
from sqlalchemy import Connection, delete, select, update

from keyreeve_ca.domain.attestation import JoinToken, refused_token
from keyreeve_ca.domain.records import Agent
from keyreeve_ca.store import schema
from keyreeve_ca.store.change_log import announce
from keyreeve_ca.store.engine import read_transaction, write_transaction
from keyreeve_ca.store.entry_records import withdraw
from keyreeve_ca.store.rows import Part, agent_from_row, agent_to_row

_A = schema.agents.c
_T = schema.join_tokens.c


class NodeRecords(Part):
    def add_join_token(self, token: JoinToken) -> None:
        with write_transaction(self.engine) as connection:
            connection.execute(
                schema.join_tokens.insert().values(
                    token_hash=token.token_hash, agent_id=str(token.agent_id), expires_at=token.expires_at
                )
            )

    def take_join_token(self, token_hash: bytes, now: datetime) -> JoinToken:
        with write_transaction(self.engine) as connection:
            row = connection.execute(select(schema.join_tokens).where(_T.token_hash == token_hash)).mappings().first()
            # Spec: spiffe.md 3.4: the delete itself must prove that exactly one row went away.
            gone = connection.execute(delete(schema.join_tokens).where(_T.token_hash == token_hash)).rowcount
            taken = None
            if row is not None and gone == 1 and row["expires_at"] > now:
                taken = JoinToken(token_hash, SpiffeId.parse(row["agent_id"]), row["expires_at"])
        if taken is None:
            raise refused_token()
        return taken

    def prune_join_tokens(self, now: datetime) -> int:
        with write_transaction(self.engine) as connection:
            return connection.execute(delete(schema.join_tokens).where(_T.expires_at <= now)).rowcount

    def save_agent(self, agent: Agent) -> bool:
        row = agent_to_row(agent)
        with write_transaction(self.engine) as connection:
            same = _A.spiffe_id == row["spiffe_id"]
            if connection.execute(select(_A.spiffe_id).where(same, _A.banned)).first() is not None:
                return False
            if not connection.execute(update(schema.agents).where(same).values(**row)).rowcount:
                connection.execute(schema.agents.insert().values(**row))
            announce(connection, [agent.spiffe_id])
            return True

    def renew_agent(
        self, spiffe_id: SpiffeId, *, renewed_from: str, serial: str, not_after: datetime, seen_at: datetime
    ) -> bool:
        with write_transaction(self.engine) as connection:
            stored = _get(connection, spiffe_id)
            if not stored.may_act or renewed_from not in stored.serials:
                return False
            connection.execute(
                update(schema.agents)
                .where(_A.spiffe_id == str(spiffe_id))
                .values(serials=[serial, renewed_from], svid_not_after=not_after, last_seen_at=seen_at)
            )
            announce(connection, [spiffe_id])
            return True

    def get_agent(self, spiffe_id: SpiffeId) -> Agent:
        with read_transaction(self.engine) as connection:
            return _get(connection, spiffe_id)

    def list_agents(self, *, limit: int = 1000, after: str = "") -> list[Agent]:
        query = select(schema.agents).where(_A.spiffe_id > after).order_by(_A.spiffe_id).limit(limit)
        with read_transaction(self.engine) as connection:
            return [agent_from_row(row) for row in connection.execute(query).mappings()]

    def touch_agent(self, spiffe_id: SpiffeId, *, seen_at: datetime, version: str) -> None:
        with write_transaction(self.engine) as connection:
            connection.execute(
                update(schema.agents)
                .where(_A.spiffe_id == str(spiffe_id))
                .values(last_seen_at=seen_at, agent_version=version)
            )

    def set_agent_standing(self, spiffe_id: SpiffeId, *, banned: bool | None, evicted: bool) -> Agent:
        with write_transaction(self.engine) as connection:
            agent = _get(connection, spiffe_id)
            fresh = replace(agent, banned=agent.banned if banned is None else banned, evicted=evicted)
            connection.execute(
                update(schema.agents)
                .where(_A.spiffe_id == str(spiffe_id))
                .values(banned=fresh.banned, evicted=fresh.evicted)
            )
            if not fresh.may_act:
                withdraw(connection, spiffe_id)
            announce(connection, [spiffe_id])
            return fresh


def _get(connection: Connection, spiffe_id: SpiffeId) -> Agent:
    row = connection.execute(select(schema.agents).where(_A.spiffe_id == str(spiffe_id))).mappings().first()
    if row is None:
        raise NotFound("no such agent")
    return agent_from_row(row)
