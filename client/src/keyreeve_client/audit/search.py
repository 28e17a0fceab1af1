"""Search: the records of a log that an auditor asks for. It trusts what it reads: `keyreeve audit verify` is what proves it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from keyreeve_common.errors import InvalidRequest, KeyreeveError
from keyreeve_common.transparency.checkpoint import parse_checkpoint_text
from keyreeve_common.transparency.journal import JournalContent
from keyreeve_common.transparency.note import parse_note
from keyreeve_common.transparency.records import AuditRecord, Mark, Source, parse_record
from keyreeve_common.transparency.tiles import ENTRIES, TILE_WIDTH, tiles_of_level

from keyreeve_client.audit.log_directory import LogDirectory

MAX_GAPS = 1_000


@dataclass(frozen=True, slots=True)
class FoundRecord:
    """`published`: it stands in a bundle that a checkpoint covers, not in the journal alone."""

    index: int
    record: AuditRecord
    published: bool


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A place where records should be and none could be read."""

    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Every criterion that is given must be met. `caller` may end in '*'."""

    key_id: str | None = None
    caller: str | None = None
    purpose: str | None = None
    event: str | None = None
    result: str | None = None
    request_id: bytes | None = None
    source: Source | None = None
    mark: Mark | None = None
    since: datetime | None = None
    until: datetime | None = None

    def matches(self, record: AuditRecord) -> bool:
        return (
            self.key_id in {None, record.key_id}
            and self.purpose in {None, record.purpose_label}
            and self.event in {None, record.event}
            and self.result in {None, record.result}
            and self.request_id in {None, record.request_id}
            and self.source in {None, record.source}
            and (self.mark is None or bool(record.marks & self.mark))
            and (self.since is None or record.time >= self.since)
            and (self.until is None or record.time < self.until)
            and (self.caller is None or _matches_caller(record.caller, self.caller))
        )


def search_log(log: LogDirectory, query: Query) -> Iterator[FoundRecord | Unreadable]:
    """The records that match, oldest first, those too that no checkpoint covers yet. Raises: NotFound, InvalidRequest: there is no log."""
    journal = log.journal()  # before the checkpoint, which then covers all records that this journal does not hold
    size = parse_checkpoint_text(parse_note(log.read("checkpoint")).text).size
    for found in _all_records(log, size, journal[0] if journal is not None else None):
        if isinstance(found, Unreadable) or query.matches(found.record):
            yield found


def _all_records(log: LogDirectory, size: int, journal: JournalContent | None) -> Iterator[FoundRecord | Unreadable]:
    gaps = 0
    for bundle in tiles_of_level(ENTRIES, size):
        first = bundle.index * TILE_WIDTH
        try:
            entries = log.entries(bundle)
        except KeyreeveError as error:
            yield Unreadable(f"records {first} to {first + bundle.width - 1}: {error.detail}")
            gaps += 1
            if gaps >= MAX_GAPS:
                yield Unreadable(f"records after {first + bundle.width - 1}: not looked for, since so many are missing")
                return
            continue
        for offset, entry in enumerate(entries):
            yield _parsed(first + offset, entry, published=True)
    if journal is not None:
        for index in range(size, journal.first + len(journal.entries)):
            yield _parsed(index, journal.entries[index - journal.first], published=False)


def _parsed(index: int, entry: bytes, *, published: bool) -> FoundRecord | Unreadable:
    try:
        return FoundRecord(index, parse_record(entry), published)
    except InvalidRequest as error:
        return Unreadable(f"record {index}: {error.detail}")


def _matches_caller(caller: str, asked: str) -> bool:
    return caller.startswith(asked[:-1]) if asked.endswith("*") else caller == asked
