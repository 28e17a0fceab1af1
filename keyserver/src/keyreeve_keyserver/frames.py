"""Frames between the front end and the signer (docs/protocol/signer-frames.md). Pure; both ends use this module.

A frame that parses keeps every bound of the page, and a binary frame has exactly one encoding. What a message is worth is not decided here:
the signer parses it against its purpose.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

from keyreeve_common.errors import MAX_DETAIL_BYTES, InvalidRequest, KeyreeveError, MalformedFrame, error_from_wire
from keyreeve_common.identity import MAX_ID_BYTES, SpiffeId
from keyreeve_common.key_id import MAX_KEY_ID_BYTES, KeyId, parse_key_id
from keyreeve_common.purposes import MAX_MESSAGE_BYTES
from keyreeve_common.strict_json import parse_strict_json
from keyreeve_common.trace import TRACE_BYTES
from keyreeve_common.wire import FrameSplitter, Reader, ascii_text, bytes8, bytes16, bytes32, u16, u32

VERSION = 2
MIN_FRAME_BYTES = 2
MAX_FRAME_BYTES = 8_388_608
MAX_ITEMS = 256
MAX_CONTROL_BYTES = 1_048_576
MAX_SIGNATURE_BYTES = 1_024
NO_TRACE: Final = bytes(TRACE_BYTES)  # of requests that have no id of their own
LOCAL_CALLER: Final = "local"
SIGN_BATCH, SIGN_RESULTS, SPANS = 0x10, 0x90, 0x91
CONTROL, CONTROL_OK, CONTROL_REFUSED, MALFORMED = 0x20, 0xA0, 0xAF, 0x8F
_OP = re.compile(r"[a-z_]{1,32}", re.ASCII)
_SPAN_NAME = re.compile(r"[a-z0-9_.]{1,32}", re.ASCII)
MAX_SPAN_DETAIL = 64
JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SignItem:
    """One signature asked for. `scheme` and `purpose` are numbers as they came: the signer decides what they are worth."""

    id: int
    key_id: KeyId
    scheme: int
    purpose: int
    deadline_ms: int
    message: bytes = field(repr=False)
    trace: bytes = field(default=NO_TRACE, repr=False)

    def to_bytes(self) -> bytes:
        return (
            u32(self.id)
            + bytes8(self.key_id.encode("ascii"))
            + u16(self.scheme)
            + bytes((self.purpose,))
            + u32(self.deadline_ms)
            + self.trace
            + bytes32(self.message)
        )


@dataclass(frozen=True, slots=True)
class SignBatch:
    """`caller` is a SPIFFE ID or `local`. A batch that would pass MAX_FRAME_BYTES is to be cut by its sender."""

    batch_id: int
    caller: str
    items: tuple[SignItem, ...]

    def to_bytes(self) -> bytes:
        """Raises: InvalidRequest when the batch is empty, or does not fit in one frame."""
        _require_count(len(self.items))
        body = b"".join(item.to_bytes() for item in self.items)
        return _frame(SIGN_BATCH, u32(self.batch_id) + bytes16(self.caller.encode()) + u16(len(self.items)) + body)


@dataclass(frozen=True, slots=True)
class Signed:
    id: int
    signature: bytes

    def to_bytes(self) -> bytes:
        return u32(self.id) + b"\x00" + bytes16(self.signature)


@dataclass(frozen=True, slots=True)
class Refused:
    id: int
    error: KeyreeveError

    def to_bytes(self) -> bytes:
        return u32(self.id) + _error_bytes(self.error)


SignResult = Signed | Refused


@dataclass(frozen=True, slots=True)
class SignResults:
    """Some of the results of one batch: a batch may be answered by several of these, in any order."""

    batch_id: int
    results: tuple[SignResult, ...]

    def to_bytes(self) -> bytes:
        _require_count(len(self.results))
        body = b"".join(result.to_bytes() for result in self.results)
        return _frame(SIGN_RESULTS, u32(self.batch_id) + u16(len(self.results)) + body)


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
        return _frame(CONTROL_REFUSED, u32(self.request_id) + _error_bytes(self.error))


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
        results = tuple(_read_result(reader) for _ in range(count))
        reader.finish()
        return SignResults(batch_id, results)
    if kind == SPANS:
        return _read_spans(_read_json(reader))
    if kind == CONTROL_OK:
        return ControlOk(reader.u32("request_id"), _read_json(reader))
    if kind == CONTROL_REFUSED:
        request_id = reader.u32("request_id")
        refused = ControlRefused(request_id, _read_error(reader, _read_code(reader)))
        reader.finish()
        return refused
    if kind == MALFORMED:
        malformed = Malformed(error_from_wire(_read_code(reader), _read_detail(reader)))
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
    caller = ascii_text(reader.bytes16("caller", low=1, high=MAX_ID_BYTES), "caller")
    _check_caller(caller)
    count = _read_count(reader)
    items = tuple(_read_item(reader) for _ in range(count))
    reader.finish()
    if len({item.id for item in items}) != count:
        raise MalformedFrame("two items of one batch have the same id")
    return SignBatch(batch_id, caller, items)


def _check_caller(caller: str) -> None:
    if caller == LOCAL_CALLER:
        return
    try:
        SpiffeId.parse(caller)
    except InvalidRequest as error:
        raise MalformedFrame(f"caller: {error.detail}") from None


def _read_item(reader: Reader) -> SignItem:
    item_id = reader.u32("id")
    try:
        key_id = parse_key_id(ascii_text(reader.bytes8("key_id", low=1, high=MAX_KEY_ID_BYTES), "key_id"))
    except MalformedFrame:
        raise
    except InvalidRequest as error:
        raise MalformedFrame(error.detail) from None
    return SignItem(
        id=item_id,
        key_id=key_id,
        scheme=reader.u16("scheme"),
        purpose=reader.u8("purpose"),
        deadline_ms=reader.u32("deadline_ms"),
        trace=reader.take(TRACE_BYTES, "trace"),
        message=reader.bytes32("message", high=MAX_MESSAGE_BYTES),
    )


def _read_result(reader: Reader) -> SignResult:
    item_id, code = reader.u32("id"), reader.u8("code")
    if code == 0:
        return Signed(item_id, reader.bytes16("signature", low=1, high=MAX_SIGNATURE_BYTES))
    return Refused(item_id, _read_error(reader, code))


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


def _read_detail(reader: Reader) -> str:
    return reader.bytes16("detail", high=MAX_DETAIL_BYTES).decode(errors="replace")


def _read_error(reader: Reader, code: int) -> KeyreeveError:
    retry_after_ms = reader.u32("retry_after_ms")
    retry_after = timedelta(milliseconds=retry_after_ms) if retry_after_ms else None
    return error_from_wire(code, _read_detail(reader), retry_after)


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


def _error_bytes(error: KeyreeveError) -> bytes:
    retry_ms = int(error.retry_after / timedelta(milliseconds=1)) if error.retry_after else 0
    return (
        bytes((error.rendering.wire,)) + u32(min(max(retry_ms, 0), 0xFFFFFFFF)) + bytes16(error.detail.encode("utf-8"))
    )


def _require_count(count: int) -> None:
    if not 1 <= count <= MAX_ITEMS:
        raise InvalidRequest(f"a frame holds 1 to {MAX_ITEMS} items, not {count}")


def _frame(kind: int, body: bytes) -> bytes:
    length = len(body) + 2
    if length > MAX_FRAME_BYTES:
        raise InvalidRequest(f"frame of {length} bytes, at most {MAX_FRAME_BYTES} are allowed")
    return u32(length) + bytes((VERSION, kind)) + body
