"""The catalog: keys and grants in SQLite or PostgreSQL. Every method blocks and is called off the event loop.

CreateKey is three steps, so that a crash between them loses nothing: `begin_key` records the intent, the signer makes the key, `complete_key`
records what it made. The same request id finds the intent again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from keyreeve_common.errors import ConfigInvalid, Conflict, KeyNotFound
from keyreeve_common.key_id import KeyId
from keyreeve_common.strict_json import canonical_json
from keyreeve_common.telemetry import log
from sqlalchemy import URL, Connection, Engine, Table, and_, delete, insert, inspect, select, text, update

from keyreeve_keyserver.catalog.database import WRITE, open_engine, storage_errors
from keyreeve_keyserver.catalog.grants import GrantRows
from keyreeve_keyserver.catalog.key_life import IS_PENDING, KeyLifeRows, next_generation, succeed
from keyreeve_keyserver.catalog.listen import CHANNEL
from keyreeve_keyserver.catalog.quarantines import QuarantineRows, quarantine_entry
from keyreeve_keyserver.catalog.records import (
    Changes,
    KeyEntry,
    NewKey,
    grant_entry,
    key_entry,
    key_facts,
    purposes_to_text,
    time_to_number,
)
from keyreeve_keyserver.catalog.schema import (
    CREATING,
    SCHEMA_VERSION,
    approvals,
    changes,
    grants,
    keys,
    quarantines,
    schema_version,
)
from keyreeve_keyserver.catalog.steps import apply_steps, create_tables
from keyreeve_keyserver.domain.keys import AuthorityProfile, JwtProfile, KeyState

_SCHEMA_LOCK = 0x6B657972  # PostgreSQL advisory lock, so that two replicas do not make the tables at once
_KEY_COLUMNS = [column for column in keys.columns if column.name not in ("sealed_record", "destruction_permit")]
_FACTS_COLUMNS = [*(keys.c[name] for name in ("key_id", "role", "purposes", "state", "key_type", "backend", "seq"))]


class Catalog(GrantRows, KeyLifeRows, QuarantineRows):
    """Use `Catalog.open`; `close` gives the connections back."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, url: URL, *, busy_timeout: Any) -> Catalog:
        """Makes the tables if there are none. Raises: ConfigInvalid, StorageBusy, StorageFull, Unavailable."""
        catalog = cls(open_engine(url, busy_timeout=busy_timeout))
        try:
            catalog._prepare()
        except BaseException:
            catalog.close()
            raise
        return catalog

    @property
    def url(self) -> URL:
        """With the password, which its repr hides."""
        return self._engine.url

    def close(self) -> None:
        self._engine.dispose()

    def _prepare(self) -> None:
        with storage_errors(), self._engine.connect().execution_options(**WRITE) as connection, connection.begin():
            if self._engine.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _SCHEMA_LOCK})
            if not inspect(connection).has_table(schema_version.name):
                create_tables(connection)
                connection.execute(insert(schema_version).values(version=SCHEMA_VERSION))
                connection.execute(insert(changes).values(id=1, counter=0))
            for step in apply_steps(connection):
                log("catalog_step_done", step=step)
            found = connection.execute(select(schema_version.c.version)).scalar_one()
        if found != SCHEMA_VERSION:
            raise ConfigInvalid(
                f"the catalog has schema version {found}, this program knows {SCHEMA_VERSION}: install a matching release"
            )

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with storage_errors(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def _write(self) -> Iterator[tuple[Connection, int]]:
        """A transaction that holds the change counter's row until it commits, and the counter's new value."""
        with storage_errors(), self._engine.connect().execution_options(**WRITE) as connection, connection.begin():
            bumped = update(changes).where(changes.c.id == 1).values(counter=changes.c.counter + 1)
            seq = int(connection.execute(bumped.returning(changes.c.counter)).scalar_one())
            if self._engine.dialect.name == "postgresql":
                connection.execute(text(f"NOTIFY {CHANNEL}"))  # sent when the transaction commits
            yield connection, seq

    # Keys

    def begin_key(self, new: NewKey, *, now: datetime) -> KeyEntry:
        """The key that `new.request_id` stands for: the intent, made now or earlier, or the finished key.

        Raises: Conflict when the request id was used for something else, or the predecessor is rotated by another request.
        """
        digest = _digest_of(new)
        with self._write() as (connection, seq):
            row = connection.execute(select(keys).where(keys.c.request_id == new.request_id)).one_or_none()
            if row is None:
                values = {
                    **next_generation(connection, new),
                    "key_id": make_key_id(),
                    "request_id": new.request_id,
                    "request_digest": digest,
                    "key_type": new.key_type.value,
                    "role": new.role.value,
                    "purposes": purposes_to_text(new.purposes),
                    "backend": new.backend,
                    "label": new.label,
                    "authority_profile": _profile_text(new.authority_profile),
                    "jwt_profile": _profile_text(new.jwt_profile),
                    "state": CREATING,
                    "attributes": "{}",
                    "created_at": time_to_number(now),
                    "seq": seq,
                }
                row = connection.execute(insert(keys).values(values).returning(*_KEY_COLUMNS)).one()
            elif row.request_digest != digest:
                raise Conflict("this request_id made a different key already; choose a new request_id")
            return key_entry(row)

    def complete_key(
        self, key_id: KeyId, *, backend: str, sealed_record: bytes, spki_der: bytes, attributes: dict[str, Any]
    ) -> KeyEntry | None:
        """Records what the signer made. None when another process completed, or gave up, this key before."""
        with self._write() as (connection, seq):
            row = connection.execute(
                update(keys)
                .where(keys.c.key_id == key_id, keys.c.state == CREATING)
                .values(
                    state=KeyState.ENABLED.value,
                    backend=backend,
                    sealed_record=sealed_record,
                    spki_der=spki_der,
                    attributes=json.dumps(attributes, sort_keys=True),
                    seq=seq,
                )
                .returning(*_KEY_COLUMNS)
            ).one_or_none()
            if row is not None and row.predecessor:
                succeed(connection, row, seq)
        return None if row is None else key_entry(row)

    def abandon_key(self, key_id: KeyId) -> None:
        """Forgets an intent that the signer refused for good, and its approvals: too many may be what was refused."""
        intent = and_(keys.c.key_id == key_id, keys.c.state == CREATING)
        with self._write() as (connection, _):
            of_intent = approvals.c.request_id.in_(select(keys.c.request_id).where(intent))
            connection.execute(delete(approvals).where(of_intent))
            connection.execute(delete(keys).where(intent))

    def rename_intent(self, key_id: KeyId) -> KeyEntry | None:
        """A fresh key id for an intent whose first one the backend holds already, from a creation that was cut off. None: completed."""
        with self._write() as (connection, seq):
            row = connection.execute(
                update(keys)
                .where(keys.c.key_id == key_id, keys.c.state == CREATING)
                .values(key_id=make_key_id(), seq=seq)
                .returning(*_KEY_COLUMNS)
            ).one_or_none()
        return None if row is None else key_entry(row)

    def key(self, key_id: KeyId) -> KeyEntry:
        """Raises: KeyNotFound."""
        with self._read() as connection:
            row = connection.execute(_finished_keys().where(keys.c.key_id == key_id)).one_or_none()
        if row is None:
            raise KeyNotFound("no such key")
        return key_entry(row)

    def list_keys(self, *, limit: int, after: str = "", label: str = "") -> list[KeyEntry]:
        """In the order of key ids, beginning behind `after`."""
        query = _finished_keys().where(keys.c.key_id > after).order_by(keys.c.key_id).limit(limit)
        if label:
            query = query.where(keys.c.label == label)
        with self._read() as connection:
            return [key_entry(row) for row in connection.execute(query)]

    def sealed_record(self, key_id: KeyId, *, states: tuple[KeyState, ...] = tuple(KeyState)) -> bytes | None:
        """What the signer needs to load or destroy the key; None for an unknown one, one in no such state, one whose record is wiped."""
        with self._read() as connection:
            query = select(keys.c.sealed_record).where(keys.c.key_id == key_id, keys.c.state.in_(states))
            found = connection.execute(query).scalar_one_or_none()
        return None if found is None else bytes(found)

    def change_state(self, key_id: KeyId, *, to: KeyState, from_states: tuple[KeyState, ...]) -> KeyEntry | None:
        """None when the key is in none of `from_states`; one that waits for its destruction is in none. Raises: KeyNotFound."""
        with self._write() as (connection, seq):
            row = connection.execute(
                update(keys)
                .where(keys.c.key_id == key_id, keys.c.state.in_([state.value for state in from_states]), ~IS_PENDING)
                .values(
                    state=to.value, destroy_at=None, destruction_permit=None, state_reason=None, retire_at=None, seq=seq
                )
                .returning(*_KEY_COLUMNS)
            ).one_or_none()
        if row is not None:
            return key_entry(row)
        self.key(key_id)
        return None

    def wipe_record(self, key_id: KeyId) -> None:
        """Drops the sealed record of a key whose private half the signer has destroyed."""
        with self._write() as (connection, seq):
            destroyed = keys.c.state == KeyState.DESTROYED.value
            connection.execute(
                update(keys)
                .where(keys.c.key_id == key_id, destroyed)
                .values(sealed_record=None, destruction_permit=None, seq=seq)
            )

    # Following

    def changes_since(self, seq: int) -> Changes | None:
        """What was written after `seq`; None when nothing was."""
        with self._read() as connection:
            counter = int(connection.execute(select(changes.c.counter)).scalar_one())
            if counter == seq:
                return None
            found_keys = connection.execute(select(*_FACTS_COLUMNS).where(_after(keys, seq), keys.c.state != CREATING))
            found_quarantines = connection.execute(select(quarantines).where(_after(quarantines, seq)))
            found_grants = connection.execute(select(grants).where(_after(grants, seq)))
            return Changes(
                counter,
                tuple(key_facts(row) for row in found_keys),
                tuple(grant_entry(row) for row in found_grants),
                tuple(quarantine_entry(row) for row in found_quarantines),
            )


def make_key_id() -> KeyId:
    """`k-` and 26 lower-case base32 characters: 130 random bits."""
    return KeyId("k-" + base64.b32encode(secrets.token_bytes(17)).decode("ascii").lower()[:26])


def _after(table: Table, seq: int) -> Any:
    return table.c.seq > seq


def _finished_keys() -> Any:
    return select(*_KEY_COLUMNS).where(keys.c.state != CREATING)


def _profile_text(profile: AuthorityProfile | JwtProfile | None) -> str | None:
    return None if profile is None else canonical_json(profile.to_json()).decode("ascii")


def _digest_of(new: NewKey) -> str:
    fields = {
        "key_type": new.key_type.value,
        "role": new.role.value,
        "purposes": purposes_to_text(new.purposes),
        "backend": new.backend,
        "label": new.label,
        "authority_profile": _profile_text(new.authority_profile),
    }
    if new.jwt_profile is not None:  # only then, so that the intents of an earlier release are found again
        fields["jwt_profile"] = _profile_text(new.jwt_profile)
    if new.predecessor:
        fields["predecessor"] = new.predecessor
    return hashlib.sha256(canonical_json(fields)).hexdigest()
