"""What becomes of a key, in the catalog: disabled by the cluster itself, scheduled for destruction, destroyed, rotated.

Each change is one conditional UPDATE, so that of several replicas over one catalog exactly one makes it. Times are the database's own where it
has a clock (PostgreSQL): a replica whose clock is wrong ends nothing early.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from keyreeve_common.key_id import KeyId
from sqlalchemy import Connection, and_, update

from keyreeve_keyserver.catalog.records import KeyEntry, key_entry
from keyreeve_keyserver.catalog.schema import keys
from keyreeve_keyserver.domain.keys import KeyState

# Not the sealed record and the permit: whoever looks at keys has no use for them.
_COLUMNS = [column for column in keys.columns if column.name not in ("sealed_record", "destruction_permit")]
IS_PENDING = and_(keys.c.state == KeyState.DISABLED.value, keys.c.destroy_at.is_not(None))


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
                .values(state=KeyState.DISABLED.value, state_reason=reason, seq=seq)
                .returning(*_COLUMNS)
            ).one_or_none()
        return None if row is None else key_entry(row)
