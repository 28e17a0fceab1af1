"""An audit log in memory: the port's promise without a disk. `fail` makes it unavailable."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from keyreeve_common.errors import AuditUnavailable
from keyreeve_common.transparency.records import AuditRecord, parse_record
from keyreeve_keyserver.audit.ports import AuditStatus


class MemoryAuditLog:
    enabled = True

    def __init__(self) -> None:
        self.records: list[AuditRecord] = []
        self.fail = False

    async def append(self, records: Sequence[AuditRecord]) -> None:
        if self.fail:
            raise AuditUnavailable("no space", retry_after=timedelta(seconds=1))
        self.records += [parse_record(record.to_bytes()) for record in records]

    def status(self) -> AuditStatus:
        return AuditStatus("unavailable" if self.fail else "ok", recorded=len(self.records))
