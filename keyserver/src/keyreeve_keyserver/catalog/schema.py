"""The catalog's tables. Times are whole microseconds since 1970 UTC, so that SQLite and PostgreSQL agree.

Every row carries the value of the change counter at its last write; a writer takes the counter's row first and keeps it until it commits, so a
reader that has seen counter N has seen every row up to N.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, Index, Integer, LargeBinary, MetaData, String, Table, Text

SCHEMA_VERSION = (
    1  # changes only when programs of the version before cannot go on; what is added beside it is a step (steps.py)
)
CREATING = "creating"  # the signer was asked for the key, its answer is not recorded yet

metadata = MetaData()

schema_version = Table("keyreeve_schema_version", metadata, Column("version", Integer, primary_key=True))

schema_steps = Table("keyreeve_schema_steps", metadata, Column("name", String(64), primary_key=True))

changes = Table(
    "keyreeve_changes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("counter", BigInteger, nullable=False),
)

keys = Table(
    "keyreeve_keys",
    metadata,
    Column("key_id", String(64), primary_key=True),
    Column("request_id", String(128), nullable=False, unique=True),
    Column("request_digest", String(64), nullable=False),
    Column("key_type", String(32), nullable=False),
    Column("role", String(32), nullable=False),
    Column("purposes", Text, nullable=False),
    Column("backend", String(64), nullable=False),
    Column("label", Text, nullable=False),
    Column("authority_profile", Text, nullable=True),
    Column("jwt_profile", Text, nullable=True),
    Column("state", String(16), nullable=False),
    Column("spki_der", LargeBinary, nullable=True),
    Column("sealed_record", LargeBinary, nullable=True),
    Column("attributes", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),
    # Key life (docs/adr/0014): null where nothing of it concerns the key.
    Column("generation", Integer, nullable=True),
    Column("predecessor", String(64), nullable=True),
    Column("successor", String(64), nullable=True),
    Column("retire_at", BigInteger, nullable=True),
    Column("destroy_at", BigInteger, nullable=True),
    Column("destruction_permit", LargeBinary, nullable=True),
    Column("state_reason", Text, nullable=True),
    Index("keyreeve_keys_seq", "seq"),
    Index("keyreeve_keys_label", "label", "key_id"),
)

grants = Table(
    "keyreeve_grants",
    metadata,
    Column("key_id", String(64), primary_key=True),
    Column("holder", String(2048), primary_key=True),
    Column("purposes", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=True),
    Column("revoked_at", BigInteger, nullable=True),
    Column("seq", BigInteger, nullable=False),
    Column("rate_per_second", Double, nullable=True),
    Column("rate_burst", BigInteger, nullable=True),
    Index("keyreeve_grants_seq", "seq"),
    Index("keyreeve_grants_holder", "holder", "key_id"),
)

quarantines = Table(
    "keyreeve_quarantines",
    metadata,
    Column("holder", String(2048), primary_key=True),
    Column("cause", String(32), nullable=False),
    Column("reason", Text, nullable=False),
    Column("set_by", String(2048), nullable=False),
    Column("since", BigInteger, nullable=False),
    Column("until", BigInteger, nullable=True),
    Column("lifted_at", BigInteger, nullable=True),
    Column("seq", BigInteger, nullable=False),
    Index("keyreeve_quarantines_seq", "seq"),
)

approvals = Table(
    "keyreeve_approvals",
    metadata,
    Column("request_id", String(128), primary_key=True),
    Column("approver", String(64), primary_key=True),
    Column("request_digest", String(64), nullable=False),
    Column("approval", Text, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
)

settings = Table(  # what replicas share beside keys and grants, sealed where it is secret
    "keyreeve_settings",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", LargeBinary, nullable=False),
)
