"""Frames between the front end and the signer (docs/protocol/signer-frames.md). Pure; both ends use this module.

A frame that parses keeps every bound of the page, and a binary frame has exactly one encoding. What a message is worth is not decided here:
the signer parses it against its purpose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from keyreeve_common.errors import InvalidRequest, KeyreeveError, MalformedFrame, error_from_wire
from keyreeve_common.identity import MAX_ID_BYTES, SpiffeId
from keyreeve_common.sign_batch import (
    MAX_ITEMS,
    MAX_SIGNATURE_BYTES,
    NO_TRACE,
    PackedItems,
    PackedResults,
    Refused,
    Signed,
    SignItem,
    SignResult,
    error_bytes,
    pack_items,
    pack_results,
    pack_signatures,
    read_detail,
    read_error,
    read_items,
    scan_results,
)
from keyreeve_common.strict_json import parse_strict_json
from keyreeve_common.trace import TRACE_BYTES
from keyreeve_common.wire import FrameSplitter, Reader, ascii_text, bytes16, bytes32, u16, u32

# Items and results are common's, since agents build and read them too.
__all__ = [
    "MAX_ITEMS",
    "MAX_SIGNATURE_BYTES",
    "NO_TRACE",
    "PackedItems",
    "PackedResults",
    "Refused",
    "SignItem",
    "SignResult",
    "Signed",
]
VERSION = 2
MIN_FRAME_BYTES = 2
MAX_FRAME_BYTES = 8_388_608
MAX_CONTROL_BYTES = 1_048_576
LOCAL_CALLER: Final = "local"
SIGN_BATCH, SIGN_RESULTS, SPANS = 0x10, 0x90, 0x91
CONTROL, CONTROL_OK, CONTROL_REFUSED, MALFORMED = 0x20, 0xA0, 0xAF, 0x8F
_OP = re.compile(r"[a-z_]{1,32}", re.ASCII)
_SPAN_NAME = re.compile(r"[a-z0-9_.]{1,32}", re.ASCII)
MAX_SPAN_DETAIL = 64
_MOST_CALLERS = 1_024
JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SignBatch:
    """`caller` is a SPIFFE ID or `local`. A batch that would pass MAX_FRAME_BYTES is to be cut by its sender."""

    batch_id: int
    caller: str
    items: Sequence[SignItem]

    def to_bytes(self) -> bytes:
        """Raises: InvalidRequest when the batch is empty, or does not fit in one frame."""
        _require_count(len(self.items))
        data = self.items.data if isinstance(self.items, PackedItems) else pack_items(self.items)
        head = u32(self.batch_id) + bytes16(self.caller.encode()) + u16(len(self.items))
        return _frame(SIGN_BATCH, head + data)


def signed_results(ids: list[int], signatures: Sequence[bytes]) -> PackedResults:
    """A signature for each of these items, in order."""
    return PackedResults(pack_signatures(ids, signatures), ids, all_signed=True)


@dataclass(frozen=True, slots=True)
class SignResults:
    """Some of the results of one batch: a batch may be answered by several of these, in any order."""

    batch_id: int
    results: Sequence[SignResult]

    def to_bytes(self) -> bytes:
        _require_count(len(self.results))
        return _frame(SIGN_RESULTS, u32(self.batch_id) + u16(len(self.results)) + _packed(self.results))


@dataclass(frozen=True, slots=True)
class Span:
    """One step of a request that is traced. `trace` is the item's; times are Unix microseconds; `name` is of a-z, 0-9, '_' and '.'."""

    trace: bytes = field(repr=False)
    name: str
    start_us: int
    end_us: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Spans:
    """What the signer measured for items whose context asks for it; it comes before their results, and is never needed for them."""

    spans: tuple[Span, ...]

    def to_bytes(self) -> bytes:
        rows = [[span.trace.hex(), span.name, span.start_us, span.end_us, span.detail] for span in self.spans]
        return _frame(SPANS, bytes32(_json_bytes({"spans": rows})))


@dataclass(frozen=True, slots=True)
class Control:
    """One control operation. `arguments` are the members of the JSON object other than `op`."""

    request_id: int
    op: str
    arguments: JsonObject = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        return _frame(CONTROL, u32(self.request_id) + bytes32(_json_bytes({**self.arguments, "op": self.op})))


@dataclass(frozen=True, slots=True)
class ControlOk:
    request_id: int
    answer: JsonObject

    def to_bytes(self) -> bytes:
        return _frame(CONTROL_OK, u32(self.request_id) + bytes32(_json_bytes(self.answer)))


@dataclass(frozen=True, slots=True)
class ControlRefused:
    request_id: int
    error: KeyreeveError

    def to_bytes(self) -> bytes:
        return _frame(CONTROL_REFUSED, u32(self.request_id) + error_bytes(self.error))


@dataclass(frozen=True, slots=True)
class Malformed:
    """The last frame before the signer closes the connection: the peer broke a rule of the page."""

    error: KeyreeveError

    def to_bytes(self) -> bytes:
        return _frame(MALFORMED, bytes((self.error.rendering.wire,)) + bytes16(self.error.detail.encode()))


RequestFrame = SignBatch | Control
AnswerFrame = SignResults | Spans | ControlOk | ControlRefused | Malformed


def splitter() -> FrameSplitter:
    return FrameSplitter(low=MIN_FRAME_BYTES, high=MAX_FRAME_BYTES)


def parse_request_frame(frame: bytes) -> RequestFrame:
    """A frame (without its length) that the front end sent. Raises: MalformedFrame."""
    reader, kind = _open(frame)
    if kind == SIGN_BATCH:
        return _read_batch(reader)
    if kind == CONTROL:
        request_id, value = reader.u32("request_id"), _read_json(reader)
        op = value.pop("op", None)
        if not isinstance(op, str) or _OP.fullmatch(op) is None:
            raise MalformedFrame("control has no `op` of 1 to 32 of a-z and '_'")
        return Control(request_id, op, value)
    raise MalformedFrame(f"frame type 0x{kind:02x} is not one that the front end sends")


def parse_answer_frame(frame: bytes) -> AnswerFrame:
    """A frame (without its length) that the signer sent. Raises: MalformedFrame."""
    reader, kind = _open(frame)
    if kind == SIGN_RESULTS:
        batch_id, count = reader.u32("batch_id"), _read_count(reader)
        return SignResults(batch_id, scan_results(reader.rest(), count))
    if kind == SPANS:
        return _read_spans(_read_json(reader))
    if kind == CONTROL_OK:
        return ControlOk(reader.u32("request_id"), _read_json(reader))
    if kind == CONTROL_REFUSED:
        request_id = reader.u32("request_id")
        refused = ControlRefused(request_id, read_error(reader, _read_code(reader)))
        reader.finish()
        return refused
    if kind == MALFORMED:
        malformed = Malformed(error_from_wire(_read_code(reader), read_detail(reader)))
        reader.finish()
        return malformed
    raise MalformedFrame(f"frame type 0x{kind:02x} is not one that the signer sends")


def _open(frame: bytes) -> tuple[Reader, int]:
    reader = Reader(frame)
    version = reader.u8("version")
    if version != VERSION:
        raise MalformedFrame(f"frame is of version {version}, this program knows version {VERSION}")
    return reader, reader.u8("type")


def _read_batch(reader: Reader) -> SignBatch:
    batch_id = reader.u32("batch_id")
    caller = _read_caller(reader.bytes16("caller", low=1, high=MAX_ID_BYTES))
    count = _read_count(reader)
    items = read_items(reader.rest(), count)
    if len({item.id for item in items}) != len(items):
        raise MalformedFrame("two items of one batch have the same id")
    return SignBatch(batch_id, caller, items)


@lru_cache(_MOST_CALLERS)
def _read_caller(name: bytes) -> str:
    """Raises: MalformedFrame."""
    caller = ascii_text(name, "caller")
    _check_caller(caller)
    return caller


def _check_caller(caller: str) -> None:
    if caller == LOCAL_CALLER:
        return
    try:
        SpiffeId.parse(caller)
    except InvalidRequest as error:
        raise MalformedFrame(f"caller: {error.detail}") from None


def _read_spans(value: JsonObject) -> Spans:
    try:
        rows = value.pop("spans")
        good = not value and all(map(_is_span, rows))
        spans = tuple(Span(bytes.fromhex(row[0]), *row[1:]) for row in rows) if good else ()
        good = good and all(len(span.trace) == TRACE_BYTES for span in spans)
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise MalformedFrame("spans are not [trace, name, start, end, detail]")
    return Spans(spans)


def _is_span(row: Any) -> bool:
    _, name, start, end, detail = row
    times = type(start) is int and type(end) is int and 0 <= start <= end < 2**53
    texts = isinstance(name, str) and isinstance(detail, str) and len(detail) <= MAX_SPAN_DETAIL
    return times and texts and _SPAN_NAME.fullmatch(name) is not None


def _read_count(reader: Reader) -> int:
    count = reader.u16("count")
    if not 1 <= count <= MAX_ITEMS:
        raise MalformedFrame(f"count is {count}, allowed are 1 to {MAX_ITEMS}")
    return count


def _read_code(reader: Reader) -> int:
    code = reader.u8("code")
    if code == 0:
        raise MalformedFrame("an error has the code 0")
    return code


def _read_json(reader: Reader) -> JsonObject:
    value = parse_json_object(reader.bytes32("json", high=MAX_CONTROL_BYTES))
    reader.finish()
    return value


def parse_json_object(data: bytes) -> JsonObject:
    """One JSON object in UTF-8: no name twice, no fractions, no lone surrogates. Raises: MalformedFrame."""
    try:
        value = parse_strict_json(data)
    except ValueError:
        raise MalformedFrame("json is not one object in UTF-8 with whole numbers and distinct names") from None
    if not isinstance(value, dict):
        raise MalformedFrame("json is not an object")
    return value


def _json_bytes(value: JsonObject) -> bytes:
    data = json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
    if len(data) > MAX_CONTROL_BYTES:
        raise InvalidRequest(f"control object has {len(data)} bytes, at most {MAX_CONTROL_BYTES} are allowed")
    return data


def _packed(results: Sequence[SignResult]) -> bytes:
    return results.data if isinstance(results, PackedResults) else pack_results(results)


def _require_count(count: int) -> None:
    if not 1 <= count <= MAX_ITEMS:
        raise InvalidRequest(f"a frame holds 1 to {MAX_ITEMS} items, not {count}")


def _frame(kind: int, body: bytes) -> bytes:
    length = len(body) + 2
    if length > MAX_FRAME_BYTES:
        raise InvalidRequest(f"frame of {length} bytes, at most {MAX_FRAME_BYTES} are allowed")
    return u32(length) + bytes((VERSION, kind)) + body
