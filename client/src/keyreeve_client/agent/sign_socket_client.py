"""A blocking client of the agent's sign socket, for Python programs, tests and demonstrations (docs/protocol/sign-socket.md)."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from keyreeve_common.errors import DeadlineExceeded, MalformedFrame, Unavailable
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.sign_socket import (
    MAX_DEADLINE_MS,
    AgentFrame,
    PingFrame,
    PongFrame,
    RefusedFrame,
    SignedFrame,
    SignFrame,
    parse_agent_frame,
    splitter,
)

DEFAULT_DEADLINE = timedelta(seconds=5)
_READ_BYTES = 65_536


class SignSocketClient:
    """One connection, one request at a time; not safe to share among threads. Connects at the first use, and again after a fork or a break.

    It does not verify signatures: whoever holds the public key does (`keyreeve_common.verification.verify_signature`).
    """

    def __init__(self, path: Path | str) -> None:
        self._path = str(path)
        self._socket: socket.socket | None = None
        self._pid = 0
        self._next_id = 0

    def sign(
        self,
        key_id: str,
        scheme: SignatureScheme | int,
        purpose: Purpose | int,
        *,
        message: bytes,
        deadline: timedelta = DEFAULT_DEADLINE,
    ) -> bytes:
        """The signature of the whole `message`; nothing is checked here, so that a test can send what it likes.

        Raises: KeyreeveError as the agent said it; Unavailable, DeadlineExceeded when it says nothing; MalformedFrame.
        """
        self._next_id = (self._next_id + 1) & 0xFFFF_FFFF
        deadline_ms = min(MAX_DEADLINE_MS, max(1, round(deadline / timedelta(milliseconds=1))))
        frame = SignFrame(self._next_id, deadline_ms, int(scheme), int(purpose), KeyId(key_id), message)
        answer = self._exchange(frame.to_bytes(), deadline)
        if isinstance(answer, RefusedFrame) and answer.request_id in (0, frame.request_id):
            raise answer.error
        if isinstance(answer, SignedFrame) and answer.request_id == frame.request_id:
            return answer.signature
        raise self._confused()

    def ping(self, payload: bytes = b"ping", deadline: timedelta = DEFAULT_DEADLINE) -> None:
        """Raises: Unavailable, DeadlineExceeded, MalformedFrame."""
        answer = self._exchange(PingFrame(payload).to_bytes(), deadline)
        if isinstance(answer, RefusedFrame):
            raise answer.error
        if answer != PongFrame(payload):
            raise self._confused()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> SignSocketClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _confused(self) -> MalformedFrame:
        self.close()
        return MalformedFrame("agent sent an answer to something else; the connection was closed")

    def _exchange(self, frame: bytes, deadline: timedelta) -> AgentFrame:
        ends_at = time.monotonic() + deadline.total_seconds()
        reused = self._socket is not None and self._pid == os.getpid()
        try:
            return self._try(frame, ends_at)
        except TimeoutError:
            self.close()
            raise DeadlineExceeded("agent did not answer in time") from None
        except OSError as error:
            self.close()
            if not reused:
                raise Unavailable(f"{self._path}: agent cannot be reached: {error.strerror or error}") from error
        try:  # the agent may have been restarted since
            return self._try(frame, ends_at)
        except TimeoutError:
            self.close()
            raise DeadlineExceeded("agent did not answer in time") from None
        except OSError as error:
            self.close()
            raise Unavailable(f"{self._path}: agent cannot be reached: {error.strerror or error}") from error

    def _try(self, frame: bytes, ends_at: float) -> AgentFrame:
        connection = self._connected(ends_at)
        with contextlib.suppress(BrokenPipeError):  # a refusal may stand in our receive buffer
            connection.sendall(frame)
        frames = splitter()
        while True:
            connection.settimeout(max(0.001, ends_at - time.monotonic()))
            data = connection.recv(_READ_BYTES)
            if not data:
                raise ConnectionResetError("agent closed the connection")
            if whole := frames.feed(data):
                return parse_agent_frame(whole[0])

    def _connected(self, ends_at: float) -> socket.socket:
        if self._socket is not None and self._pid != os.getpid():
            self.close()
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(max(0.001, ends_at - time.monotonic()))
            self._socket.connect(self._path)
            self._pid = os.getpid()
        return self._socket
