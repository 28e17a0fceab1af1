"""Real processes under test: started from real command lines, ready when they say so (sd_notify), their logs read as events.

Nothing here sleeps: readiness comes as a datagram, log events wake whoever waits for them, ends come from `wait`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

LogEvent = dict[str, Any]
DEFAULT_TIMEOUT_S = 30.0
_PORTS = range(15_000, 32_000)


class ProcessFailed(AssertionError):
    """A process ended or kept silent where it should not have; the text holds the end of its log."""


class NotifySocket:
    """What NOTIFY_SOCKET names: an abstract datagram socket, so no path is too long for it."""

    def __init__(self) -> None:
        self.address = f"@keyreeve-test-{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.bind("\0" + self.address[1:])

    def receive(self, timeout: float) -> dict[str, str]:
        """The next message's assignments. Raises: TimeoutError."""
        self._socket.settimeout(max(timeout, 0.001))
        return dict(line.split("=", 1) for line in self._socket.recv(4096).decode().splitlines() if "=" in line)

    def close(self) -> None:
        self._socket.close()


@dataclass
class ManagedProcess:
    """One process: `start`, `wait_ready`, `wait_event`, `terminate`, `kill`. As a context manager it is killed at the end.

    `env` is added to the caller's environment. The process leads a session of its own, so `kill_group` reaches its children.
    """

    args: Sequence[str | Path]
    name: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    pass_fds: Sequence[int] = ()
    log_path: Path | None = None

    def __post_init__(self) -> None:
        self.name = self.name or Path(str(self.args[0])).name
        self._lines: list[str] = []
        self._events: list[LogEvent] = []
        self._changed = threading.Condition()
        self._log_ended = False
        self._ready_seen = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._notify: NotifySocket | None = None

    @classmethod
    def python_module(cls, module: str, *args: str | Path, name: str = "", **options: Any) -> ManagedProcess:
        """`python -m module args` with this interpreter."""
        return cls([sys.executable, "-m", module, *args], name=name or module, **options)

    def start(self) -> ManagedProcess:
        self._notify = self._notify or NotifySocket()
        self._log_ended = False
        self._process = subprocess.Popen(
            [str(arg) for arg in self.args],
            env={**os.environ, **self.env, "NOTIFY_SOCKET": self._notify.address},
            cwd=self.cwd,
            pass_fds=tuple(self.pass_fds),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        threading.Thread(target=self._collect, args=(self._process,), daemon=True, name=f"log-{self.name}").start()
        return self

    def start_ready(self, timeout: float = DEFAULT_TIMEOUT_S) -> ManagedProcess:
        """Starts it and waits for READY=1."""
        self.start()
        self.wait_ready(timeout)
        return self

    def wait_ready(self, timeout: float = DEFAULT_TIMEOUT_S) -> dict[str, str]:
        """Waits for the next READY=1 and returns that message. Raises: ProcessFailed when the process ends or keeps silent."""
        assert self._notify is not None
        deadline = monotonic() + timeout
        while monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                message = self._notify.receive(min(0.2, deadline - monotonic()))
                if message.get("READY") == "1":
                    return message
            if self.process.poll() is not None:
                raise ProcessFailed(
                    f"{self.name} ended with {self.process.returncode} before READY=1\n{self.log_tail()}"
                )
        raise ProcessFailed(f"{self.name} did not say READY=1 within {timeout} s\n{self.log_tail()}")

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, f"{self.name} was not started"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def events(self) -> list[LogEvent]:
        """The JSON lines of the log so far."""
        with self._changed:
            return list(self._events)

    @property
    def log(self) -> str:
        with self._changed:
            return "\n".join(self._lines)

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.splitlines()[-lines:])

    def events_named(self, event: str) -> list[LogEvent]:
        return [entry for entry in self.events if entry.get("event") == event]

    def wait_event(
        self,
        event: str,
        where: Callable[[LogEvent], bool] = lambda _: True,
        *,
        after: int = 0,
        timeout: float = DEFAULT_TIMEOUT_S,
    ) -> LogEvent:
        """The first matching log event at position `after` or later (`len(process.events)` marks a place).

        Raises: ProcessFailed.
        """

        def found() -> LogEvent | None:
            matching = (entry for entry in self._events[after:] if entry.get("event") == event and where(entry))
            return next(matching, None)

        with self._changed:
            self._changed.wait_for(lambda: found() is not None or self._log_ended, timeout)
            entry = found()
        if entry is None:
            raise ProcessFailed(f"{self.name} did not log {event!r} within {timeout} s\n{self.log_tail()}")
        return entry

    def terminate(self, timeout: float = DEFAULT_TIMEOUT_S) -> int:
        """SIGTERM, then waits for the end; its exit code."""
        if self.running:
            self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout)

    def kill(self) -> int:
        """SIGKILL to this process alone."""
        if self.running:
            self.process.kill()
        return self.wait()

    def kill_group(self) -> None:
        """SIGKILL to this process and all that it started in its session."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(DEFAULT_TIMEOUT_S)

    def wait(self, timeout: float = DEFAULT_TIMEOUT_S) -> int:
        """Raises: ProcessFailed when it is still running then."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(f"{self.name} did not end within {timeout} s\n{self.log_tail()}") from None
        with self._changed:
            self._changed.wait_for(lambda: self._log_ended, 2.0)
        return code

    def close(self) -> None:
        self.kill_group()
        if self._notify is not None:
            self._notify.close()
            self._notify = None

    def __enter__(self) -> ManagedProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _collect(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as stream:
            for raw in stream:
                self._add_line(raw.decode(errors="replace").rstrip("\n"))
        with self._changed:
            self._log_ended = True
            self._changed.notify_all()

    def _add_line(self, line: str) -> None:
        entry: LogEvent | None = None
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            entry = value if isinstance(value, dict) else None
        if self.log_path is not None:
            with self.log_path.open("a") as file:
                file.write(line + "\n")
        with self._changed:
            self._lines.append(line)
            if entry is not None:
                self._events.append(entry)
            self._changed.notify_all()


_given_out: set[int] = set()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now, and that no outgoing connection takes before it is used.

    The kernel gives outgoing connections ports from 32768 on (`ip_local_port_range`), so ours lie below; none is given out twice.
    """
    for _ in range(1000):
        port = secrets.choice(_PORTS)
        if port in _given_out:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _given_out.add(port)
            return port
    raise AssertionError("no free port was found on 127.0.0.1")


def children_of(pid: int) -> list[int]:
    """The direct children of a process, from /proc."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def descendants_of(pid: int) -> list[int]:
    """The children of a process, and theirs; each before its own."""
    return [found for child in children_of(pid) for found in (child, *descendants_of(child))]


def command_line(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    return []
