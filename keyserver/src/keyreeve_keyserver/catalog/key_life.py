"""What becomes of a key, in the catalog: disabled by the cluster itself, scheduled for destruction, destroyed, rotated.

Each change is one conditional UPDATE, so that of several replicas over one catalog exactly one makes it. Times are the database's own where it
has a clock (PostgreSQL): a replica whose clock is wrong ends nothing early.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from keyreeve_common.approvals import Approval
from keyreeve_common.errors import Conflict, FailedPrecondition, KeyNotFound
from keyreeve_common.key_id import KeyId
from sqlalchemy import Connection, Row, and_, delete, insert, or_, select, text, update

from keyreeve_keyserver.catalog.records import KeyEntry, NewKey, key_entry, time_from_number, time_to_number
from keyreeve_keyserver.catalog.schema import CREATING, approvals, grants, keys, settings
from keyreeve_keyserver.domain.keys import KeyState

# Not the sealed record and the permit: whoever looks at keys has no use for them.
_COLUMNS = [column for column in keys.columns if column.name not in ("sealed_record", "destruction_permit")]
_POSTGRESQL_NOW = text("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
IS_PENDING = and_(keys.c.state == KeyState.DISABLED.value, keys.c.destroy_at.is_not(None))
# By a replica of a release that knows of no destruction to come: whoever did that wanted the key.
_ENABLED_AGAIN = and_(keys.c.state == KeyState.ENABLED.value, keys.c.destroy_at.is_not(None))
_NO_DESTRUCTION: dict[str, Any] = {"destroy_at": None, "destruction_permit": None}
_ATTESTATION_KEY = "attestation_key"
RETIRED = "retired: its last certificate has ended"


@dataclass(frozen=True, slots=True)
class Doomed:
    """A key that the catalog calls destroyed and whose private half may still be there."""

    key_id: KeyId
    sealed_record: bytes = field(repr=False)
    permit: bytes = field(repr=False)


class KeyLifeRows:
    """Mixed into Catalog, which gives the transactions."""

    def _read(self) -> AbstractContextManager[Connection]:
        raise NotImplementedError

    def _write(self) -> AbstractContextManager[tuple[Connection, int]]:
        raise NotImplementedError

    def disable_faulty(self, key_id: KeyId, *, reason: str) -> KeyEntry | None:
        """Disables an enabled key that the cluster found faulty. None: it is not enabled any more."""
        with self._write() as (connection, seq):
            row = connection.execute(
                update(keys)
                .where(keys.c.key_id == key_id, keys.c.state == KeyState.ENABLED.value)
                .values(state=KeyState.DISABLED.value, state_reason=reason, **_NO_DESTRUCTION, seq=seq)
                .returning(*_COLUMNS)
            ).one_or_none()
        return None if row is None else key_entry(row)

    def database_time(self, here: datetime) -> datetime:
        """PostgreSQL's clock, which all replicas share; with SQLite, on one machine, what this machine's clock says: `here`."""
        with self._read() as connection:
            if connection.dialect.name != "postgresql":
                return here
            return time_from_number(int(connection.execute(_POSTGRESQL_NOW).scalar_one()))

    def schedule_destruction(self, key_id: KeyId, *, at: datetime, permit: bytes) -> KeyEntry | None:
        """None when the key is not a disabled one without a destruction to come."""
        with self._write() as (connection, seq):
            row = connection.execute(
                update(keys)
                .where(keys.c.key_id == key_id, keys.c.state == KeyState.DISABLED.value, ~IS_PENDING)
                .values(destroy_at=time_to_number(at), destruction_permit=permit, seq=seq)
                .returning(*_COLUMNS)
            ).one_or_none()
        return None if row is None else key_entry(row)

    def cancel_destruction(self, key_id: KeyId) -> KeyEntry | None:
        """The key is disabled as before. None when no destruction is to come, or it has begun."""
        with self._write() as (connection, seq):
            row = connection.execute(
                update(keys)
                .where(keys.c.key_id == key_id, IS_PENDING)
                .values(destroy_at=None, destruction_permit=None, state_reason=None, seq=seq)
                .returning(*_COLUMNS)
            ).one_or_none()
        return None if row is None else key_entry(row)

    def begin_destructions(self, *, now: datetime) -> list[KeyEntry]:
        """Calls destroyed what is due: from here on there is no way back. Each key is given to one replica."""
        due = and_(IS_PENDING, keys.c.destroy_at <= time_to_number(now))
        with self._read() as connection:
            if connection.execute(select(keys.c.key_id).where(or_(due, _ENABLED_AGAIN)).limit(1)).first() is None:
                return []  # a write would have every replica look for changes
        with self._write() as (connection, seq):
            connection.execute(update(keys).where(_ENABLED_AGAIN).values(**_NO_DESTRUCTION, seq=seq))
            begun = update(keys).where(due).values(state=KeyState.DESTROYED.value, seq=seq).returning(*_COLUMNS)
            return [key_entry(row) for row in connection.execute(begun)]

    def unfinished_destructions(self, *, limit: int = 100, after: str = "") -> list[Doomed]:
        """Destroyed by name, with a record that the signer has still to destroy: now, or since a crash. By key id, behind `after`."""
        wanted = [keys.c.key_id, keys.c.sealed_record, keys.c.destruction_permit]
        destroyed = keys.c.state == KeyState.DESTROYED.value
        unfinished = and_(destroyed, keys.c.sealed_record.is_not(None), keys.c.key_id > after)
        with self._read() as connection:
            found = connection.execute(select(*wanted).where(unfinished).order_by(keys.c.key_id).limit(limit))
            return [
                Doomed(KeyId(row.key_id), bytes(row.sealed_record), bytes(row.destruction_permit or b""))
                for row in found
            ]

    def intent(self, request_id: str) -> KeyEntry | None:
        """The key that this request id asked for and that is not made yet."""
        wanted = select(*_COLUMNS).where(keys.c.request_id == request_id, keys.c.state == CREATING)
        with self._read() as connection:
            row = connection.execute(wanted).one_or_none()
        return None if row is None else key_entry(row)

    def keep_approvals(self, given: Sequence[Approval], *, now: datetime) -> list[str]:
        """Keeps approvals of one request, in place of those of an earlier one; who has approved it now. Expired ones go."""
        request = given[0].request
        same = approvals.c.request_id == request.request_id
        with self._write() as (connection, _):
            stale = or_(
                approvals.c.request_digest != request.digest, approvals.c.approver.in_([g.approver for g in given])
            )
            connection.execute(
                delete(approvals).where(or_(and_(same, stale), approvals.c.expires_at < time_to_number(now)))
            )
            rows = [
                {
                    "request_id": request.request_id,
                    "approver": approval.approver,
                    "request_digest": request.digest,
                    "approval": approval.to_text(),
                    "expires_at": time_to_number(request.expires),
                }
                for approval in {approval.approver: approval for approval in given}.values()
            ]
            connection.execute(insert(approvals), rows)
            kept = connection.execute(select(approvals.c.approver).where(same).order_by(approvals.c.approver))
            return list(kept.scalars())

    def approvals(self, request_id: str) -> list[str]:
        """The texts that are kept for this creation."""
        with self._read() as connection:
            query = select(approvals.c.approval).where(approvals.c.request_id == request_id)
            return list(connection.execute(query.order_by(approvals.c.approver)).scalars())

    def drop_approvals(self, request_id: str) -> None:
        """Forgets what is kept for this creation."""
        with self._write() as (connection, _):
            connection.execute(delete(approvals).where(approvals.c.request_id == request_id))

    def set_retirement(self, key_id: KeyId, *, at: datetime) -> KeyEntry | None:
        """When an enabled key is disabled by itself; a later call moves it. None: it is not enabled."""
        with self._write() as (connection, seq):
            row = connection.execute(
                update(keys)
                .where(keys.c.key_id == key_id, keys.c.state == KeyState.ENABLED.value)
                .values(retire_at=time_to_number(at), seq=seq)
                .returning(*_COLUMNS)
            ).one_or_none()
        return None if row is None else key_entry(row)

    def retire_due(self, *, now: datetime) -> list[KeyEntry]:
        """Disables what is due; each key is given to one replica."""
        due = and_(keys.c.state == KeyState.ENABLED.value, keys.c.retire_at <= time_to_number(now))
        with self._read() as connection:
            if connection.execute(select(keys.c.key_id).where(due).limit(1)).first() is None:
                return []
        with self._write() as (connection, seq):
            values = {"state": KeyState.DISABLED.value, "state_reason": RETIRED, **_NO_DESTRUCTION, "seq": seq}
            return [
                key_entry(row)
                for row in connection.execute(update(keys).where(due).values(values).returning(*_COLUMNS))
            ]

    def retired_keys(self) -> list[KeyEntry]:
        """Disabled since they were retired, and neither to be destroyed nor kept by somebody's word."""
        wanted = and_(keys.c.state == KeyState.DISABLED.value, keys.c.state_reason == RETIRED, ~IS_PENDING)
        with self._read() as connection:
            return [
                key_entry(row) for row in connection.execute(select(*_COLUMNS).where(wanted).order_by(keys.c.key_id))
            ]

    def attestation_key(self) -> bytes | None:
        """Sealed; None while none was made."""
        with self._read() as connection:
            query = select(settings.c.value).where(settings.c.name == _ATTESTATION_KEY)
            found = connection.execute(query).scalar_one_or_none()
        return None if found is None else bytes(found)

    def keep_attestation_key(self, sealed: bytes) -> bytes:
        """The one that counts: this one, or that of a replica that was first."""
        with self._write() as (connection, _):
            query = select(settings.c.value).where(settings.c.name == _ATTESTATION_KEY)
            found = connection.execute(query).scalar_one_or_none()
            if found is not None:
                return bytes(found)
            connection.execute(insert(settings).values(name=_ATTESTATION_KEY, value=sealed))
        return sealed


def next_generation(connection: Connection, new: NewKey) -> dict[str, object]:
    """The columns that name a key's place among its generations. Raises: Conflict, FailedPrecondition, KeyNotFound."""
    if not new.predecessor:
        return {}
    before = connection.execute(select(*_COLUMNS).where(keys.c.key_id == new.predecessor)).one_or_none()
    if before is None or before.state == CREATING:
        raise KeyNotFound("no such key")
    if before.state != KeyState.ENABLED.value:
        raise FailedPrecondition("only an enabled key is rotated")
    other = connection.execute(select(keys.c.request_id).where(keys.c.predecessor == new.predecessor)).scalar()
    if other is not None:
        raise Conflict(f"the key is rotated by request {other}; rotate its successor, or repeat that request")
    return {"predecessor": new.predecessor, "generation": (before.generation or 1) + 1}


def succeed(connection: Connection, made: Row[Any], seq: int) -> None:
    """Names the new key in its predecessor, and copies that one's grants: revoked ones too, so that a revocation stays one."""
    connection.execute(update(keys).where(keys.c.key_id == made.predecessor).values(successor=made.key_id, seq=seq))
    own = {"key_id": made.key_id, "seq": seq}
    rows = connection.execute(select(grants).where(grants.c.key_id == made.predecessor)).mappings()
    copies = [{**row, **own} for row in rows]
    if copies:
        connection.execute(insert(grants), copies)
