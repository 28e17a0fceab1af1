"""A proxy's reload command: an argv, no shell, a time limit, and no more of its output than fits a log line."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

MAX_OUTPUT_BYTES = 2048


@dataclass(frozen=True, slots=True)
class ReloadResult:
    """`exit_status` None: it did not end in time and was killed with its process group."""

    exit_status: int | None
    output: str

    @property
    def ok(self) -> bool:
        return self.exit_status == 0


async def run_reload(argv: Sequence[str], limit: timedelta) -> ReloadResult:
    """Runs `argv` and waits for that process, not for what it may leave in the background. Raises: OSError when it cannot be started."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(writer, True)
    output = bytearray()
    loop = asyncio.get_running_loop()
    try:
        process = subprocess.Popen(  # noqa: ASYNC220 - spawning takes a millisecond; the wait below is asynchronous
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=writer,
            start_new_session=True,
            umask=0o022,
            env={name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"},
        )
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    loop.add_reader(reader, _collect, loop, reader, output)
    exit_status: int | None = None
    try:
        async with asyncio.timeout(limit.total_seconds()):
            await _ended(process)
        exit_status = process.returncode
    except TimeoutError:
        pass
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()  # SIGKILL was sent: it ends at once
        _collect(loop, reader, output)
        loop.remove_reader(reader)
        os.close(reader)
    return ReloadResult(exit_status, _printable(output))


async def _ended(process: subprocess.Popen[bytes]) -> None:
    loop = asyncio.get_running_loop()
    if process.poll() is not None:
        return
    pidfd = os.pidfd_open(process.pid)
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    process.wait()


def _collect(loop: asyncio.AbstractEventLoop, reader: int, output: bytearray) -> None:
    with contextlib.suppress(BlockingIOError):
        chunk = os.read(reader, 65_536)
        output += chunk[: MAX_OUTPUT_BYTES - len(output)]
        if not chunk:
            loop.remove_reader(reader)


def _printable(output: bytearray) -> str:
    return " ".join(output.decode(errors="replace").split())
