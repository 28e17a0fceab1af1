"""The journal's form: records on their way into the log, in groups that are written at once and count whole or not at all.

A group is `KRAJ` `u64 first_index` `u32 count` `u32 length` `u32 crc32`, then `length` bytes: each record behind its length in two bytes, as in
an entry bundle. The checksum (that of zlib) covers the header's fields before it and the records. It finds what a crash tore, not what an
attacker changed: that is the work of the tree.
Spec: docs/protocol/audit-log.md "Journal".
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from keyreeve_common.errors import InvalidRequest
from keyreeve_common.transparency.tiles import join_entries, split_entries

MAGIC = b"KRAJ"
_HEADER = struct.Struct(">4sQIII")
_FIELDS = struct.Struct(">4sQII")
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True, slots=True)
class JournalContent:
    """What a journal holds: `entries` from index `first` on, in `good` bytes; what follows those was torn."""

    first: int
    entries: list[bytes]
    good: int


def build_group(first: int, entries: Sequence[bytes]) -> bytes:
    body = join_entries(entries)
    fields = _FIELDS.pack(MAGIC, first, len(entries), len(body))
    return fields + zlib.crc32(body, zlib.crc32(fields)).to_bytes(4, "big") + body


def read_groups(data: bytes, first: int) -> JournalContent:
    """The whole groups of a journal that begins with record `first`."""
    entries: list[bytes] = []
    at = 0
    while group := _read_group(data, at, first + len(entries)):
        entries += group[0]
        at = group[1]
    return JournalContent(first, entries, at)


def _read_group(data: bytes, at: int, first: int) -> tuple[list[bytes], int] | None:
    """The records of the group at `at` and where it ends; None where no whole group of this index stands."""
    start = at + HEADER_BYTES
    if start > len(data):
        return None
    magic, index, count, length, checksum = _HEADER.unpack_from(data, at)
    body = data[start : start + length]
    if magic != MAGIC or index != first or len(body) != length:
        return None
    if zlib.crc32(body, zlib.crc32(data[at : at + _FIELDS.size])) != checksum:
        return None
    try:
        entries = split_entries(body)
    except InvalidRequest:
        return None
    return (entries, start + length) if len(entries) == count > 0 else None
