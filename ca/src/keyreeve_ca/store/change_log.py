"""The change sequence, and whom each step concerns, so that one entry's change does not have every agent looked after anew.

A step that has no row, be it of a CA of an earlier version or too old, concerns everyone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from keyreeve_common.identity import SpiffeId
from sqlalchemy import Connection, delete, select

from keyreeve_ca.domain.records import Changes
from keyreeve_ca.store import schema
from keyreeve_ca.store.engine import read_transaction, write_transaction
from keyreeve_ca.store.rows import CHANGES, Part, bump, hash_of, read_counter

_C = schema.change_log.c
_E = schema.entries.c
_EVERYONE = ""
MAX_NAMED = 200  # agents of one step; above, it concerns everyone
MAX_STEPS = 1_000  # read at once; above, everyone
KEPT_STEPS = 10_000


class ChangeLog(Part):
    def change_sequence(self) -> int:
        with read_transaction(self.engine) as connection:
            return read_counter(connection, CHANGES)

    def changes_since(self, number: int) -> Changes:
        with read_transaction(self.engine) as connection:
            newest = read_counter(connection, CHANGES)
            if newest == number:
                return Changes(newest, frozenset())
            if not 0 <= newest - number <= MAX_STEPS:
                return Changes(newest, None)
            query = select(_C.number, _C.agent_hash).where(_C.number > number, _C.number <= newest)
            rows = connection.execute(query).all()
        steps = {row.number for row in rows}
        agents = frozenset(row.agent_hash for row in rows)
        return Changes(newest, agents if len(steps) == newest - number and _EVERYONE not in agents else None)

    def prune_change_log(self) -> int:
        with write_transaction(self.engine) as connection:
            oldest = read_counter(connection, CHANGES) - KEPT_STEPS
            return connection.execute(delete(schema.change_log).where(_C.number <= oldest)).rowcount


def announce(connection: Connection, agents: Iterable[SpiffeId] | None) -> int:
    """Moves the change sequence for these agents, or for everyone; the new number."""
    number = bump(connection, CHANGES)
    named = {hash_of(agent) for agent in agents} if agents is not None else {_EVERYONE}
    if not 0 < len(named) <= MAX_NAMED:
        named = {_EVERYONE}
    connection.execute(schema.change_log.insert(), [{"number": number, "agent_hash": each} for each in sorted(named)])
    return number


def agents_sharing(connection: Connection, owners: Sequence[str]) -> list[SpiffeId]:
    """Agents with an entry whose key is of one of these owners, given by digest: at most one more than can be named."""
    query = select(_E.parent_id).distinct().where(_E.owner.in_(owners)).limit(MAX_NAMED + 1)
    return [SpiffeId.parse(text) for text in connection.execute(query).scalars()]
