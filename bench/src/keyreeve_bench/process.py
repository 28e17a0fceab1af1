"""A process of the benchmark: started in a session of its own, ready when it says so (sd_notify), ended by its id and its group's.

Own sessions keep a Ctrl-C for the benchmark itself, which then ends them in order.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from types import TracebackType

from keyreeve_common.errors import Unavailable

_END_PATIENCE_S = 20.0
_LOG_BYTES = 4_096


class BenchProcess:
    """`log` receives what it prints. As a context manager it is ended with all that it started."""

    def __init__(
        self, name: str, command: Sequence[str | Path], *, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        address = f"keyreeve-bench-{secrets.token_hex(8)}"
        self._notify.bind("\0" + address)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                env={**os.environ, **(environment or {}), "NOTIFY_SOCKET": f"@{address}"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, patience_s: float) -> None:
        """Until it says READY=1. Raises: Unavailable, with the end of its log."""
        deadline = monotonic() + patience_s
        while monotonic() < deadline:
            self.check()
            self._notify.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                if b"READY=1" in self._notify.recv(4096):
                    return
        raise Unavailable(f"{self.name} was not ready within {patience_s:g} s: {self.last_words()}")

    def check(self) -> None:
        """Raises: Unavailable when it has ended."""
        code = self._process.poll()
        if code is not None:
            raise Unavailable(f"{self.name} ended with {code} during the benchmark: {self.last_words()}")

    def last_words(self) -> str:
        """The last line of its log."""
        with contextlib.suppress(OSError):
            lines = self.log.read_bytes()[-_LOG_BYTES:].decode(errors="replace").strip().splitlines()
            if lines:
                return lines[-1]
        return "it logged nothing"

    def close(self) -> None:
        """SIGTERM, and SIGKILL to the whole group where that does not end it in time."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_END_PATIENCE_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_END_PATIENCE_S)
            self._notify.close()

    def __enter__(self) -> BenchProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
