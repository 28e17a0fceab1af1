"""The journal's form: records on their way into the log, in groups that are written at once and count whole or not at all.

A group is `KRAJ` `u64 first_index` `u32 count` `u32 length` `seal (32)` `u32 crc32`, then `length` bytes: each record behind its length in two
bytes, as in an entry bundle. The checksum (that of zlib) covers the header's fields before it and the records. It finds what a crash tore. The
seal is an HMAC of the signer's over the first four fields and the records: it finds what an attacker wrote before the signer takes it into the
tree. A reader has no key for it, and holds the records against the tree instead.
Spec: docs/protocol/audit-log.md "Journal".
"""

from __future__ import annotations

import hmac
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from keyreeve_common.errors import InvalidRequest
from keyreeve_common.transparency.tiles import join_entries, split_entries

MAGIC = b"KRAJ"
SEAL_BYTES = 32
_HEADER = struct.Struct(">4sQII32sI")
_FIELDS = struct.Struct(">4sQII")
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True, slots=True)
class JournalContent:
    """What a journal holds: `entries` from index `first` on, in `good` bytes; what follows those was torn.

    `unsealed` is the index of the first record of a group whose seal is not the signer's, None where all are or nobody looked.
    """

    first: int
    entries: list[bytes]
    good: int
    unsealed: int | None = None


def build_group(first: int, entries: Sequence[bytes], seal: Callable[[bytes], bytes]) -> bytes:
    """`seal` gives the 32 bytes for what it covers."""
    body = join_entries(entries)
    fields = _FIELDS.pack(MAGIC, first, len(entries), len(body))
    sealed = fields + seal(fields + body)
    return sealed + zlib.crc32(body, zlib.crc32(sealed)).to_bytes(4, "big") + body


def read_groups(data: bytes, first: int, seal: Callable[[bytes], bytes] | None = None) -> JournalContent:
    """The whole groups of a journal that begins with record `first`. With `seal` that of each is looked at."""
    entries: list[bytes] = []
    at, unsealed = 0, None
    while group := _read_group(data, at, first + len(entries)):
        start = at + HEADER_BYTES
        covered = data[at : at + _FIELDS.size] + data[start : group[1]]
        if seal is not None and unsealed is None:
            given = data[at + _FIELDS.size : at + _FIELDS.size + SEAL_BYTES]
            unsealed = None if hmac.compare_digest(seal(covered), given) else first + len(entries)
        entries += group[0]
        at = group[1]
    return JournalContent(first, entries, at, unsealed)


def _read_group(data: bytes, at: int, first: int) -> tuple[list[bytes], int] | None:
    """The records of the group at `at` and where it ends; None where no whole group of this index stands."""
    start = at + HEADER_BYTES
    if start > len(data):
        return None
    magic, index, count, length, _, checksum = _HEADER.unpack_from(data, at)
    body = data[start : start + length]
    if magic != MAGIC or index != first or len(body) != length:
        return None
    if zlib.crc32(body, zlib.crc32(data[at : at + _FIELDS.size + SEAL_BYTES])) != checksum:
        return None
    try:
        entries = split_entries(body)
    except InvalidRequest:
        return None
    return (entries, start + length) if len(entries) == count > 0 else None
