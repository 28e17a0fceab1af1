"""Items and results of a batch of signatures, packed: what an agent sends is what the signer reads, and nobody between builds it anew.

Everybody who takes a packed batch holds it to its bounds, and each batch has exactly one encoding. `PackedItems` and `PackedResults` are
sequences that make their members when somebody looks at them: a batch that needs nothing but to be let through is looked at as columns.
Spec: docs/protocol/signer-frames.md "item", "result".
"""

from __future__ import annotations

import struct
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import lru_cache, partial
from typing import Final, NamedTuple, Protocol, TypeVar, overload

from keyreeve_common.errors import MAX_DETAIL_BYTES, InvalidRequest, KeyreeveError, MalformedFrame, error_from_wire
from keyreeve_common.key_id import KeyId, parse_key_id
from keyreeve_common.purposes import MAX_MESSAGE_BYTES
from keyreeve_common.trace import REQUEST_ID_BYTES, TRACE_BYTES
from keyreeve_common.wire import Reader, ascii_text, bytes16, u16, u32

PACKED_METADATA: Final = "keyreeve-packed"  # in the initial metadata of a stream whose server reads packed batches
MAX_ITEMS = 256
MAX_SIGNATURE_BYTES = 1_024
NO_TRACE: Final = bytes(TRACE_BYTES)  # of requests that have no id of their own
_NO_ID = bytes(REQUEST_ID_BYTES)
_COUNT = struct.Struct(">H")
_ITEM_HEAD = struct.Struct(">IB")  # id, length of the key id, which follows
_ITEM_TAIL = struct.Struct(f">HBI{TRACE_BYTES}sI")  # scheme, purpose, deadline_ms, trace, length of the message
_SIGNED_HEAD = struct.Struct(">IBH")  # id, code 0, length of the signature, which follows
_CODE_AT = 4
_MOST_KEY_IDS = 65_536  # remembered in their checked form


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


class Signed(NamedTuple):
    id: int
    signature: bytes


class Refused(NamedTuple):
    id: int
    error: KeyreeveError


SignResult = Signed | Refused
# As the classes' own calls, in half the time: there is one for each signature.
new_item: Callable[[tuple[int, KeyId, int, int, int, bytes, bytes]], SignItem] = partial(tuple.__new__, SignItem)
new_signed: Callable[[tuple[int, bytes]], Signed] = partial(tuple.__new__, Signed)


class _Numbered(Protocol):
    @property
    def id(self) -> int: ...


M = TypeVar("M", SignItem, SignResult)


class _Packed(Sequence[M]):
    """Members as they came, in `data`; made when somebody looks at one."""

    __slots__ = ("_members", "data", "ids")

    def __init__(self, data: bytes, ids: list[int]) -> None:
        self.data = data
        self.ids = ids
        self._members: tuple[M, ...] | None = None

    @abstractmethod
    def _read(self) -> tuple[M, ...]: ...

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> M: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[M]: ...
    def __getitem__(self, index: int | slice) -> M | Sequence[M]:
        if self._members is None:
            self._members = self._read()
        return self._members[index]


class PackedItems(_Packed[SignItem]):
    """`uses` are key id, purpose and scheme of each; `sampled`: somebody traces one of them."""

    __slots__ = ("deadlines_ms", "sampled", "uses")

    def __init__(
        self, data: bytes, ids: list[int], uses: list[tuple[KeyId, int, int]], deadlines_ms: list[int], *, sampled: bool
    ) -> None:
        super().__init__(data, ids)
        self.uses = uses
        self.deadlines_ms = deadlines_ms
        self.sampled = sampled

    def _read(self) -> tuple[SignItem, ...]:
        return read_items(self.data, len(self))


class PackedResults(_Packed[SignResult]):
    """`all_signed`: none is a refusal."""

    __slots__ = ("all_signed",)

    def __init__(self, data: bytes, ids: list[int], *, all_signed: bool) -> None:
        super().__init__(data, ids)
        self.all_signed = all_signed

    def _read(self) -> tuple[SignResult, ...]:
        return read_results(self.data, len(self))


def ids_of(members: Sequence[_Numbered]) -> list[int]:
    return members.ids if isinstance(members, PackedItems | PackedResults) else [member.id for member in members]


def uses_of(items: Sequence[SignItem]) -> list[tuple[KeyId, int, int]]:
    """Key id, purpose and scheme of each."""
    if isinstance(items, PackedItems):
        return items.uses
    return [(item.key_id, item.purpose, item.scheme) for item in items]


def deadlines_of(items: Sequence[SignItem]) -> list[int]:
    """In milliseconds."""
    return items.deadlines_ms if isinstance(items, PackedItems) else [item.deadline_ms for item in items]


def all_signed(results: Sequence[SignResult]) -> bool:
    """Whether it is known without looking at each that none is a refusal."""
    return isinstance(results, PackedResults) and results.all_signed


def open_items(packed: bytes) -> PackedItems:
    """A packed batch of items. Raises: MalformedFrame."""
    count, data = split_count(packed)
    return scan_items(data, count)


def open_results(packed: bytes) -> tuple[SignResult, ...]:
    """A packed batch of results. Raises: MalformedFrame."""
    count, data = split_count(packed)
    return read_results(data, count)


def pack_items(items: Iterable[SignItem]) -> bytes:
    """Their encodings, one behind the other."""
    parts: list[bytes] = []
    for item_id, key_id, scheme, purpose, deadline_ms, message, trace in items:
        name = key_id.encode("ascii")
        tail = _ITEM_TAIL.pack(scheme, purpose, deadline_ms, trace, len(message))
        parts += (_ITEM_HEAD.pack(item_id, len(name)), name, tail, message)
    return b"".join(parts)


def pack_results(results: Iterable[SignResult]) -> bytes:
    """Their encodings, one behind the other."""
    parts: list[bytes] = []
    for result in results:
        if isinstance(result, Signed):
            parts += (_SIGNED_HEAD.pack(result.id, 0, len(result.signature)), result.signature)
        else:
            parts += (u32(result.id), error_bytes(result.error))
    return b"".join(parts)


def pack_signatures(ids: Iterable[int], signatures: Iterable[bytes]) -> bytes:
    """As `pack_results` of these, one signature for each id."""
    pack = _SIGNED_HEAD.pack
    parts: list[bytes] = []
    for item_id, signature in zip(ids, signatures, strict=True):
        parts += (pack(item_id, 0, len(signature)), signature)
    return b"".join(parts)


def with_count(count: int, encodings: bytes) -> bytes:
    """A packed batch: how many there are, in two bytes, then their encodings."""
    return u16(count) + encodings


def split_count(packed: bytes) -> tuple[int, bytes]:
    """The other way. Raises: MalformedFrame."""
    if len(packed) < _COUNT.size:
        raise MalformedFrame("packed batch is cut short")
    count: int = _COUNT.unpack_from(packed)[0]
    if not 1 <= count <= MAX_ITEMS:
        raise MalformedFrame(f"count is {count}, allowed are 1 to {MAX_ITEMS}")
    return count, packed[_COUNT.size :]


def scan_items(data: bytes, count: int) -> PackedItems:
    """`count` items that fill `data`, held to their bounds and not taken apart; each names its request. Raises: MalformedFrame."""
    ids: list[int] = []
    uses: list[tuple[KeyId, int, int]] = []
    deadlines: list[int] = []
    flags = 0
    for item_id, key_id, scheme, purpose, deadline_ms, _, _, trace in _each_item(data, count):
        if trace.startswith(_NO_ID):
            raise MalformedFrame("trace id is zero")
        ids.append(item_id)
        uses.append((key_id, purpose, scheme))
        deadlines.append(deadline_ms)
        flags |= trace[-1]
    return PackedItems(data, ids, uses, deadlines, sampled=bool(flags & 1))


def read_items(data: bytes, count: int) -> tuple[SignItem, ...]:
    """`count` items that fill `data`. Raises: MalformedFrame."""
    return tuple(
        [
            new_item((item_id, key_id, scheme, purpose, deadline_ms, data[start:end], trace))
            for item_id, key_id, scheme, purpose, deadline_ms, start, end, trace in _each_item(data, count)
        ]
    )


def _each_item(data: bytes, count: int) -> Iterator[tuple[int, KeyId, int, int, int, int, int, bytes]]:
    """Id, key id, scheme, purpose, deadline, where the message begins and ends, trace. `data` is known to be whole, and to end
    there, only once all are out.

    Raises: MalformedFrame.
    """
    at = 0
    try:
        for _ in range(count):
            item_id, length = _ITEM_HEAD.unpack_from(data, at)
            at += _ITEM_HEAD.size + length
            key_id = read_key_id(data[at - length : at])
            scheme, purpose, deadline_ms, trace, length = _ITEM_TAIL.unpack_from(data, at)
            at += _ITEM_TAIL.size + length
            if length > MAX_MESSAGE_BYTES:
                raise MalformedFrame(f"message has {length} bytes, allowed are 0 to {MAX_MESSAGE_BYTES}")
            yield item_id, key_id, scheme, purpose, deadline_ms, at - length, at, trace
    except struct.error:
        raise MalformedFrame("frame ends inside an item") from None
    _check_end(data, at)


@lru_cache(_MOST_KEY_IDS)
def read_key_id(name: bytes) -> KeyId:
    """Raises: MalformedFrame."""
    try:
        return parse_key_id(ascii_text(name, "key_id"))
    except InvalidRequest as error:
        raise MalformedFrame(error.detail) from None


def scan_results(data: bytes, count: int) -> PackedResults:
    """`count` results that fill `data`, held to their bounds and not taken apart. Raises: MalformedFrame."""
    ids: list[int] = []
    all_signed = True
    for item_id, _, _, refused in _each_result(data, count):
        ids.append(item_id)
        if refused is not None:
            all_signed = False
    return PackedResults(data, ids, all_signed=all_signed)


def read_results(data: bytes, count: int) -> tuple[SignResult, ...]:
    """`count` results that fill `data`. Raises: MalformedFrame."""
    return tuple(
        [
            new_signed((item_id, data[start:end])) if refused is None else refused
            for item_id, start, end, refused in _each_result(data, count)
        ]
    )


def _each_result(data: bytes, count: int) -> Iterator[tuple[int, int, int, Refused | None]]:
    """Id, where the signature begins and ends, or the refusal; as `_each_item`. Raises: MalformedFrame."""
    at = 0
    try:
        for _ in range(count):
            if data[at + _CODE_AT]:
                refused, at = _read_refused(data, at)
                yield refused.id, at, at, refused
                continue
            item_id, _, length = _SIGNED_HEAD.unpack_from(data, at)
            at += _SIGNED_HEAD.size + length
            if not 1 <= length <= MAX_SIGNATURE_BYTES:
                raise MalformedFrame(f"signature has {length} bytes, allowed are 1 to {MAX_SIGNATURE_BYTES}")
            yield item_id, at - length, at, None
    except (struct.error, IndexError):
        raise MalformedFrame("frame ends inside a result") from None
    _check_end(data, at)


def _check_end(data: bytes, at: int) -> None:
    over = len(data) - at
    if over:
        raise MalformedFrame(
            f"{over} bytes after the end of the frame" if over > 0 else "frame ends inside its last field"
        )


def _read_refused(data: bytes, at: int) -> tuple[Refused, int]:
    """The refusal at `at`, and where it ends."""
    reader = Reader(data, at)
    item_id, code = reader.u32("id"), reader.u8("code")
    return Refused(item_id, read_error(reader, code)), reader.at


def read_error(reader: Reader, code: int) -> KeyreeveError:
    retry_after_ms = reader.u32("retry_after_ms")
    retry_after = timedelta(milliseconds=retry_after_ms) if retry_after_ms else None
    return error_from_wire(code, read_detail(reader), retry_after)


def read_detail(reader: Reader) -> str:
    return reader.bytes16("detail", high=MAX_DETAIL_BYTES).decode(errors="replace")


def error_bytes(error: KeyreeveError) -> bytes:
    """Code, when to retry, why."""
    retry_ms = int(error.retry_after / timedelta(milliseconds=1)) if error.retry_after else 0
    return (
        bytes((error.rendering.wire,)) + u32(min(max(retry_ms, 0), 0xFFFFFFFF)) + bytes16(error.detail.encode("utf-8"))
    )
