"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table('agents',
    sa.Column('spiffe_id', sa.String(length=2048), nullable=False),
    sa.Column('attestation_type', sa.String(length=64), nullable=False),
    sa.Column('serials', sa.JSON(), nullable=False),
    sa.Column('svid_not_after', sa.Float(53), nullable=False),
    sa.Column('attested_at', sa.Float(53), nullable=False),
    sa.Column('last_seen_at', sa.Float(53), nullable=False),
    sa.Column('banned', sa.Boolean(), nullable=False),
    sa.Column('evicted', sa.Boolean(), nullable=False),
    sa.Column('agent_version', sa.String(length=255), nullable=False),
    sa.PrimaryKeyConstraint('spiffe_id', name=op.f('pk_agents'))
    )
    op.create_table('authorities',
    sa.Column('authority_id', sa.String(length=128), nullable=False),
    sa.Column('state', sa.String(length=16), nullable=False),
    sa.Column('key_id', sa.String(length=64), nullable=False),
    sa.Column('certificate_der', sa.LargeBinary(), nullable=False),
    sa.Column('root', sa.Boolean(), nullable=False),
    sa.Column('number', sa.Integer(), nullable=False),
    sa.PrimaryKeyConstraint('authority_id', name=op.f('pk_authorities')),
    sa.UniqueConstraint('key_id', name=op.f('uq_authorities_key_id'))
    )
    op.create_table('counters',
    sa.Column('name', sa.String(length=64), nullable=False),
    sa.Column('value', sa.BigInteger(), nullable=False),
    sa.PrimaryKeyConstraint('name', name=op.f('pk_counters'))
    )
    op.create_table('entries',
    sa.Column('entry_id', sa.String(length=64), nullable=False),
    sa.Column('similarity', sa.String(length=64), nullable=False),
    sa.Column('spiffe_id', sa.String(length=2048), nullable=False),
    sa.Column('parent_id', sa.String(length=2048), nullable=False),
    sa.Column('owner', sa.String(length=64), nullable=False),
    sa.Column('selectors', sa.JSON(), nullable=False),
    sa.Column('delegates', sa.JSON(), nullable=False),
    sa.Column('dns_names', sa.JSON(), nullable=False),
    sa.Column('purposes', sa.JSON(), nullable=False),
    sa.Column('x509_svid_ttl', sa.Float(53), nullable=True),
    sa.Column('custody', sa.String(length=16), nullable=False),
    sa.Column('key_scope', sa.String(length=16), nullable=False),
    sa.Column('key_type', sa.String(length=16), nullable=False),
    sa.Column('key_backend', sa.String(length=64), nullable=False),
    sa.Column('hint', sa.Text(), nullable=False),
    sa.Column('revision', sa.BigInteger(), nullable=False),
    sa.Column('created_at', sa.Float(53), nullable=False),
    sa.Column('expires_at', sa.Float(53), nullable=True),
    sa.PrimaryKeyConstraint('entry_id', name=op.f('pk_entries')),
    sa.UniqueConstraint('similarity', name=op.f('uq_entries_similarity'))
    )
    op.create_index(op.f('ix_entries_owner'), 'entries', ['owner'], unique=False)
    op.create_index(op.f('ix_entries_parent_id'), 'entries', ['parent_id'], unique=False)
    op.create_index(op.f('ix_entries_spiffe_id'), 'entries', ['spiffe_id'], unique=False)
    op.create_table('join_tokens',
    sa.Column('token_hash', sa.LargeBinary(length=32), nullable=False),
    sa.Column('agent_id', sa.String(length=2048), nullable=False),
    sa.Column('expires_at', sa.Float(53), nullable=False),
    sa.PrimaryKeyConstraint('token_hash', name=op.f('pk_join_tokens'))
    )
    op.create_index(op.f('ix_join_tokens_expires_at'), 'join_tokens', ['expires_at'], unique=False)
    op.create_table('managed_keys',
    sa.Column('owner', sa.String(length=64), nullable=False),
    sa.Column('spiffe_id', sa.String(length=2048), nullable=False),
    sa.Column('agent', sa.String(length=2048), nullable=True),
    sa.Column('generation', sa.Integer(), nullable=False),
    sa.Column('key_id', sa.String(length=64), nullable=False),
    sa.Column('spki_der', sa.LargeBinary(), nullable=False),
    sa.Column('fingerprint', sa.String(length=64), nullable=False),
    sa.Column('use', sa.String(length=16), nullable=False),
    sa.PrimaryKeyConstraint('owner', name=op.f('pk_managed_keys'))
    )
    op.create_table('settings',
    sa.Column('name', sa.String(length=64), nullable=False),
    sa.Column('value', sa.Text(), nullable=False),
    sa.PrimaryKeyConstraint('name', name=op.f('pk_settings'))
    )
    op.create_table('svids',
    sa.Column('serial', sa.String(length=40), nullable=False),
    sa.Column('number', sa.BigInteger(), nullable=False),
    sa.Column('spiffe_id', sa.String(length=2048), nullable=False),
    sa.Column('subject', sa.String(length=80), nullable=False),
    sa.Column('authority_id', sa.String(length=128), nullable=False),
    sa.Column('entry_id', sa.String(length=64), nullable=False),
    sa.Column('key_id', sa.String(length=64), nullable=False),
    sa.Column('state', sa.String(length=16), nullable=False),
    sa.Column('wanted', sa.String(length=64), nullable=False),
    sa.Column('not_before', sa.Float(53), nullable=False),
    sa.Column('not_after', sa.Float(53), nullable=False),
    sa.Column('created_at', sa.Float(53), nullable=False),
    sa.Column('chain_der', sa.JSON(), nullable=False),
    sa.Column('failure', sa.Text(), nullable=False),
    sa.Column('current', sa.Boolean(), nullable=False),
    sa.PrimaryKeyConstraint('serial', name=op.f('pk_svids')),
    sa.UniqueConstraint('number', name=op.f('uq_svids_number'))
    )
    op.create_index(op.f('ix_svids_spiffe_id'), 'svids', ['spiffe_id'], unique=False)
    op.create_index('ix_svids_subject_current', 'svids', ['subject', 'current'], unique=False)
    op.create_table('node_grants',
    sa.Column('owner', sa.String(length=64), nullable=False),
    sa.Column('agent_hash', sa.String(length=64), nullable=False),
    sa.Column('agent', sa.String(length=2048), nullable=False),
    sa.Column('key_id', sa.String(length=64), nullable=False),
    sa.Column('state', sa.String(length=16), nullable=False),
    sa.Column('expires_at', sa.Float(53), nullable=True),
    sa.Column('revoked_at', sa.Float(53), nullable=True),
    sa.ForeignKeyConstraint(['owner'], ['managed_keys.owner'], name=op.f('fk_node_grants_owner')),
    sa.PrimaryKeyConstraint('owner', 'agent_hash', name=op.f('pk_node_grants'))
    )
    op.create_index(op.f('ix_node_grants_state'), 'node_grants', ['state'], unique=False)
