"""The pool against workers that the test plays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from keyreeve_common.errors import TokenPinIncorrect, TokenUnavailable
from keyreeve_common.schemes import SignatureScheme
from keyreeve_keyserver.backends import worker_frames as frames
from keyreeve_keyserver.backends.worker_place import PoolPolicy
from keyreeve_keyserver.backends.worker_pool import WorkerPool
from keyreeve_keyserver.backends.worker_process import WorkerProcess

SECOND = timedelta(seconds=1)
SIGN = frames.TokenSign((frames.TokenSignItem("k", SignatureScheme.ED25519, 2**63, b"m"),))


class PlayedWorker:
    """Opens; then its session is lost, and the PIN that it logs in with again is refused."""

    pid = 1

    def __init__(self, asked: list[frames.Question]) -> None:
        self._asked = asked
        self._answers: list[frames.Answer] = []
        self.ring: Callable[[], None] = lambda: None

    async def ask(self, question: frames.Question, *, within: timedelta) -> frames.Answer:
        return self.answer(question)

    def send(self, question: frames.Question) -> None:
        self._answers.append(self.answer(question))
        self.ring()

    def take_answer(self) -> frames.Answer | None:
        return self._answers.pop(0) if self._answers else None

    def answer(self, question: frames.Question) -> frames.Answer:
        self._asked.append(question)
        if isinstance(question, frames.Open):
            return frames.Done({})
        refusal = TokenPinIncorrect("the token refused the PIN")
        return frames.TokenSigned((refusal,)) if isinstance(question, frames.TokenSign) else frames.Failed(refusal)

    def end(self) -> None:
        return


@pytest.mark.parametrize("question", [SIGN, frames.Find("k")])
async def test_pin_refused_at_work_stops_the_pool(monkeypatch: pytest.MonkeyPatch, question: frames.Question) -> None:
    asked: list[frames.Question] = []

    async def spawn(_launcher: Any, _backend: str) -> Any:
        return PlayedWorker(asked)

    monkeypatch.setattr(WorkerProcess, "spawn", spawn)
    launcher: Any = None
    pool = WorkerPool("hsm", launcher, workers=2)
    await pool.start()
    for _ in range(5):
        with suppress(TokenPinIncorrect, TokenUnavailable):
            await pool.ask(question, within=SECOND)
    assert isinstance(pool.fault, TokenPinIncorrect)
    assert asked.count(question) == 1
    await pool.close()


async def test_a_pin_that_nobody_knows_yet_is_tried_by_one_worker_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is away at the start; when it is back, several workers wait to log in."""
    away, log_ins = True, 0

    class Worker(PlayedWorker):
        async def ask(self, question: frames.Question, *, within: timedelta) -> frames.Answer:
            nonlocal log_ins
            if away:
                return frames.Failed(TokenUnavailable("no token"))
            log_ins += 1
            for _ in range(5):
                await asyncio.sleep(0)  # the log-ins of the others come meanwhile
            return frames.Failed(TokenPinIncorrect("the token refused the PIN"))

    async def spawn(_launcher: Any, _backend: str) -> Any:
        return Worker([])

    monkeypatch.setattr(WorkerProcess, "spawn", spawn)
    launcher: Any = None
    pool = WorkerPool("hsm", launcher, workers=8)
    await pool.start()
    away = False
    async with asyncio.timeout(20):
        await asyncio.wait(pool._slots)
    assert isinstance(pool.fault, TokenPinIncorrect)
    assert log_ins == 1
    await pool.close()


async def test_when_one_worker_was_refused_no_idle_one_logs_in_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[frames.Question] = []

    async def spawn(_launcher: Any, _backend: str) -> Any:
        return PlayedWorker(asked)

    monkeypatch.setattr(WorkerProcess, "spawn", spawn)
    launcher: Any = None
    pool = WorkerPool("hsm", launcher, workers=4, policy=PoolPolicy(keepalive=timedelta(milliseconds=20)))
    await pool.start()  # all sessions are lost; each is found out by a sign of life
    async with asyncio.timeout(20):
        await asyncio.wait(pool._slots)
    assert isinstance(pool.fault, TokenPinIncorrect)
    assert len([question for question in asked if isinstance(question, frames.Ping)]) == 1
    assert pool.pids == ()
    await pool.close()
