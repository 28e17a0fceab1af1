"""Length-framed binary messages: the reader and writer under the sign socket and the signer's frames. Big endian, no padding, no slack.

A reader holds every length to its bound before it takes the bytes, and `finish` refuses trailing bytes, so a parsed message has exactly one
encoding.
"""

from __future__ import annotations

import struct

from keyreeve_common.errors import MalformedFrame

LENGTH_BYTES = 4
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")


class Reader:
    """Takes fields off the front of one message. Raises: MalformedFrame."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes, at: int = 0) -> None:
        self._data = data
        self._at = at

    @property
    def at(self) -> int:
        """Where the next field begins."""
        return self._at

    def rest(self) -> bytes:
        """All that was not taken yet."""
        rest = self._data[self._at :]
        self._at = len(self._data)
        return rest

    def take(self, count: int, field: str) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise MalformedFrame(f"frame ends inside {field}")
        chunk = self._data[self._at : end]
        self._at = end
        return chunk

    def u8(self, field: str) -> int:
        return self.take(1, field)[0]

    def u16(self, field: str) -> int:
        return int(_U16.unpack(self.take(2, field))[0])

    def u32(self, field: str) -> int:
        return int(_U32.unpack(self.take(4, field))[0])

    def bytes8(self, field: str, *, low: int = 0, high: int = 255) -> bytes:
        """A string whose length stands before it in one byte, `low` to `high` bytes long."""
        return self.take(_bounded(self.u8(field), field, low=low, high=high), field)

    def bytes16(self, field: str, *, low: int = 0, high: int = 65_535) -> bytes:
        return self.take(_bounded(self.u16(field), field, low=low, high=high), field)

    def bytes32(self, field: str, *, low: int = 0, high: int) -> bytes:
        return self.take(_bounded(self.u32(field), field, low=low, high=high), field)

    def finish(self) -> None:
        if self._at != len(self._data):
            raise MalformedFrame(f"{len(self._data) - self._at} bytes after the end of the frame")


def _bounded(length: int, field: str, *, low: int, high: int) -> int:
    if not low <= length <= high:
        raise MalformedFrame(f"{field} has {length} bytes, allowed are {low} to {high}")
    return length


def u16(value: int) -> bytes:
    return _U16.pack(value)


def u32(value: int) -> bytes:
    return _U32.pack(value)


def bytes8(data: bytes) -> bytes:
    return bytes((len(data),)) + data


def bytes16(data: bytes) -> bytes:
    return _U16.pack(len(data)) + data


def bytes32(data: bytes) -> bytes:
    return _U32.pack(len(data)) + data


def ascii_text(data: bytes, field: str) -> str:
    """Raises: MalformedFrame."""
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise MalformedFrame(f"{field} is not ASCII") from None


class FrameSplitter:
    """Cuts a byte stream into frames: each is a u32 length and that many bytes.

    Raises: MalformedFrame from `feed`, after which the stream cannot be trusted any more and is to be closed.
    """

    __slots__ = ("_buffer", "_high", "_low")

    def __init__(self, *, low: int, high: int) -> None:
        self._buffer = bytearray()
        self._low = low
        self._high = high

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that are complete now, without their length."""
        self._buffer += data
        frames: list[bytes] = []
        at = 0
        while len(self._buffer) - at >= LENGTH_BYTES:
            (length,) = _U32.unpack_from(self._buffer, at)
            if not self._low <= length <= self._high:
                raise MalformedFrame(f"frame of {length} bytes, allowed are {self._low} to {self._high}")
            if len(self._buffer) - at - LENGTH_BYTES < length:
                break
            at += LENGTH_BYTES
            frames.append(bytes(self._buffer[at : at + length]))
            at += length
        del self._buffer[:at]
        return frames

    @property
    def pending(self) -> int:
        """Bytes of a frame that has not arrived whole."""
        return len(self._buffer)
