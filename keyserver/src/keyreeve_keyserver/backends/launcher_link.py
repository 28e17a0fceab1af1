"""The signer's handle on its launcher: start it, have it start and end workers, know when it is gone."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

from keyreeve_common.errors import ConfigInvalid, Internal, KeyreeveError, MalformedFrame, TokenUnavailable
from keyreeve_common.telemetry import log_warning

from keyreeve_keyserver.backends.launch import (
    MAX_MESSAGE_BYTES,
    Kill,
    Order,
    Prepare,
    Ready,
    Refused,
    Spawn,
    Spawned,
    WorkerSpec,
    order_bytes,
    parse_report,
)
from keyreeve_keyserver.hardening.environment import worker_environment

PROGRAM = "keyreeve_keyserver.backends.launcher"
_PREPARE_TIMEOUT = timedelta(seconds=30)
_END_SECONDS = 5


class LauncherLink:
    """One launcher and its socket. `process` is None where somebody else, the supervisor, started it."""

    def __init__(self, connection: socket.socket, process: subprocess.Popen[bytes] | None) -> None:
        self._connection = connection
        self._process = process
        self._pending: dict[int, asyncio.Future[tuple[int, socket.socket]]] = {}
        self._number = 0
        self.gone = asyncio.Event()

    @classmethod
    async def start(cls, workers: Sequence[WorkerSpec]) -> LauncherLink:
        """Starts a launcher of our own and prepares it. Raises: what a secret file is at fault with; Internal."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        with theirs:
            # Not asyncio's subprocess: a task that is cancelled in the middle of that leaves an orphan.
            process = subprocess.Popen(  # noqa: ASYNC220 - it returns in a millisecond
                [sys.executable, "-P", "-m", PROGRAM, str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=worker_environment(os.environ),
            )
        return await cls._prepared(ours, process, workers)

    @classmethod
    async def adopt(cls, descriptor: int, workers: Sequence[WorkerSpec]) -> LauncherLink:
        """Prepares the launcher behind this inherited descriptor, which the supervisor started as a user of its own. Raises: as `start`."""
        try:
            connection = socket.socket(fileno=descriptor)
        except OSError as error:
            raise ConfigInvalid(f"descriptor {descriptor} is not a socket: {error.strerror}") from None
        connection.set_inheritable(False)
        return await cls._prepared(connection, None, workers)

    @classmethod
    async def _prepared(
        cls, connection: socket.socket, process: subprocess.Popen[bytes] | None, workers: Sequence[WorkerSpec]
    ) -> LauncherLink:
        connection.setblocking(False)
        link, loop = cls(connection, process), asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_PREPARE_TIMEOUT.total_seconds()):
                await loop.sock_sendall(connection, order_bytes(Prepare(tuple(workers))))
                data = await loop.sock_recv(connection, MAX_MESSAGE_BYTES)
            report = parse_report(data)
            if isinstance(report, Refused):
                raise report.error
            if not isinstance(report, Ready):
                raise MalformedFrame("not an answer to prepare")
        except (OSError, TimeoutError, MalformedFrame):
            link.close()
            raise Internal("the launcher did not start: see the log lines before this") from None
        except BaseException:
            link.close()
            raise
        loop.add_reader(connection, link._read)
        return link

    async def spawn(self, backend: str) -> tuple[int, socket.socket]:
        """A new worker of this backend: its process id, and our end of its socket. Raises: TokenUnavailable, ConfigInvalid."""
        self._number += 1
        number = self._number
        answer: asyncio.Future[tuple[int, socket.socket]] = asyncio.get_running_loop().create_future()
        self._pending[number] = answer
        try:
            self._send(Spawn(number, backend))
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                pid, connection = answer.result()
                connection.close()
                self.kill(pid)
            raise
        finally:
            self._pending.pop(number, None)

    def kill(self, pid: int) -> None:
        """Also for a worker that hangs: it holds no state that a kill could harm."""
        with suppress(TokenUnavailable):
            self._send(Kill(pid))

    def close(self) -> None:
        """The launcher ends its workers and itself."""
        with suppress(RuntimeError, ValueError):
            asyncio.get_running_loop().remove_reader(self._connection)
        self._connection.close()
        self._fail_pending()
        if self._process is not None:
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                # A signer that is locked down can signal nobody: the kernel ends the launcher with it (PR_SET_PDEATHSIG).
                log_warning("launcher_hangs", pid=self._process.pid)

    def _send(self, order: Order) -> None:
        try:
            self._connection.send(order_bytes(order))
        except OSError:
            raise TokenUnavailable("the launcher of workers is gone: the signer has to be started again") from None

    def _read(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(
                self._connection, MAX_MESSAGE_BYTES, 1, flags=socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        try:
            if not data:
                raise MalformedFrame("the launcher is gone")
            self._resolve(parse_report(data), sockets)
        except MalformedFrame:
            asyncio.get_running_loop().remove_reader(self._connection)
            self.gone.set()
            self._fail_pending()
        finally:
            for unclaimed in sockets:
                unclaimed.close()

    def _resolve(self, report: object, sockets: list[socket.socket]) -> None:
        """A worker that nobody waits for any more is ended."""
        if isinstance(report, Refused):
            answer = self._pending.get(report.number)
            if answer is not None and not answer.done():
                answer.set_exception(_fresh(report.error))
        elif isinstance(report, Spawned) and sockets:
            answer = self._pending.get(report.number)
            if answer is None or answer.done():
                self.kill(report.pid)
            else:
                answer.set_result((report.pid, sockets.pop()))
        else:
            raise MalformedFrame("not a report that was asked for")

    def _fail_pending(self) -> None:
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(TokenUnavailable("the launcher of workers is gone"))


def _fresh(error: KeyreeveError) -> KeyreeveError:
    return type(error)(error.detail)
