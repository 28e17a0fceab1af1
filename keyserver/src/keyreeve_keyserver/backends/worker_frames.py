"""Frames between the signer and one backend worker: questions, and their answers in the same order, over a socketpair. Pure; strict both
ways.

`u32 length` (2 to 4,194,304) `u8 version = 3` `u8 type` body, big endian. The worker ends when a question breaks a rule: only the signer
writes to it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, TypeVar

from keyreeve_common.errors import MAX_DETAIL_BYTES, InvalidRequest, KeyreeveError, MalformedFrame, error_from_wire
from keyreeve_common.key_id import MAX_KEY_ID_BYTES, parse_key_id
from keyreeve_common.purposes import MAX_MESSAGE_BYTES
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_common.strict_json import canonical_json
from keyreeve_common.wire import FrameSplitter, Reader, ascii_text, bytes8, bytes16, bytes32, u16, u32

from keyreeve_keyserver.domain.wrapped_key import MAX_BLOB_BYTES
from keyreeve_keyserver.frames import MAX_SIGNATURE_BYTES, JsonObject, parse_json_object

_T = TypeVar("_T")
VERSION = 3  # a worker is started by its signer, which may be of the release before: it must not misread an item
MAX_FRAME_BYTES = 4_194_304
MAX_ITEMS = 32
MAX_BOX_BYTES = 65_536
MAX_JSON_BYTES = 65_536
NONCE_BYTES = 12
_COUNT, _REF_LENGTH, _MESSAGE_LENGTH = struct.Struct(">H"), struct.Struct(">B"), struct.Struct(">I")
_SIGN_HEAD = struct.Struct(">HQBH")  # what stands between an item's ref and its wrapped key
_SCHEMES = {int(scheme): scheme for scheme in SignatureScheme}
OPEN, CREATE, FIND, DESTROY, SIGN, ENCRYPT, DECRYPT, PING, INSPECT = range(1, 10)
DONE, REFUSED, SIGNED, BOX = 0x81, 0x82, 0x83, 0x84


@dataclass(frozen=True, slots=True)
class Open:
    """The first question: reach the token or service and log in, with the settings and secrets that the launcher gave."""

    def to_bytes(self) -> bytes:
        return _frame(OPEN, b"")


@dataclass(frozen=True, slots=True)
class Create:
    """`label` says whose key it is, and only one object has it; `ref` is what the sealed record names, made anew for each key."""

    ref: str
    label: str
    key_type: KeyType

    def to_bytes(self) -> bytes:
        texts = (self.ref, self.label, self.key_type.value)
        return _frame(CREATE, b"".join(bytes8(text.encode("ascii")) for text in texts))


@dataclass(frozen=True, slots=True)
class Find:
    """`wrapped` is the key itself, as its token wrapped it (`domain/wrapped_key.py`); empty for a key that rests in the token."""

    ref: str
    wrapped: bytes = field(default=b"", repr=False)

    def to_bytes(self) -> bytes:
        return _frame(FIND, bytes8(self.ref.encode("ascii")) + bytes16(self.wrapped))


@dataclass(frozen=True, slots=True)
class Inspect:
    """What does the token say now of this key? The fields are those of Find."""

    ref: str
    wrapped: bytes = field(default=b"", repr=False)

    def to_bytes(self) -> bytes:
        return _frame(INSPECT, bytes8(self.ref.encode("ascii")) + bytes16(self.wrapped))


@dataclass(frozen=True, slots=True)
class Destroy:
    ref: str

    def to_bytes(self) -> bytes:
        return _frame(DESTROY, bytes8(self.ref.encode("ascii")))


class TokenSignItem(NamedTuple):
    """`wrapped` goes with every item of a wrapped key: any worker can sign it, and a worker that has let it go needs no second question.

    `deadline_us` is of CLOCK_MONOTONIC, which all processes of a host share: time in a queue or a socket counts. `prehashed`: `message` is a
    digest by the scheme's hash.
    """

    ref: str
    scheme: SignatureScheme
    deadline_us: int
    message: bytes
    prehashed: bool = False
    wrapped: bytes = b""

    def __repr__(self) -> str:
        return f"TokenSignItem(ref={self.ref!r}, scheme={self.scheme!r}, deadline_us={self.deadline_us})"


@dataclass(frozen=True, slots=True)
class TokenSign:
    """An item is `bytes8 ref` `u16 scheme` `u64 deadline_us` `u8 prehashed` `bytes16 wrapped` `bytes32 message`."""

    items: tuple[TokenSignItem, ...]

    def to_bytes(self) -> bytes:
        parts = [_COUNT.pack(len(self.items))]
        for ref, scheme, deadline_us, message, prehashed, wrapped in self.items:
            parts.append(
                _REF_LENGTH.pack(len(ref))
                + ref.encode("ascii")
                + _SIGN_HEAD.pack(scheme, deadline_us, prehashed, len(wrapped))
                + wrapped
                + _MESSAGE_LENGTH.pack(len(message))
                + message
            )
        return _frame(SIGN, b"".join(parts))


@dataclass(frozen=True, slots=True)
class Box:
    """Encrypt or decrypt with the token's AES key of this label, which is made on its first use."""

    decrypt: bool
    label: str
    nonce: bytes
    associated: bytes = field(repr=False)
    data: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        body = bytes8(self.label.encode("ascii")) + self.nonce + bytes32(self.associated) + bytes32(self.data)
        return _frame(DECRYPT if self.decrypt else ENCRYPT, body)


@dataclass(frozen=True, slots=True)
class Ping:
    """Keepalive: a cheap call that reaches the token or service through the open session."""

    def to_bytes(self) -> bytes:
        return _frame(PING, b"")


Question = Open | Create | Find | Inspect | Destroy | TokenSign | Box | Ping


@dataclass(frozen=True, slots=True)
class Done:
    answer: JsonObject

    def to_bytes(self) -> bytes:
        return _frame(DONE, bytes32(canonical_json(self.answer)))


@dataclass(frozen=True, slots=True)
class Failed:
    error: KeyreeveError

    def to_bytes(self) -> bytes:
        return _frame(REFUSED, _error_bytes(self.error))


@dataclass(frozen=True, slots=True)
class TokenSigned:
    outcomes: tuple[bytes | KeyreeveError, ...]

    def to_bytes(self) -> bytes:
        body = b"".join(
            _error_bytes(outcome) if isinstance(outcome, KeyreeveError) else b"\x00" + bytes16(outcome)
            for outcome in self.outcomes
        )
        return _frame(SIGNED, u16(len(self.outcomes)) + body)


@dataclass(frozen=True, slots=True)
class Boxed:
    data: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        return _frame(BOX, bytes32(self.data))


Answer = Done | Failed | TokenSigned | Boxed


def splitter() -> FrameSplitter:
    return FrameSplitter(low=2, high=MAX_FRAME_BYTES)


def parse_question(frame: bytes) -> Question:
    """Raises: MalformedFrame."""
    return _parse(frame, _QUESTIONS)


def parse_answer(frame: bytes) -> Answer:
    """Raises: MalformedFrame."""
    return _parse(frame, _ANSWERS)


def _parse(frame: bytes, table: dict[int, Callable[[Reader], _T]]) -> _T:
    reader = Reader(frame)
    version, kind = reader.u8("version"), reader.u8("type")
    if version != VERSION or kind not in table:
        raise MalformedFrame(f"frame of version {version} and type 0x{kind:02x} is not known here")
    parsed = table[kind](reader)
    reader.finish()
    return parsed


def _read_create(reader: Reader) -> Create:
    ref, label, name = _ref(reader), _ref(reader), ascii_text(reader.bytes8("key_type"), "key_type")
    try:
        return Create(ref, label, KeyType(name))
    except ValueError:
        raise MalformedFrame("key_type is not known") from None


def _read_sign(reader: Reader) -> TokenSign:
    """Items are read field by field where they stand: a reader's call for each field would cost more than the rest of a question."""
    count, data, at = _count(reader), reader.rest(), 0
    items: list[TokenSignItem] = []
    try:
        for _ in range(count):
            ref_end = at + 1 + data[at]
            ref = _known_ref(data[at + 1 : ref_end])
            number, deadline_us, prehashed, wrapped_bytes = _SIGN_HEAD.unpack_from(data, ref_end)
            at = ref_end + _SIGN_HEAD.size + wrapped_bytes
            wrapped = data[ref_end + _SIGN_HEAD.size : at]
            (message_bytes,) = _MESSAGE_LENGTH.unpack_from(data, at)
            message = data[at + 4 : at + 4 + message_bytes]
            at += 4 + message_bytes
            if prehashed > 1 or wrapped_bytes > MAX_BLOB_BYTES or message_bytes > MAX_MESSAGE_BYTES:
                raise MalformedFrame("an item has a field out of its bounds")
            items.append(TokenSignItem(ref, _SCHEMES[number], deadline_us, message, prehashed == 1, wrapped))
    except (IndexError, struct.error):
        raise MalformedFrame("frame ends inside an item") from None
    except KeyError:
        raise MalformedFrame("scheme is not known") from None
    if at != len(data):
        raise MalformedFrame("the items do not end with the frame")
    return TokenSign(tuple(items))


@lru_cache(maxsize=4096)
def _known_ref(data: bytes) -> str:
    """Raises: MalformedFrame."""
    try:
        return parse_key_id(ascii_text(data, "ref"))
    except InvalidRequest:
        raise MalformedFrame("ref is not a key id") from None


def _read_box(reader: Reader, *, decrypt: bool) -> Box:
    return Box(
        decrypt=decrypt,
        label=_ref(reader),
        nonce=reader.take(NONCE_BYTES, "nonce"),
        associated=reader.bytes32("associated", high=MAX_BOX_BYTES),
        data=reader.bytes32("data", high=MAX_BOX_BYTES),
    )


def _read_signed(reader: Reader) -> TokenSigned:
    return TokenSigned(tuple(_read_outcome(reader) for _ in range(_count(reader))))


def _read_outcome(reader: Reader) -> bytes | KeyreeveError:
    code = reader.u8("code")
    return _read_error(reader, code) if code else reader.bytes16("signature", low=1, high=MAX_SIGNATURE_BYTES)


def _read_failed(reader: Reader) -> Failed:
    code = reader.u8("code")
    if code == 0:
        raise MalformedFrame("an error has the code 0")
    return Failed(_read_error(reader, code))


def _read_error(reader: Reader, code: int) -> KeyreeveError:
    return error_from_wire(code, reader.bytes16("detail", high=MAX_DETAIL_BYTES).decode(errors="replace"))


def _error_bytes(error: KeyreeveError) -> bytes:
    return bytes((error.rendering.wire,)) + bytes16(error.detail.encode())


def _count(reader: Reader) -> int:
    count = reader.u16("count")
    if not 1 <= count <= MAX_ITEMS:
        raise MalformedFrame(f"count is {count}, allowed are 1 to {MAX_ITEMS}")
    return count


def _wrapped(reader: Reader) -> bytes:
    return reader.bytes16("wrapped", high=MAX_BLOB_BYTES)


def _ref(reader: Reader) -> str:
    return _known_ref(reader.bytes8("ref", low=1, high=MAX_KEY_ID_BYTES))


def _frame(kind: int, body: bytes) -> bytes:
    return u32(len(body) + 2) + bytes((VERSION, kind)) + body


_QUESTIONS: dict[int, Callable[[Reader], Question]] = {
    OPEN: lambda _: Open(),
    CREATE: _read_create,
    FIND: lambda reader: Find(_ref(reader), _wrapped(reader)),
    INSPECT: lambda reader: Inspect(_ref(reader), _wrapped(reader)),
    DESTROY: lambda reader: Destroy(_ref(reader)),
    SIGN: _read_sign,
    ENCRYPT: lambda reader: _read_box(reader, decrypt=False),
    DECRYPT: lambda reader: _read_box(reader, decrypt=True),
    PING: lambda _reader: Ping(),
}
_ANSWERS: dict[int, Callable[[Reader], Answer]] = {
    DONE: lambda reader: Done(parse_json_object(reader.bytes32("json", high=MAX_JSON_BYTES))),
    REFUSED: _read_failed,
    SIGNED: _read_signed,
    BOX: lambda reader: Boxed(reader.bytes32("data", high=MAX_BOX_BYTES + 16)),
}
