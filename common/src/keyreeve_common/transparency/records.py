"""What the audit log holds: one record for each signature, refusal, and change of a key or grant.

A record has exactly one encoding, and the parser takes no other. It holds hashes, never a message, a signature or a secret. Names of events and
numbers of errors and purposes that this program does not know are read all the same: a reader may be older than the writer.
Spec: docs/protocol/audit-log.md "Record".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum, IntFlag, StrEnum
from functools import lru_cache
from itertools import starmap
from typing import Final

from keyreeve_common.errors import CODE_BY_WIRE, InvalidRequest, MalformedFrame
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.wire import Reader, ascii_text, bytes8, bytes16, u16

VERSION: Final = 1
REQUEST_ID_BYTES: Final = 16
NO_REQUEST_ID: Final = bytes(REQUEST_ID_BYTES)
HASH_BYTES: Final = 32
MAX_CALLER_BYTES = 2_048
MAX_DETAILS = 16
MAX_DETAIL_BYTES = 2_048
MAX_RECORD_BYTES = 16_384
_MOST_USES = 16_384  # whose parts of a record are remembered
_HASH_LENGTH = bytes((HASH_BYTES,))
_NO_DETAILS = b"\x00"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}", re.ASCII)
_KEY_ID = re.compile(r"[a-z0-9-]{1,64}", re.ASCII)
_TEXT = re.compile(r"[ -~]*", re.ASCII)
_OF_AUTHORITIES = frozenset({Purpose.X509_CERTIFICATE, Purpose.X509_CRL, Purpose.OCSP_RESPONSE, Purpose.JWT_SVID})


class Source(IntEnum):
    """Who saw what the record says. Whoever owns the front end can invent records of FRONT_END, and none of SIGNER."""

    SIGNER = 1
    FRONT_END = 2

    @property
    def label(self) -> str:
        return self.name.lower()


class Event(StrEnum):
    """The events of this program. Others may stand in a log: the form takes any name of this kind."""

    SIGNATURE = "signature"
    REFUSAL = "refusal"
    KEY_CREATED = "key_created"
    KEY_ENABLED = "key_enabled"
    KEY_DISABLED = "key_disabled"
    KEY_DESTROY_REQUESTED = "key_destroy_requested"
    KEY_DESTROYED = "key_destroyed"
    GRANT_CREATED = "grant_created"
    GRANT_EXTENDED = "grant_extended"
    GRANT_REVOKED = "grant_revoked"
    CALL_REFUSED = "call_refused"
    RECORDS_DROPPED = "records_dropped"
    LOG_STARTED = "log_started"
    LOG_REPAIRED = "log_repaired"


class Mark(IntFlag):
    """What an auditor looks at first."""

    DIGEST = 1  # a digest was signed: nobody knows what of
    AUTHORITY = 2  # an authority's key or purpose


def marks_of(purpose: int, *, authority_key: bool = False) -> Mark:
    marks = Mark.AUTHORITY if authority_key else Mark(0)
    if purpose == Purpose.DIGEST:
        return marks | Mark.DIGEST
    return marks | Mark.AUTHORITY if purpose in _OF_AUTHORITIES else marks


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """`time_us` is microseconds since 1970 in UTC. Empty text, zero and empty hashes mean that there is none.

    `code` is 0 for success, else the wire number of the error. `details` are names and printable ASCII values, sorted by name.
    """

    time_us: int
    source: Source
    event: str
    request_id: bytes = NO_REQUEST_ID
    caller: str = ""
    key_id: str = ""
    purpose: int = 0
    scheme: int = 0
    code: int = 0
    marks: Mark = Mark(0)  # noqa: RUF009 - immutable
    message_hash: bytes = b""
    signature_hash: bytes = b""
    details: tuple[tuple[str, str], ...] = ()

    def to_bytes(self) -> bytes:
        """Nothing is checked here: what builds records holds to the form, and what reads them refuses any other."""
        return b"".join((
            b"\x01",
            self.time_us.to_bytes(8, "big"),
            bytes((self.source, self.marks)),
            bytes8(self.event.encode()),
            self.request_id,
            bytes16(self.caller.encode()),
            bytes8(self.key_id.encode()),
            bytes((self.purpose,)),
            u16(self.scheme),
            bytes((self.code,)),
            bytes8(self.message_hash),
            bytes8(self.signature_hash),
            bytes((len(self.details),)),
            *(bytes8(name.encode()) + bytes16(value.encode()) for name, value in self.details),
        ))  # fmt: skip

    @property
    def time(self) -> datetime:
        return _EPOCH + timedelta(microseconds=self.time_us)

    @property
    def result(self) -> str:
        """`ok`, or the name of the error; its number where this program has no name for it."""
        if self.code == 0:
            return "ok"
        known = CODE_BY_WIRE.get(self.code)
        return known.value if known else str(self.code)

    @property
    def purpose_label(self) -> str:
        if self.purpose == 0:
            return ""
        return Purpose(self.purpose).label if self.purpose in set(Purpose) else str(self.purpose)

    @property
    def scheme_label(self) -> str:
        if self.scheme == 0:
            return ""
        known = self.scheme in set(SignatureScheme)
        return SignatureScheme(self.scheme).name.lower() if known else f"0x{self.scheme:04x}"


def signature_entries(
    time_us: int,
    uses: Iterable[tuple[str, str, int, int, bool]],
    *,
    request_ids: Iterable[bytes],
    message_hashes: Iterable[bytes],
    signature_hashes: Iterable[bytes],
) -> list[bytes]:
    """The encodings of the signer's records of signatures made, as AuditRecord gives them, at a tenth of the cost: one for each of `uses`, which
    are caller, key id, purpose, scheme and whether the key is an authority's. Hashes are of SHA-256.
    """
    start = bytes((VERSION,)) + time_us.to_bytes(8, "big")
    columns = zip(starmap(_signature_parts, uses), request_ids, message_hashes, signature_hashes, strict=True)
    return [
        b"".join((start, head, request_id, middle, message_hash, _HASH_LENGTH, signature_hash, _NO_DETAILS))
        for (head, middle), request_id, message_hash, signature_hash in columns
    ]


@lru_cache(_MOST_USES)
def _signature_parts(caller: str, key_id: str, purpose: int, scheme: int, authority_key: bool) -> tuple[bytes, bytes]:
    """What stands between time and request id, and between request id and message hash."""
    marks = marks_of(purpose, authority_key=authority_key)
    head = bytes((Source.SIGNER, marks)) + bytes8(Event.SIGNATURE.value.encode())
    use = bytes((purpose,)) + u16(scheme) + b"\x00"
    return head, bytes16(caller.encode()) + bytes8(key_id.encode()) + use + _HASH_LENGTH


def microseconds(when: datetime) -> int:
    """Since 1970, of an aware time."""
    return (when - _EPOCH) // _MICROSECOND


def parse_record(data: bytes) -> AuditRecord:
    """Raises: InvalidRequest for all but the one encoding of a record."""
    if len(data) > MAX_RECORD_BYTES:
        raise InvalidRequest(f"record has over {MAX_RECORD_BYTES} bytes")
    try:
        record = _read(Reader(data))
    except MalformedFrame as error:
        raise InvalidRequest(f"record: {error.detail}") from None
    return check_record(record)


def _read(reader: Reader) -> AuditRecord:
    if (version := reader.u8("version")) != VERSION:
        raise MalformedFrame(f"version is {version}, this program reads {VERSION}")
    time_us = reader.u32("time") << 32 | reader.u32("time")
    source, marks = reader.u8("source"), reader.u8("marks")
    if source not in set(Source) or marks & ~(Mark.DIGEST | Mark.AUTHORITY):
        raise MalformedFrame("source or marks are not known")
    record = AuditRecord(
        time_us=time_us,
        source=Source(source),
        marks=Mark(marks),
        event=ascii_text(reader.bytes8("event"), "event"),
        request_id=reader.take(REQUEST_ID_BYTES, "request_id"),
        caller=ascii_text(reader.bytes16("caller"), "caller"),
        key_id=ascii_text(reader.bytes8("key_id"), "key_id"),
        purpose=reader.u8("purpose"),
        scheme=reader.u16("scheme"),
        code=reader.u8("code"),
        message_hash=reader.bytes8("message_hash"),
        signature_hash=reader.bytes8("signature_hash"),
        details=tuple(
            (ascii_text(reader.bytes8("name"), "name"), ascii_text(reader.bytes16("value"), "value"))
            for _ in range(reader.u8("details"))
        ),
    )
    reader.finish()
    return record


def check_record(record: AuditRecord) -> AuditRecord:
    """The record, if it keeps the bounds of the form. Raises: InvalidRequest."""
    names = [name for name, _ in record.details]
    rules = {
        "time": 0 <= record.time_us <= 253_402_300_799_999_999,  # the end of year 9999
        "event": _NAME.fullmatch(record.event) is not None,
        "request_id": len(record.request_id) == REQUEST_ID_BYTES,
        "caller": len(record.caller) <= MAX_CALLER_BYTES and _TEXT.fullmatch(record.caller) is not None,
        "key_id": not record.key_id or _KEY_ID.fullmatch(record.key_id) is not None,
        "purpose": 0 <= record.purpose <= 0xFF,
        "scheme": 0 <= record.scheme <= 0xFFFF,
        "code": 0 <= record.code <= 0xFF,
        "message_hash": len(record.message_hash) in {0, HASH_BYTES},
        "signature_hash": len(record.signature_hash) in {0, HASH_BYTES},
        "details": len(names) <= MAX_DETAILS and names == sorted(set(names)) and all(map(_is_detail, record.details)),
    }
    if wrong := [name for name, kept in rules.items() if not kept]:
        raise InvalidRequest(f"record: {', '.join(wrong)} out of bounds")
    return record


def _is_detail(detail: tuple[str, str]) -> bool:
    name, value = detail
    return _NAME.fullmatch(name) is not None and len(value) <= MAX_DETAIL_BYTES and _TEXT.fullmatch(value) is not None
