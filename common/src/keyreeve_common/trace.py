"""The context that a signature request carries from agent to token: its request id, and the span that it belongs to.

25 bytes: trace id (16), parent span id (8), flags (1; bit 0: sampled). The trace id is the request id, whether or not anybody traces: it stands
in log lines, audit records and error reports, so that one request can be followed through all processes.
"""

from __future__ import annotations

import secrets
from typing import Final

from keyreeve_common.errors import InvalidRequest

TRACE_BYTES: Final = 25
REQUEST_ID_BYTES: Final = 16
_NO_ID = bytes(REQUEST_ID_BYTES)
_NO_SPAN = bytes(TRACE_BYTES - REQUEST_ID_BYTES)


def make_trace() -> bytes:
    """The context of a new request that nobody traces."""
    return secrets.token_bytes(REQUEST_ID_BYTES) + _NO_SPAN


class TraceIds:
    """What `make_trace` gives, drawn from the system's generator many at a time: a system call for each costs more than the rest of it."""

    _DRAWN: Final = 256

    def __init__(self) -> None:
        self._ids, self._at = b"", 0

    def make(self) -> bytes:
        if self._at == len(self._ids):
            self._ids, self._at = secrets.token_bytes(self._DRAWN * REQUEST_ID_BYTES), 0
        at, self._at = self._at, self._at + REQUEST_ID_BYTES
        return self._ids[at : self._at] + _NO_SPAN


def checked_trace(given: bytes) -> bytes:
    """`given`, or a new context where none was given. Raises: InvalidRequest."""
    if not given:
        return make_trace()
    if len(given) != TRACE_BYTES or given.startswith(_NO_ID):
        raise InvalidRequest(f"trace: {TRACE_BYTES} bytes with a trace id that is not zero are expected")
    return given


def request_id_of(trace: bytes) -> str:
    """32 hexadecimal digits."""
    return trace[:REQUEST_ID_BYTES].hex()


def is_sampled(trace: bytes) -> bool:
    """Whether whoever sent this context records it. Spec: W3C Trace Context 3.2.2.5."""
    return trace[-1] & 1 == 1


def unsampled(trace: bytes) -> bytes:
    """The same request, which nobody records from here on."""
    return trace[:-1] + bytes((trace[-1] & 0xFE,))


def pack_trace(trace_id: int, span_id: int) -> bytes:
    """The context of a sampled span."""
    return trace_id.to_bytes(REQUEST_ID_BYTES, "big") + span_id.to_bytes(8, "big") + b"\x01"


def unpack_trace(trace: bytes) -> tuple[int, int]:
    """Trace id and span id as numbers."""
    return int.from_bytes(trace[:REQUEST_ID_BYTES], "big"), int.from_bytes(trace[REQUEST_ID_BYTES:-1], "big")
