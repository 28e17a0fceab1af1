"""The pool against workers that the test plays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from keyreeve_common.errors import DeadlineExceeded, TokenPinIncorrect, TokenUnavailable
from keyreeve_common.schemes import SignatureScheme
from keyreeve_keyserver.backends import worker_frames as frames
from keyreeve_keyserver.backends.worker_place import PoolPolicy
from keyreeve_keyserver.backends.worker_pool import WorkerPool
from keyreeve_keyserver.backends.worker_process import WorkerGone, WorkerProcess
from keyreeve_keyserver.backends.worker_queue import Job, Lane

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


class SlowWorker(PlayedWorker):
    """Answers its questions only when the test says so."""

    def __init__(self, pid: int) -> None:
        super().__init__([])
        self.pid = pid
        self.waiting: list[frames.Question] = []
        self.is_gone = False

    def send(self, question: frames.Question) -> None:
        self.waiting.append(question)

    def work(self) -> None:
        question = self.waiting.pop(0)
        assert isinstance(question, frames.TokenSign)
        self._answers.append(frames.TokenSigned(tuple(item.message for item in question.items)))
        self.ring()

    def die(self) -> None:
        self.is_gone = True
        self.ring()

    def take_answer(self) -> frames.Answer | None:
        if self.is_gone and not self._answers:
            raise WorkerGone("the worker ended in the middle of its work")
        return super().take_answer()


LANE = Lane("ec", most=2)


def asks(pool: WorkerPool, *messages: bytes) -> Job:
    items = tuple(frames.TokenSignItem("k", SignatureScheme.ED25519, 2**63, message) for message in messages)
    return pool.submit(frames.TokenSign(items), deadline=time.monotonic() + 60, lane=LANE)


async def slow_pool(monkeypatch: pytest.MonkeyPatch, workers: int = 1) -> tuple[WorkerPool, list[SlowWorker]]:
    made: list[SlowWorker] = []

    async def spawn(_launcher: Any, _backend: str) -> Any:
        made.append(SlowWorker(len(made)))
        return made[-1]

    monkeypatch.setattr(WorkerProcess, "spawn", spawn)
    launcher: Any = None
    pool = WorkerPool("hsm", launcher, workers=workers, policy=PoolPolicy(keepalive=timedelta(0)))
    await pool.start()
    await until(lambda: len(pool.pids) == workers)
    return pool, made


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


async def test_the_next_question_is_at_the_worker_before_it_is_done_and_takes_what_came_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, (worker,) = await slow_pool(monkeypatch)
    jobs = [asks(pool, b"1")]
    await until(lambda: len(worker.waiting) == 1)
    jobs += [asks(pool, b"%d" % number) for number in range(2, 6)]
    await until(lambda: len(worker.waiting) == 2)
    assert pool.waiting == 2
    worker.work()
    await until(lambda: len(worker.waiting) == 2)
    sizes = [len(question.items) for question in worker.waiting if isinstance(question, frames.TokenSign)]
    assert sizes == [2, 2]
    worker.work()
    worker.work()
    answers = [await job.answer for job in jobs]
    assert answers == [frames.TokenSigned((b"%d" % number,)) for number in range(1, 6)]
    await pool.close()


async def test_an_idle_worker_is_asked_before_one_has_two(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, workers = await slow_pool(monkeypatch, workers=2)
    jobs = [asks(pool, b"1"), asks(pool, b"2")]
    await until(lambda: all(worker.waiting for worker in workers))
    assert [len(worker.waiting) for worker in workers] == [1, 1]
    for worker in workers:
        worker.work()
    for job in jobs:
        assert isinstance(await job.answer, frames.TokenSigned)
    await pool.close()


async def test_what_a_dead_worker_had_goes_to_another_and_only_its_first_question_is_held_against_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, workers = await slow_pool(monkeypatch)
    jobs = [asks(pool, b"1")]
    await until(lambda: len(workers[0].waiting) == 1)
    jobs.append(asks(pool, b"2"))
    await until(lambda: len(workers[0].waiting) == 2)
    workers[0].die()
    await until(lambda: len(workers) == 2 and bool(workers[1].waiting))
    assert [job.attempts for job in jobs] == [2, 1]
    while not all(job.answer.done() for job in jobs):
        if workers[1].waiting:
            workers[1].work()
        await asyncio.sleep(0)
    assert [await job.answer for job in jobs] == [frames.TokenSigned((b"1",)), frames.TokenSigned((b"2",))]
    await pool.close()


async def test_what_makes_or_ends_a_key_waits_until_the_worker_has_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, (worker,) = await slow_pool(monkeypatch)
    job = asks(pool, b"1")
    await until(lambda: len(worker.waiting) == 1)
    destroy = pool.submit(frames.Destroy("k"), deadline=time.monotonic() + 60)
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(worker.waiting) == 1
    worker.work()
    assert isinstance(await job.answer, frames.TokenSigned)
    await until(lambda: worker.waiting == [frames.Destroy("k")])
    await pool.close()
    assert isinstance(await destroy.answer, frames.Failed)


async def test_a_deadline_that_passes_in_the_queue_or_at_the_worker_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _ = await slow_pool(monkeypatch)
    items = (frames.TokenSignItem("k", SignatureScheme.ED25519, 0, b"m"),)
    jobs = [pool.submit(frames.TokenSign(items), deadline=time.monotonic(), lane=LANE) for _ in range(8)]
    for job in jobs:
        answer = await job.answer
        assert isinstance(answer, frames.Failed)
        assert isinstance(answer.error, DeadlineExceeded)
    assert pool.waiting == 0
    await pool.close()
