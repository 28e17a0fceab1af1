"""Frames between the front end and the signer (docs/protocol/signer-frames.md). Pure; both ends use this module.

A frame that parses keeps every bound of the page, and a binary frame has exactly one encoding. What a message is worth is not decided here:
the signer parses it against its purpose.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple

from keyreeve_common.errors import MAX_DETAIL_BYTES, InvalidRequest, KeyreeveError, MalformedFrame, error_from_wire
from keyreeve_common.identity import MAX_ID_BYTES, SpiffeId
from keyreeve_common.key_id import KeyId, parse_key_id
from keyreeve_common.purposes import MAX_MESSAGE_BYTES
from keyreeve_common.strict_json import parse_strict_json
from keyreeve_common.trace import TRACE_BYTES
from keyreeve_common.wire import FrameSplitter, Reader, ascii_text, bytes16, bytes32, u16, u32

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
_ITEM_HEAD = struct.Struct(">IB")  # id, length of the key id, which follows
_ITEM_TAIL = struct.Struct(
    f">HBI{TRACE_BYTES}sI"
)  # scheme, purpose, deadline_ms, trace, length of the message, which follows
_SIGNED_HEAD = struct.Struct(">IBH")  # id, code 0, length of the signature, which follows
_CODE_AT = 4
_MOST_CALLERS = 1_024
_MOST_KEY_IDS = 65_536  # remembered in their checked form
JsonObject = dict[str, Any]


class SignItem(NamedTuple):
    """One signature asked for. `scheme` and `purpose` are numbers as they came: the signer decides what they are worth.

    A tuple and no dataclass, as the results below: there is one for each signature, and a tuple is made in a third of the time.
    """

    id: int
    key_id: KeyId
    scheme: int
    purpose: int
    deadline_ms: int
    message: bytes
    trace: bytes = NO_TRACE

    def __repr__(self) -> str:
        """Without the message."""
        return f"SignItem(id={self.id}, key_id={self.key_id!r}, scheme={self.scheme:#06x}, purpose={self.purpose})"


@dataclass(frozen=True, slots=True)
class SignBatch:
    """`caller` is a SPIFFE ID or `local`. A batch that would pass MAX_FRAME_BYTES is to be cut by its sender."""

    batch_id: int
    caller: str
    items: tuple[SignItem, ...]

    def to_bytes(self) -> bytes:
        """Raises: InvalidRequest when the batch is empty, or does not fit in one frame."""
        _require_count(len(self.items))
        parts = [u32(self.batch_id), bytes16(self.caller.encode()), u16(len(self.items))]
        for item_id, key_id, scheme, purpose, deadline_ms, message, trace in self.items:
            name = key_id.encode("ascii")
            tail = _ITEM_TAIL.pack(scheme, purpose, deadline_ms, trace, len(message))
            parts += (_ITEM_HEAD.pack(item_id, len(name)), name, tail, message)
        return _frame(SIGN_BATCH, b"".join(parts))


class Signed(NamedTuple):
    id: int
    signature: bytes


class Refused(NamedTuple):
    id: int
    error: KeyreeveError


SignResult = Signed | Refused
# As the classes' own calls, in half the time: there is one for each signature.
new_item: Callable[[tuple[int, KeyId, int, int, int, bytes, bytes]], SignItem] = partial(tuple.__new__, SignItem)
_new_signed: Callable[[tuple[int, bytes]], Signed] = partial(tuple.__new__, Signed)


def signed_results(ids: Iterable[int], signatures: Iterable[bytes]) -> list[SignResult]:
    """A result for each of these items, in order."""
    return list(map(_new_signed, zip(ids, signatures, strict=True)))


@dataclass(frozen=True, slots=True)
class SignResults:
    """Some of the results of one batch: a batch may be answered by several of these, in any order."""

    batch_id: int
    results: Sequence[SignResult]

    def to_bytes(self) -> bytes:
        _require_count(len(self.results))
        parts = [u32(self.batch_id), u16(len(self.results))]
        for result in self.results:
            if isinstance(result, Signed):
                parts += (_SIGNED_HEAD.pack(result.id, 0, len(result.signature)), result.signature)
            else:
                parts += (u32(result.id), _error_bytes(result.error))
        return _frame(SIGN_RESULTS, b"".join(parts))


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
        return SignResults(batch_id, _read_results(reader.rest(), count))
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
    caller = _read_caller(reader.bytes16("caller", low=1, high=MAX_ID_BYTES))
    count = _read_count(reader)
    items = _read_items(reader.rest(), count)
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


def _read_items(data: bytes, count: int) -> tuple[SignItem, ...]:
    """`count` items that fill `data`; all in one go, since this is done for each signature. Raises: MalformedFrame."""
    items: list[SignItem] = []
    at = 0
    try:
        for _ in range(count):
            item_id, length = _ITEM_HEAD.unpack_from(data, at)
            at += _ITEM_HEAD.size + length
            key_id = _read_key_id(data[at - length : at])
            scheme, purpose, deadline_ms, trace, length = _ITEM_TAIL.unpack_from(data, at)
            at += _ITEM_TAIL.size + length
            if length > MAX_MESSAGE_BYTES:
                raise MalformedFrame(f"message has {length} bytes, allowed are 0 to {MAX_MESSAGE_BYTES}")
            items.append(new_item((item_id, key_id, scheme, purpose, deadline_ms, data[at - length : at], trace)))
    except struct.error:
        raise MalformedFrame("frame ends inside an item") from None
    if at != len(data):
        raise _wrong_end(data, at)
    return tuple(items)


@lru_cache(_MOST_KEY_IDS)
def _read_key_id(name: bytes) -> KeyId:
    """Raises: MalformedFrame."""
    try:
        return parse_key_id(ascii_text(name, "key_id"))
    except InvalidRequest as error:
        raise MalformedFrame(error.detail) from None


def _read_results(data: bytes, count: int) -> tuple[SignResult, ...]:
    """`count` results that fill `data`. Raises: MalformedFrame."""
    results: list[SignResult] = []
    at = 0
    try:
        for _ in range(count):
            if data[at + _CODE_AT]:
                refused, at = _read_refused(data, at)
                results.append(refused)
                continue
            item_id, _, length = _SIGNED_HEAD.unpack_from(data, at)
            at += _SIGNED_HEAD.size + length
            if not 1 <= length <= MAX_SIGNATURE_BYTES:
                raise MalformedFrame(f"signature has {length} bytes, allowed are 1 to {MAX_SIGNATURE_BYTES}")
            results.append(_new_signed((item_id, data[at - length : at])))
    except (struct.error, IndexError):
        raise MalformedFrame("frame ends inside a result") from None
    if at != len(data):
        raise _wrong_end(data, at)
    return tuple(results)


def _wrong_end(data: bytes, at: int) -> MalformedFrame:
    over = len(data) - at
    return MalformedFrame(
        f"{over} bytes after the end of the frame" if over > 0 else "frame ends inside its last field"
    )


def _read_refused(data: bytes, at: int) -> tuple[Refused, int]:
    """The refusal at `at`, and where it ends."""
    reader = Reader(data, at)
    item_id, code = reader.u32("id"), reader.u8("code")
    return Refused(item_id, _read_error(reader, code)), reader.at


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
