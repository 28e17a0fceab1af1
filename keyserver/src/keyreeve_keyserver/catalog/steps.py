"""Steps that bring a catalog of an earlier release to this one's tables, each done once and by its name.

A step only adds: a table, a column that is nullable or has a server default, an index. So a replica of the release before goes on while this one
serves, and a rolling upgrade needs no stop. A new catalog is made whole by `metadata.create_all` and has every step marked as done.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Column, Connection, Table, insert, inspect, select, text
from sqlalchemy.schema import CreateColumn

from keyreeve_keyserver.catalog.schema import approvals, grants, keys, metadata, quarantines, schema_steps, settings

Step = Callable[[Connection], None]


def new_table(table: Table) -> Step:
    """The step that makes this table and its indexes."""
    return lambda connection: table.create(connection, checkfirst=True)


def new_column(table: Table, name: str) -> Step:
    """The step that adds this column, as schema.py declares it, unless it is there."""

    def add(connection: Connection) -> None:
        if any(column["name"] == name for column in inspect(connection).get_columns(table.name)):
            return
        column: Column[object] = table.c[name]
        declared = CreateColumn(column).compile(dialect=connection.dialect)
        connection.execute(text(f"ALTER TABLE {table.name} ADD COLUMN {declared}"))

    return add


_KEY_LIFE = (
    "generation",
    "predecessor",
    "successor",
    "retire_at",
    "destroy_at",
    "destruction_permit",
    "state_reason",
)
STEPS: dict[str, Step] = {
    **{f"key_life_{name}": new_column(keys, name) for name in _KEY_LIFE},
    "grants_rate_per_second": new_column(grants, "rate_per_second"),
    "grants_rate_burst": new_column(grants, "rate_burst"),
    "keys_jwt_profile": new_column(keys, "jwt_profile"),
    "quarantines": new_table(quarantines),
    "approvals": new_table(approvals),
    "settings": new_table(settings),
}  # in the order in which they are done; a name is never used again


def create_tables(connection: Connection) -> None:
    """All tables of this release, in a database that has none of ours."""
    metadata.create_all(connection)
    if STEPS:
        connection.execute(insert(schema_steps), [{"name": name} for name in STEPS])


def apply_steps(connection: Connection) -> list[str]:
    """Does what is missing; the names of the steps done. The caller holds the lock that keeps other replicas out."""
    schema_steps.create(connection, checkfirst=True)
    done = set(connection.execute(select(schema_steps.c.name)).scalars())
    missing = [name for name in STEPS if name not in done]
    for name in missing:
        STEPS[name](connection)
        connection.execute(insert(schema_steps).values(name=name))
    return missing
