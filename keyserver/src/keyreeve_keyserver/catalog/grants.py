"""The grants' half of the catalog: one row for each (key, holder), revoked rows kept."""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any

from keyreeve_common.errors import FailedPrecondition, NotFound
from keyreeve_common.key_id import KeyId
from sqlalchemy import Connection, and_, insert, or_, select, update

from keyreeve_keyserver.catalog.records import GrantEntry, grant_entry, purposes_to_text, time_to_number
from keyreeve_keyserver.catalog.schema import grants
from keyreeve_keyserver.domain.policy import Grant


class GrantRows:
    """Mixed into Catalog, which gives the transactions."""

    def _read(self) -> AbstractContextManager[Connection]:
        raise NotImplementedError

    def _write(self) -> AbstractContextManager[tuple[Connection, int]]:
        raise NotImplementedError

    def put_grant(self, grant: Grant, *, keep_rate: bool = False) -> GrantEntry:
        """Makes the grant of (key, holder) or replaces it; with `keep_rate` a grant without a rate leaves the one that stands there."""
        values: dict[str, Any] = {
            "purposes": purposes_to_text(grant.purposes),
            "created_at": time_to_number(grant.created_at),
            "expires_at": None if grant.expires_at is None else time_to_number(grant.expires_at),
            "revoked_at": None,
        }
        if grant.rate is not None:
            values |= {"rate_per_second": grant.rate.per_second, "rate_burst": grant.rate.burst}
        elif not keep_rate:
            values |= {"rate_per_second": None, "rate_burst": None}
        with self._write() as (connection, seq):
            values["seq"] = seq
            where = _is(grant.key_id, grant.holder)
            row = connection.execute(update(grants).where(where).values(values).returning(grants)).one_or_none()
            if row is None:
                values |= {"key_id": grant.key_id, "holder": grant.holder}
                row = connection.execute(insert(grants).values(values).returning(grants)).one()
        return grant_entry(row)

    def extend_grant(self, key_id: KeyId, holder: str, *, expires_at: datetime, now: datetime) -> GrantEntry:
        """Raises: NotFound; FailedPrecondition when the grant is revoked or has expired."""
        with self._write() as (connection, seq):
            found = _one(connection, key_id, holder)
            if found.grant.revoked_at is not None:
                raise FailedPrecondition("the grant is revoked; create it again")
            if not found.grant.is_live(now):
                raise FailedPrecondition("the grant has expired; create it again")
            changed = update(grants).where(_is(key_id, holder)).values(expires_at=time_to_number(expires_at), seq=seq)
            return grant_entry(connection.execute(changed.returning(grants)).one())

    def revoke_grant(self, key_id: KeyId, holder: str, *, now: datetime) -> GrantEntry:
        """Revoking again changes nothing. Raises: NotFound."""
        with self._write() as (connection, seq):
            found = _one(connection, key_id, holder)
            if found.grant.revoked_at is not None:
                return found
            changed = update(grants).where(_is(key_id, holder)).values(revoked_at=time_to_number(now), seq=seq)
            return grant_entry(connection.execute(changed.returning(grants)).one())

    def list_grants(
        self, *, limit: int, after: tuple[str, str] = ("", ""), key_id: str = "", holder: str = ""
    ) -> list[GrantEntry]:
        """In the order of (key id, holder), beginning behind `after`."""
        behind = or_(grants.c.key_id > after[0], and_(grants.c.key_id == after[0], grants.c.holder > after[1]))
        query = select(grants).where(behind).order_by(grants.c.key_id, grants.c.holder).limit(limit)
        if key_id:
            query = query.where(grants.c.key_id == key_id)
        if holder:
            query = query.where(grants.c.holder == holder)
        with self._read() as connection:
            return [grant_entry(row) for row in connection.execute(query)]


def _is(key_id: str, holder: str) -> Any:
    return and_(grants.c.key_id == key_id, grants.c.holder == holder)


def _one(connection: Connection, key_id: KeyId, holder: str) -> GrantEntry:
    row = connection.execute(select(grants).where(_is(key_id, holder))).one_or_none()
    if row is None:
        raise NotFound("no such grant")
    return grant_entry(row)
