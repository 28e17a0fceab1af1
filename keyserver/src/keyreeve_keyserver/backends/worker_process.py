"""The signer's handle on one worker process of a backend: spawn, ask, end. What the worker reaches is not loaded here."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta

from keyreeve_common.errors import MalformedFrame, TokenUnavailable

from keyreeve_keyserver.backends import worker_frames as frames

_READ_BYTES = 262_144
_KILL_SECONDS = 2


class WorkerGone(TokenUnavailable):
    """The worker died, hung or spoke nonsense: the question may be put to another."""


class WorkerProcess:
    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._splitter = frames.splitter()

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def spawn(cls, module: str) -> WorkerProcess:
        """Starts `python -m module FD`, which serves questions on that descriptor. Raises: WorkerGone."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        with theirs:
            try:
                # Not asyncio's subprocess: a task that is cancelled in the middle of that leaves an orphan.
                process = subprocess.Popen(  # noqa: ASYNC220 - it returns in a millisecond
                    [sys.executable, "-m", module, str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=_environment(),
                )
            except OSError as error:
                ours.close()
                raise WorkerGone(f"the worker cannot be started: {error.strerror}") from error
        try:
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            _kill(process)
            raise
        return cls(process, reader, writer)

    async def ask(self, question: frames.Question, *, within: timedelta) -> frames.Answer:
        """The worker's answer; after any failure the worker is to be ended. Raises: WorkerGone."""
        try:
            async with asyncio.timeout(within.total_seconds()):
                self._writer.write(question.to_bytes())
                await self._writer.drain()
                while True:
                    data = await self._reader.read(_READ_BYTES)
                    if not data:
                        raise WorkerGone("the worker ended in the middle of its work")
                    if answers := self._splitter.feed(data):
                        return frames.parse_answer(answers[0])
        except TimeoutError:
            raise WorkerGone(f"the worker did not answer within {within.total_seconds():g}s") from None
        except (OSError, MalformedFrame) as error:
            raise WorkerGone(f"the worker is gone: {type(error).__name__}") from None

    def end(self) -> None:
        """Closes the socket and kills the process: it holds no state that a kill could harm."""
        self._writer.close()
        _kill(self._process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_SECONDS)


def _environment() -> dict[str, str]:
    """A worker gets no more of our environment than it needs."""
    kept = ("PATH", "LANG", "LC_ALL", "HOME", "SOFTHSM2_CONF", "PYTHONPATH")
    return {name: os.environ[name] for name in kept if name in os.environ}
