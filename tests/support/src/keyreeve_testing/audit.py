"""Audit logs under test: one in memory, and real ones on disk."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

from keyreeve_common.errors import AuditUnavailable
from keyreeve_common.transparency.records import AuditRecord, Source, parse_record
from keyreeve_keyserver.audit.config import AuditConfig
from keyreeve_keyserver.audit.file_log import FileAuditLog
from keyreeve_keyserver.audit.ports import AuditStatus
from keyreeve_keyserver.domain.secret import Secret
from keyreeve_keyserver.signer.sealing import PassphraseKey


class MemoryAuditLog:
    """The port's promise without a disk. `fail` makes it unavailable."""

    enabled = True

    def __init__(self) -> None:
        self.records: list[AuditRecord] = []
        self.fail = False

    async def start(self) -> None:
        return

    async def append(self, entries: Sequence[bytes]) -> None:
        if self.fail:
            raise AuditUnavailable("no space", retry_after=timedelta(seconds=1))
        self.records += [parse_record(entry) for entry in entries]

    def status(self) -> AuditStatus:
        return AuditStatus("unavailable" if self.fail else "ok", recorded=len(self.records))

    async def close(self) -> None:
        return


def audit_entry(number: int) -> bytes:
    return audit_record(number).to_bytes()


def audit_record(number: int, **changes: Any) -> AuditRecord:
    """One that differs from those of other numbers."""
    fields: dict[str, Any] = {
        "time_us": 1_700_000_000_000_000 + number,
        "source": Source.SIGNER,
        "event": "signature",
        "request_id": number.to_bytes(16, "big"),
        "caller": "spiffe://example.org/agent/a",
        "key_id": f"key-{number % 7}",
        "purpose": 1,
        "scheme": 0x0403,
        "message_hash": sha256(str(number).encode()).digest(),
        "signature_hash": bytes(32),
        **changes,
    }
    return AuditRecord(**fields)


@asynccontextmanager
async def open_audit_log(directory: Path, *, kek: bytes = bytes(32), **changes: Any) -> AsyncIterator[FileAuditLog]:
    """A real log that publishes when it is closed, unless told otherwise."""
    config = AuditConfig(
        directory, **{"origin": "example.org/audit", "checkpoint_interval": timedelta(hours=1), **changes}
    )
    log = FileAuditLog(config, PassphraseKey(Secret(kek)), now=lambda: datetime(2026, 1, 1, tzinfo=UTC))
    try:
        await log.start()
        yield log
    finally:
        await log.close()


async def write_audit_log(directory: Path, count: int, *, first: int = 0, **changes: Any) -> None:
    """Opens a log, appends so many records, closes it."""
    async with open_audit_log(directory, **changes) as log:
        await log.append([audit_entry(number) for number in range(first, first + count)])


def journal_path(directory: Path) -> Path:
    """The journal of a log."""
    return max(path for path in (directory / "journal").iterdir() if path.name.isdigit())
