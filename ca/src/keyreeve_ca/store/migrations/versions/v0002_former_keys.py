"""Keys of earlier generations, and which certificates a key has."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "former_keys",
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("retire_at", sa.Float(53), nullable=True),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_former_keys")),
    )
    op.create_index(op.f("ix_former_keys_owner"), "former_keys", ["owner"])
    op.create_index(op.f("ix_svids_key_id"), "svids", ["key_id"])
