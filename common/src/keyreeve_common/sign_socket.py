"""Frames of the sign socket between a provider and the agent (docs/protocol/sign-socket.md). Both ends in Python use this module."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

from keyreeve_common.errors import (
    MAX_DETAIL_BYTES,
    KeyreeveError,
    MalformedFrame,
    MessageTooLarge,
    error_from_wire,
)
from keyreeve_common.key_id import MAX_KEY_ID_BYTES, KeyId, parse_key_id
from keyreeve_common.purposes import MAX_MESSAGE_BYTES
from keyreeve_common.wire import FrameSplitter, Reader, ascii_text, bytes8, bytes16, bytes32, u16, u32

VERSION = 1
MIN_FRAME_BYTES = 2
MAX_FRAME_BYTES = 66_000
MAX_SIGNATURE_BYTES = 1_024
MAX_DEADLINE_MS = 60_000
SIGN, PING, SIGNED, PONG, REFUSED = 0x01, 0x02, 0x81, 0x82, 0x8F


class SignFrame(NamedTuple):
    """`scheme` and `purpose` are as the client sent them: the signer decides what they are worth.

    A tuple, since the agent makes one for each request: a frozen dataclass takes four times as long.
    """

    request_id: int
    deadline_ms: int
    scheme: int
    purpose: int
    key_id: KeyId
    message: bytes

    def to_bytes(self) -> bytes:
        return _frame(
            SIGN,
            u32(self.request_id)
            + u32(self.deadline_ms)
            + u16(self.scheme)
            + bytes((self.purpose,))
            + bytes8(self.key_id.encode("ascii"))
            + bytes32(self.message),
        )


@dataclass(frozen=True, slots=True)
class PingFrame:
    payload: bytes

    def to_bytes(self) -> bytes:
        return _frame(PING, self.payload)


@dataclass(frozen=True, slots=True)
class PongFrame:
    payload: bytes

    def to_bytes(self) -> bytes:
        return _frame(PONG, self.payload)


@dataclass(frozen=True, slots=True)
class SignedFrame:
    request_id: int
    signature: bytes

    def to_bytes(self) -> bytes:
        return _frame(SIGNED, u32(self.request_id) + bytes16(self.signature))


@dataclass(frozen=True, slots=True)
class RefusedFrame:
    request_id: int
    error: KeyreeveError

    def to_bytes(self) -> bytes:
        retry_ms = int(self.error.retry_after / timedelta(milliseconds=1)) if self.error.retry_after else 0
        return _frame(
            REFUSED,
            u32(self.request_id)
            + bytes((self.error.rendering.wire,))
            + u32(min(max(retry_ms, 0), 0xFFFFFFFF))
            + bytes16(self.error.detail.encode()),
        )


ClientFrame = SignFrame | PingFrame
AgentFrame = SignedFrame | RefusedFrame | PongFrame


def splitter() -> FrameSplitter:
    return FrameSplitter(low=MIN_FRAME_BYTES, high=MAX_FRAME_BYTES)


def parse_client_frame(frame: bytes) -> ClientFrame:
    """A frame (without its length) that a client sent. Raises: MalformedFrame, MessageTooLarge, InvalidRequest."""
    reader, kind = _open(frame)
    if kind == PING:
        return PingFrame(_echo(reader))
    if kind != SIGN:
        raise MalformedFrame(f"frame type 0x{kind:02x} is not one that a client sends")
    request_id = reader.u32("request_id")
    deadline_ms = reader.u32("deadline_ms")
    if not 1 <= deadline_ms <= MAX_DEADLINE_MS:
        raise MalformedFrame(f"deadline_ms is {deadline_ms}, allowed are 1 to {MAX_DEADLINE_MS}")
    scheme = reader.u16("scheme")
    purpose = reader.u8("purpose")
    key_id = parse_key_id(ascii_text(reader.bytes8("key_id", low=1, high=MAX_KEY_ID_BYTES), "key_id"))
    message_length = reader.u32("message")
    if message_length > MAX_MESSAGE_BYTES:
        raise MessageTooLarge(f"message has {message_length} bytes, the limit is {MAX_MESSAGE_BYTES}")
    message = reader.take(message_length, "message")
    reader.finish()
    return SignFrame(request_id, deadline_ms, scheme, purpose, key_id, message)


def request_id_of(frame: bytes) -> int:
    """The request id of a client frame that did not parse, or 0 where it does not reach so far."""
    return int.from_bytes(frame[2:6], "big") if len(frame) >= 6 and frame[1] == SIGN else 0


def parse_agent_frame(frame: bytes) -> AgentFrame:
    """A frame (without its length) that the agent sent. Raises: MalformedFrame."""
    reader, kind = _open(frame)
    if kind == PONG:
        return PongFrame(_echo(reader))
    if kind not in (SIGNED, REFUSED):
        raise MalformedFrame(f"frame type 0x{kind:02x} is not one that the agent sends")
    request_id = reader.u32("request_id")
    if kind == SIGNED:
        signature = reader.bytes16("signature", low=1, high=MAX_SIGNATURE_BYTES)
        reader.finish()
        return SignedFrame(request_id, signature)
    code = reader.u8("code")
    retry_after_ms = reader.u32("retry_after_ms")
    detail = reader.bytes16("detail", high=MAX_DETAIL_BYTES).decode(errors="replace")
    reader.finish()
    retry_after = timedelta(milliseconds=retry_after_ms) if retry_after_ms else None
    return RefusedFrame(request_id, error_from_wire(code, detail, retry_after))


def _open(frame: bytes) -> tuple[Reader, int]:
    reader = Reader(frame)
    version = reader.u8("version")
    if version != VERSION:
        raise MalformedFrame(f"frame is of version {version}, this program knows version {VERSION}")
    return reader, reader.u8("type")


def _echo(reader: Reader) -> bytes:
    payload = reader.take(4, "payload")
    reader.finish()
    return payload


def _frame(kind: int, body: bytes) -> bytes:
    return u32(len(body) + 2) + bytes((VERSION, kind)) + body
