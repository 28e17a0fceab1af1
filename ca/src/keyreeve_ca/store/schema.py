"""The tables. Migrations make them (store/migrations); a test holds the two together. SPIFFE IDs take 2,048 bytes (ID-16).

Times are whole or fractional seconds since 1970 in UTC, so both databases give back what was stored.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)


class UtcTime(TypeDecorator[datetime]):
    """Aware UTC in, aware UTC out."""

    impl = Float(53)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> float | None:
        return None if value is None else value.timestamp()

    def process_result_value(self, value: float | None, dialect: Any) -> datetime | None:
        return None if value is None else datetime.fromtimestamp(value, UTC)


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
    }
)
_ID = String(2048)
_HASH = String(64)

settings = Table(
    "settings", metadata, Column("name", String(64), primary_key=True), Column("value", Text, nullable=False)
)
counters = Table(
    "counters", metadata, Column("name", String(64), primary_key=True), Column("value", BigInteger, nullable=False)
)
entries = Table(
    "entries",
    metadata,
    Column("entry_id", String(64), primary_key=True),
    Column("similarity", _HASH, nullable=False, unique=True),
    Column("spiffe_id", _ID, nullable=False, index=True),
    Column("parent_id", _ID, nullable=False, index=True),
    Column("owner", _HASH, nullable=False, index=True),
    Column("selectors", JSON, nullable=False),
    Column("delegates", JSON, nullable=False),
    Column("dns_names", JSON, nullable=False),
    Column("purposes", JSON, nullable=False),
    Column("x509_svid_ttl", Float(53)),
    Column("custody", String(16), nullable=False),
    Column("key_scope", String(16), nullable=False),
    Column("key_type", String(16), nullable=False),
    Column("key_backend", String(64), nullable=False),
    Column("hint", Text, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime),
)
agents = Table(
    "agents",
    metadata,
    Column("spiffe_id", _ID, primary_key=True),
    Column("attestation_type", String(64), nullable=False),
    Column("serials", JSON, nullable=False),
    Column("svid_not_after", UtcTime, nullable=False),
    Column("attested_at", UtcTime, nullable=False),
    Column("last_seen_at", UtcTime, nullable=False),
    Column("banned", Boolean, nullable=False),
    Column("evicted", Boolean, nullable=False),
    Column("agent_version", String(255), nullable=False),
)
join_tokens = Table(
    "join_tokens",
    metadata,
    Column("token_hash", LargeBinary(32), primary_key=True),
    Column("agent_id", _ID, nullable=False),
    Column("expires_at", UtcTime, nullable=False, index=True),
)
authorities = Table(
    "authorities",
    metadata,
    Column("authority_id", String(128), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("key_id", String(64), nullable=False, unique=True),
    Column("certificate_der", LargeBinary, nullable=False),
    Column("root", Boolean, nullable=False),
    Column("number", Integer, nullable=False),
)
managed_keys = Table(
    "managed_keys",
    metadata,
    Column("owner", _HASH, primary_key=True),
    Column("spiffe_id", _ID, nullable=False),
    Column("agent", _ID),
    Column("generation", Integer, nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("spki_der", LargeBinary, nullable=False),
    Column("fingerprint", _HASH, nullable=False),
    Column("use", String(16), nullable=False),
)
former_keys = Table(
    "former_keys",
    metadata,
    Column("key_id", String(64), primary_key=True),
    Column("owner", _HASH, nullable=False, index=True),
    Column("generation", Integer, nullable=False),
    Column("retire_at", UtcTime),
)
node_grants = Table(
    "node_grants",
    metadata,
    Column("owner", _HASH, ForeignKey("managed_keys.owner"), primary_key=True),
    Column("agent_hash", _HASH, primary_key=True, index=True),
    Column("agent", _ID, nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("expires_at", UtcTime),
    Column("revoked_at", UtcTime),
)
change_log = Table(
    "change_log",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("agent_hash", _HASH, primary_key=True),  # empty: everyone
)
svids = Table(
    "svids",
    metadata,
    Column("serial", String(40), primary_key=True),
    Column("number", BigInteger, nullable=False, unique=True),
    Column("spiffe_id", _ID, nullable=False, index=True),
    Column("subject", String(80), nullable=False),
    Column("authority_id", String(128), nullable=False),
    Column("entry_id", String(64), nullable=False),
    Column("key_id", String(64), nullable=False, index=True),
    Column("state", String(16), nullable=False),
    Column("wanted", _HASH, nullable=False),
    Column("not_before", UtcTime, nullable=False),
    Column("not_after", UtcTime, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("chain_der", JSON, nullable=False),
    Column("failure", Text, nullable=False),
    Column("current", Boolean, nullable=False),
    Index("ix_svids_subject_current", "subject", "current"),
)
