"""The sign socket as the agent reads it: all complete frames of a read are cut and parsed in one pass (docs/protocol/sign-socket.md).

`parse_client_frame` is the strict reading of one frame, and says what is wrong with it. Here the sign frame of the usual form is taken apart
with one look at its fixed part; any other goes through the strict reading, so that both give the same (tests hold them to it).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from keyreeve_common.errors import InvalidRequest, KeyreeveError, MalformedFrame, MessageTooLarge
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import MAX_MESSAGE_BYTES
from keyreeve_common.sign_socket import (
    MAX_DEADLINE_MS,
    MAX_FRAME_BYTES,
    MIN_FRAME_BYTES,
    SIGN,
    VERSION,
    PingFrame,
    SignFrame,
    parse_client_frame,
    request_id_of,
)
from keyreeve_common.wire import LENGTH_BYTES

_SIGN_HEAD = struct.Struct(">BBIIHBB")  # version, type, request_id, deadline_ms, scheme, purpose, key_id_len
_KEY_ID_AT = LENGTH_BYTES + _SIGN_HEAD.size
_LENGTH = struct.Struct(">I")
_SMALLEST_SIGN_FRAME = _SIGN_HEAD.size + 1 + LENGTH_BYTES  # a key id of one letter, no message
_MAX_KNOWN_KEY_IDS = 4096


@dataclass(frozen=True, slots=True)
class BadFrame:
    """What cannot be taken as a frame, and how to answer. After one that is `final` the stream cannot be trusted any more."""

    request_id: int
    error: KeyreeveError
    final: bool = True


TakenFrame = SignFrame | PingFrame | BadFrame


class ClientFrames:
    """Cuts and parses what one client sends. Keeps at most one frame that has not arrived whole."""

    __slots__ = ("_ended", "_needed", "_pending")

    def __init__(self) -> None:
        self._pending = bytearray()
        self._needed = LENGTH_BYTES  # bytes before there is anything to look at
        self._ended = False

    def feed(self, data: bytes) -> list[TakenFrame]:
        """The frames that are complete now, in their order. A final BadFrame is the last one ever."""
        if self._ended:
            return []
        if self._pending:
            self._pending += data
            if len(self._pending) < self._needed:
                return []
            data = bytes(self._pending)
            self._pending.clear()
        taken: list[TakenFrame] = []
        rest = self._take_all(data, taken)
        if taken and isinstance(last := taken[-1], BadFrame) and last.final:
            self._ended = True
        elif rest < len(data):
            self._pending += memoryview(data)[rest:]
        return taken

    def _take_all(self, data: bytes, taken: list[TakenFrame]) -> int:
        """Where the first frame begins that is not whole."""
        at, size = 0, len(data)
        while size - at >= LENGTH_BYTES:
            (length,) = _LENGTH.unpack_from(data, at)
            if not MIN_FRAME_BYTES <= length <= MAX_FRAME_BYTES:
                detail = f"frame of {length} bytes, allowed are {MIN_FRAME_BYTES} to {MAX_FRAME_BYTES}"
                taken.append(BadFrame(0, MalformedFrame(detail)))
                return at
            end = at + LENGTH_BYTES + length
            if end > size:
                self._needed = end - at
                return at
            usual = _sign_frame(data, at, end) if length >= _SMALLEST_SIGN_FRAME else None
            if usual is not None:
                taken.append(usual)
            else:
                read = _read_strictly(data[at + LENGTH_BYTES : end])
                taken.append(read)
                if isinstance(read, BadFrame) and read.final:
                    return at
            at = end
        self._needed = LENGTH_BYTES
        return at

    @property
    def pending(self) -> int:
        """Bytes of a frame that has not arrived whole."""
        return len(self._pending)


def _sign_frame(data: bytes, at: int, end: int) -> SignFrame | None:
    """The sign frame at `at`, None where the strict reading has to look. Spec: docs/protocol/sign-socket.md, 0x01 sign."""
    version, kind, request_id, deadline_ms, scheme, purpose, key_id_len = _SIGN_HEAD.unpack_from(
        data, at + LENGTH_BYTES
    )
    key_id_end = at + _KEY_ID_AT + key_id_len
    message_at = key_id_end + LENGTH_BYTES
    if version != VERSION or kind != SIGN or message_at > end or not 1 <= deadline_ms <= MAX_DEADLINE_MS:
        return None
    (message_len,) = _LENGTH.unpack_from(data, key_id_end)
    if message_len != end - message_at or message_len > MAX_MESSAGE_BYTES:
        return None
    key_id = _KNOWN_KEY_IDS.get(data[at + _KEY_ID_AT : key_id_end])
    if key_id is None:
        return None
    return SignFrame(request_id, deadline_ms, scheme, purpose, key_id, data[message_at:end])


def _read_strictly(frame: bytes) -> TakenFrame:
    try:
        parsed = parse_client_frame(frame)
    except MessageTooLarge as error:
        return BadFrame(request_id_of(frame), error, final=False)
    except InvalidRequest as error:
        return BadFrame(request_id_of(frame), MalformedFrame(error.detail))
    if isinstance(parsed, SignFrame):
        _remember(parsed.key_id)
    return parsed


# Key ids that were read strictly once, by their bytes. Any client may fill it, so it starts anew when it is full.
_KNOWN_KEY_IDS: dict[bytes, KeyId] = {}


def _remember(key_id: KeyId) -> None:
    if len(_KNOWN_KEY_IDS) >= _MAX_KNOWN_KEY_IDS:
        _KNOWN_KEY_IDS.clear()
    _KNOWN_KEY_IDS[key_id.encode("ascii")] = key_id
