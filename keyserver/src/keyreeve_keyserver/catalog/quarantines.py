"""The quarantines' part of the catalog: one row for each holder that ever had one, the newest; lifted rows are kept."""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any

from keyreeve_common.errors import NotFound
from sqlalchemy import Connection, Row, insert, select, update

from keyreeve_keyserver.catalog.records import QuarantineEntry, time_from_number, time_to_number
from keyreeve_keyserver.catalog.schema import quarantines
from keyreeve_keyserver.domain.quarantine import Cause, Quarantine


class QuarantineRows:
    """Mixed into Catalog, which gives the transactions."""

    def _read(self) -> AbstractContextManager[Connection]:
        raise NotImplementedError

    def _write(self) -> AbstractContextManager[tuple[Connection, int]]:
        raise NotImplementedError

    def put_quarantine(self, new: Quarantine) -> QuarantineEntry:
        """The holder's quarantine from now on: `new`, or the one that holds already when `new` is not an operator's."""
        values: dict[str, Any] = {
            "cause": new.cause.value,
            "reason": new.reason,
            "set_by": new.set_by,
            "since": time_to_number(new.since),
            "until": None if new.until is None else time_to_number(new.until),
            "lifted_at": None,
        }
        where = quarantines.c.holder == new.holder
        with self._write() as (connection, seq):
            found = connection.execute(select(quarantines).where(where)).one_or_none()
            if found is None:
                values |= {"holder": new.holder, "seq": seq}
                row = connection.execute(insert(quarantines).values(values).returning(quarantines)).one()
                return quarantine_entry(row)
            known = quarantine_entry(found)
            if new.cause is not Cause.OPERATOR and known.quarantine.holds(new.since):
                return known
            changed = update(quarantines).where(where).values(**values, seq=seq)
            return quarantine_entry(connection.execute(changed.returning(quarantines)).one())

    def lift_quarantine(self, holder: str, *, now: datetime) -> QuarantineEntry:
        """Lifting one that ended changes nothing. Raises: NotFound."""
        where = quarantines.c.holder == holder
        with self._write() as (connection, seq):
            found = connection.execute(select(quarantines).where(where)).one_or_none()
            if found is None:
                raise NotFound("this holder was never in quarantine")
            known = quarantine_entry(found)
            if not known.quarantine.holds(now):
                return known
            changed = update(quarantines).where(where).values(lifted_at=time_to_number(now), seq=seq)
            return quarantine_entry(connection.execute(changed.returning(quarantines)).one())

    def list_quarantines(
        self, *, limit: int, after: str = "", holding_at: datetime | None = None
    ) -> list[QuarantineEntry]:
        """In the order of holders, beginning behind `after`; all, or only those that hold at a time."""
        query = select(quarantines).where(quarantines.c.holder > after).order_by(quarantines.c.holder).limit(limit)
        if holding_at is not None:
            number = time_to_number(holding_at)
            until = quarantines.c.until
            query = query.where(quarantines.c.lifted_at.is_(None), until.is_(None) | (until > number))
        with self._read() as connection:
            return [quarantine_entry(row) for row in connection.execute(query)]


def quarantine_entry(row: Row[Any]) -> QuarantineEntry:
    quarantine = Quarantine(
        holder=row.holder,
        cause=Cause(row.cause),
        reason=row.reason,
        set_by=row.set_by,
        since=time_from_number(row.since),
        until=None if row.until is None else time_from_number(row.until),
        lifted_at=None if row.lifted_at is None else time_from_number(row.lifted_at),
    )
    return QuarantineEntry(quarantine, row.seq)
