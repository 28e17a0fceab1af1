"""Whom a change concerns; the grants of one agent are found by an index."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "change_log",
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("agent_hash", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("number", "agent_hash", name=op.f("pk_change_log")),
    )
    op.create_index(op.f("ix_node_grants_agent_hash"), "node_grants", ["agent_hash"])
