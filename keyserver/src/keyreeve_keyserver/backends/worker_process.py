"""The signer's handle on one worker process of a backend: spawn, send, take answers, end. What the worker reaches is not loaded here.

Questions may be sent before earlier ones are answered: they wait in the socket, and the worker begins the next without waiting for us.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import cast

from keyreeve_common.errors import MalformedFrame, TokenUnavailable

from keyreeve_keyserver.backends import worker_frames as frames
from keyreeve_keyserver.backends.launcher_link import LauncherLink


class WorkerGone(TokenUnavailable):
    """The worker died, hung or spoke nonsense: the question may be put to another."""


class WorkerProcess(asyncio.Protocol):
    """`ring` is called when there is an answer to take, or the worker is gone."""

    def __init__(self, launcher: LauncherLink, pid: int) -> None:
        self._launcher = launcher
        self.pid = pid
        self.ring: Callable[[], None] = lambda: None
        self._transport: asyncio.Transport | None = None
        self._splitter = frames.splitter()
        self._answers: deque[frames.Answer] = deque()
        self._gone: WorkerGone | None = None

    @classmethod
    async def spawn(cls, launcher: LauncherLink, backend: str) -> WorkerProcess:
        """Has the launcher start a worker of this backend. Raises: TokenUnavailable."""
        pid, connection = await launcher.spawn(backend)
        process = cls(launcher, pid)
        try:
            await asyncio.get_running_loop().create_connection(lambda: process, sock=connection)
        except BaseException:
            connection.close()
            launcher.kill(pid)
            raise
        return process

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._answers.extend(frames.parse_answer(frame) for frame in self._splitter.feed(data))
        except MalformedFrame as error:
            self._lose(f"the worker is gone: {type(error).__name__}")
            return
        if self._answers:
            self.ring()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(
            "the worker ended in the middle of its work" if exc is None else f"the worker is gone: {type(exc).__name__}"
        )

    def send(self, question: frames.Question) -> None:
        """The worker answers its questions in their order; `take_answer` tells of one that is gone."""
        if self._transport is not None and self._gone is None:
            self._transport.write(question.to_bytes())

    def take_answer(self) -> frames.Answer | None:
        """The next answer, None while there is none. Raises: WorkerGone, after which the worker is to be ended."""
        if self._answers:
            return self._answers.popleft()
        if self._gone is not None:
            raise WorkerGone(self._gone.detail)
        return None

    async def ask(self, question: frames.Question, *, within: timedelta) -> frames.Answer:
        """One question to a worker that has no other; after any failure it is to be ended. Raises: WorkerGone."""
        rung = asyncio.Event()
        before, self.ring = self.ring, rung.set
        try:
            async with asyncio.timeout(within.total_seconds()):
                self.send(question)
                while (answer := self.take_answer()) is None:
                    await rung.wait()
                    rung.clear()
                return answer
        except TimeoutError:
            raise WorkerGone(f"the worker did not answer within {within.total_seconds():g}s") from None
        finally:
            self.ring = before

    def end(self) -> None:
        """Closes the socket and has the process killed: it holds no state that a kill could harm."""
        self.ring = lambda: None
        if self._transport is not None:
            self._transport.abort()
        self._launcher.kill(self.pid)

    def _lose(self, detail: str) -> None:
        if self._gone is None:
            self._gone = WorkerGone(detail)
        self.ring()
