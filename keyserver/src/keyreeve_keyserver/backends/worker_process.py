"""The signer's handle on one worker process of a backend: spawn, ask, end. What the worker reaches is not loaded here."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from keyreeve_common.errors import MalformedFrame, TokenUnavailable

from keyreeve_keyserver.backends import worker_frames as frames
from keyreeve_keyserver.backends.launcher_link import LauncherLink

_READ_BYTES = 262_144


class WorkerGone(TokenUnavailable):
    """The worker died, hung or spoke nonsense: the question may be put to another."""


class WorkerProcess:
    def __init__(
        self, launcher: LauncherLink, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._launcher = launcher
        self.pid = pid
        self._reader = reader
        self._writer = writer
        self._splitter = frames.splitter()

    @classmethod
    async def spawn(cls, launcher: LauncherLink, backend: str) -> WorkerProcess:
        """Has the launcher start a worker of this backend. Raises: TokenUnavailable."""
        pid, connection = await launcher.spawn(backend)
        try:
            reader, writer = await asyncio.open_connection(sock=connection)
        except BaseException:
            connection.close()
            launcher.kill(pid)
            raise
        return cls(launcher, pid, reader, writer)

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
        """Closes the socket and has the process killed: it holds no state that a kill could harm."""
        self._writer.close()
        self._launcher.kill(self.pid)
