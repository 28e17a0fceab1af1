"""The store as one object; it is the port `keyreeve_ca.ports.Store`."""

from __future__ import annotations

from datetime import timedelta

from keyreeve_ca.store.agent_views import AgentViews
from keyreeve_ca.store.change_log import ChangeLog
from keyreeve_ca.store.engine import BUSY_TIMEOUT, has_schema, migrate, open_engine
from keyreeve_ca.store.entry_records import EntryRecords
from keyreeve_ca.store.issuance_records import IssuanceRecords
from keyreeve_ca.store.node_records import NodeRecords


class SqlStore(EntryRecords, NodeRecords, IssuanceRecords, AgentViews, ChangeLog):
    """Safe to share among threads."""

    @classmethod
    def open(cls, url: str, *, busy_timeout: timedelta = BUSY_TIMEOUT) -> SqlStore:
        """Raises: ConfigInvalid. Connects at the first use."""
        return cls(open_engine(url, busy_timeout=busy_timeout))

    def migrate(self) -> None:
        """Brings the schema to this version; changes nothing where it is there."""
        migrate(self.engine)

    def has_schema(self) -> bool:
        return has_schema(self.engine)

    def close(self) -> None:
        self.engine.dispose()
