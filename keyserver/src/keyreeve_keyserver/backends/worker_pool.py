"""A pool of worker processes: hands each question to an idle one, brings dead ones back with back-off, and keeps every caller's deadline.

A question whose worker died goes to another once more: all questions but `Create` may be put twice. A refused PIN stops the pool for good,
since a token locks after a few tries. Where the token has no session left, the pool goes on with the workers that it has, and tries again
after a while. An idle worker asks for a sign of life now and then, so that a token that went away is found before a request is.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

from keyreeve_common.errors import (
    DeadlineExceeded,
    KeyreeveError,
    TokenPinIncorrect,
    TokenSessionsExhausted,
    TokenUnavailable,
)
from keyreeve_common.telemetry import log, log_exception, log_warning

from keyreeve_keyserver.backends import worker_frames as frames
from keyreeve_keyserver.backends.launcher_link import LauncherLink
from keyreeve_keyserver.backends.worker_guard import WorkerGuard
from keyreeve_keyserver.backends.worker_process import WorkerGone, WorkerProcess
from keyreeve_keyserver.domain.breaker import BreakerPolicy, Ticket
from keyreeve_keyserver.frames import JsonObject

MAX_WAITING = 4_096
_ATTEMPTS = 3
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 10.0


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """`call_timeout` bounds any question, `sign_timeout` a signature or sign of life: a worker that passes it is replaced.

    `keepalive` is how long a worker may idle (zero: for ever); `session_retry` the pause before another session is asked for.
    """

    call_timeout: timedelta = timedelta(seconds=30)
    sign_timeout: timedelta = timedelta(seconds=10)
    keepalive: timedelta = timedelta(seconds=30)
    session_retry: timedelta = timedelta(minutes=1)
    breaker: BreakerPolicy = field(default_factory=BreakerPolicy)

    def bound(self, question: frames.Question) -> timedelta:
        quick = isinstance(question, frames.TokenSign | frames.Ping)
        return min(self.sign_timeout, self.call_timeout) if quick else self.call_timeout


@dataclass(slots=True)
class _Job:
    question: frames.Question
    answer: asyncio.Future[frames.Answer]
    ticket: Ticket | None  # an errand has none: see tell_all
    attempts: int = field(default=0)
    taken_us: int = field(default=0)  # when a worker last took it, Unix microseconds


class WorkerPool:
    """`launcher` starts the workers of the backend `name`. Raises from `start`: TokenPinIncorrect."""

    def __init__(self, name: str, launcher: LauncherLink, *, workers: int, policy: PoolPolicy | None = None) -> None:
        self._name = name
        self._launcher = launcher
        self._size = workers
        self._policy = policy or PoolPolicy()
        self._guard = WorkerGuard(name, self._policy.breaker)
        self._settled = workers
        self._turn = asyncio.Lock()  # to log in, while nobody knows yet whether the PIN is right
        self._jobs: deque[_Job] = deque()
        self._wakeup = asyncio.Condition()
        self._slots: list[asyncio.Task[None]] = []
        self._processes: dict[int, WorkerProcess] = {}
        self._errands: dict[int, deque[_Job]] = {index: deque() for index in range(workers)}
        self._fault: KeyreeveError | None = None
        self.description: JsonObject = {}

    @property
    def fault(self) -> KeyreeveError | None:
        """Why no question is taken now: no worker can be had, or the breaker is open. None else, also while one is being started."""
        return self._fault or self._guard.refusal

    @property
    def remark(self) -> str:
        """What an operator should know of a pool that works; "" where there is nothing."""
        if self._settled == self._size:
            return ""
        return f"{self._settled} of {self._size} workers: the token has no session left for more"

    @property
    def size(self) -> int:
        """How many workers are configured."""
        return self._size

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that are open now."""
        return tuple(process.pid for process in self._processes.values())

    async def start(self) -> None:
        """Opens the first worker, then the others: so a wrong PIN is tried once only. Raises: TokenPinIncorrect."""
        try:
            first: WorkerProcess | None = await self._open()
        except TokenPinIncorrect:
            raise
        except KeyreeveError as error:
            first = None
            self._fail(error)
        self._slots = [
            asyncio.create_task(self._run_slot(index, first if index == 0 else None)) for index in range(self._size)
        ]
        await asyncio.sleep(0)  # a task that is cancelled before it begins would never end the worker that it was given

    async def close(self) -> None:
        for slot in self._slots:
            slot.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)
        self._drop_waiting(TokenUnavailable("the signer is stopping"))

    async def ask(
        self, question: frames.Question, *, within: timedelta, on_answer: Callable[[int], None] | None = None
    ) -> frames.Answer:
        """`on_answer` hears when a worker took the question (Unix microseconds), as its answer is there.

        Raises: what the worker refused with, DeadlineExceeded, TokenUnavailable.
        """
        if self._fault is not None:
            raise self._again(self._fault)
        if len(self._jobs) >= MAX_WAITING:
            raise TokenUnavailable("too many requests wait for the token", retry_after=timedelta(seconds=1))
        job = _Job(question, asyncio.get_running_loop().create_future(), self._guard.admit())
        self._jobs.append(job)
        await self._wake()
        try:
            async with asyncio.timeout(max(within.total_seconds(), 0)):
                answer = await job.answer
        except TimeoutError:
            with suppress(ValueError):
                self._jobs.remove(job)
                self._guard.abandoned(job.ticket)
            raise DeadlineExceeded("deadline passed while the token was at work") from None
        if on_answer is not None:
            on_answer(job.taken_us)
        if isinstance(answer, frames.Failed):
            raise answer.error
        return answer

    async def tell_all(self, question: frames.Question, *, within: timedelta) -> None:
        """Puts a question to every worker that is open now; one that ends meanwhile has nothing left to be told. Raises: TokenUnavailable."""
        waiting: list[asyncio.Future[frames.Answer]] = []
        for index in self._processes:
            job = _Job(question, asyncio.get_running_loop().create_future(), None)
            self._errands[index].append(job)
            waiting.append(job.answer)
        async with self._wakeup:
            self._wakeup.notify_all()
        try:
            async with asyncio.timeout(within.total_seconds()):
                answers = await asyncio.gather(*waiting)
        except TimeoutError:
            raise TokenUnavailable("a worker did not answer in time") from None
        for answer in answers:
            if isinstance(answer, frames.Failed):
                raise answer.error

    async def _run_slot(self, index: int, process: WorkerProcess | None) -> None:
        """Keeps one worker alive and busy."""
        pause, again = _FIRST_PAUSE, False
        try:
            while True:
                if process is None:
                    process = await self._reopen(again=again)
                    again = process is None
                    if process is None:
                        full = len(self._processes) >= self._settled < self._size
                        await asyncio.sleep(self._policy.session_retry.total_seconds() if full else pause)
                        pause = min(pause * 2, _LONGEST_PAUSE)
                        continue
                pause = _FIRST_PAUSE
                self._processes[index] = process
                self._came_up()
                await self._work(index, process)
                log_warning("worker_lost", backend=self._name, pid=process.pid)
                del self._processes[index]
                self._end_errands(index)
                process.end()
                process = None
        except TokenPinIncorrect as error:
            self._fail(error)
        except Exception:
            log_exception("worker_slot_failed", backend=self._name)
            self._fail(TokenUnavailable("the pool of workers met a fault of ours: see the signer's log"))
        finally:
            self._processes.pop(index, None)
            self._end_errands(index)
            if process is not None:
                process.end()

    async def _reopen(self, *, again: bool) -> WorkerProcess | None:
        """Raises: TokenPinIncorrect; after any other fault None.

        The pool is down if no other worker is up and this is not the first try: SoftHSM rewrites a token's file at each log-in, so a worker that
        starts beside another can miss the token for a moment, and requests that wait have deadlines of their own.
        """
        if isinstance(self._fault, TokenPinIncorrect):
            raise self._fault
        try:
            if self._processes:
                return await self._open()
            async with self._turn:
                if isinstance(self._fault, TokenPinIncorrect):
                    raise self._fault
                return await self._open()
        except TokenPinIncorrect as error:
            self._fail(error)  # before another has its turn
            raise
        except KeyreeveError as error:
            if isinstance(error, TokenSessionsExhausted) and self._processes:
                self._settle(len(self._processes))
            if again and not self._processes:
                self._fail(error)
            return None

    def _came_up(self) -> None:
        if self._fault is not None and not isinstance(self._fault, TokenPinIncorrect):
            self._fault = None
            self._guard.hurry()
        if len(self._processes) > self._settled:
            self._settle(len(self._processes))

    def _settle(self, workers: int) -> None:
        """Takes note of how many workers the token bears."""
        if workers != self._settled:
            log_warning("workers_settled", backend=self._name, workers=workers, configured=self._size)
        self._settled = workers

    async def _open(self) -> WorkerProcess:
        process = await WorkerProcess.spawn(self._launcher, self._name)
        try:
            answer = await process.ask(frames.Open(), within=self._policy.call_timeout)
            if isinstance(answer, frames.Failed):
                raise answer.error
            if not isinstance(answer, frames.Done):
                raise WorkerGone("the worker gave an answer to another question")
        except BaseException:
            process.end()
            raise
        self.description = answer.answer
        log("worker_open", backend=self._name, pid=process.pid)
        return process

    def _end_errands(self, index: int) -> None:
        """The worker is gone, and what it held with it."""
        while self._errands[index]:
            job = self._errands[index].popleft()
            if not job.answer.done():
                job.answer.set_result(frames.Done({}))

    async def _work(self, index: int, process: WorkerProcess) -> None:
        """Puts questions to this worker until it is lost. Raises: TokenPinIncorrect where it lost its session and could not log in anew."""
        while True:
            job = await self._next_job(self._errands[index])
            if job is None:
                if not await self._lives(process):
                    return
                continue
            if job.ticket is None:
                self._errands[index].appendleft(job)  # so that it ends with the worker if it does not come to an answer
            if job.answer.done():
                self._guard.abandoned(job.ticket)
                continue
            job.attempts += 1
            job.taken_us = time.time_ns() // 1000
            try:
                answer = await process.ask(job.question, within=self._policy.bound(job.question))
            except WorkerGone as error:
                self._guard.failed(job.ticket, error)
                self._put_back(job, error)
                self._refuse_while_open()
                await self._wake()
                return
            except asyncio.CancelledError:
                _refuse(job, self._again(self._fault or TokenUnavailable("the signer is stopping")))
                raise
            if job.ticket is None:
                self._errands[index].remove(job)
            self._guard.answered(job.ticket, answer)
            if not job.answer.done():
                job.answer.set_result(answer)
            self._refuse_while_open()
            if (refusal := _pin_refusal(answer)) is not None:
                raise refusal

    async def _lives(self, process: WorkerProcess) -> bool:
        """Whether the worker reaches its token. Raises: TokenPinIncorrect."""
        try:
            answer = await process.ask(frames.Ping(), within=self._policy.bound(frames.Ping()))
            if isinstance(answer, frames.Failed):
                raise answer.error
        except TokenPinIncorrect:
            raise
        except KeyreeveError as error:
            log_warning("keepalive_failed", backend=self._name, pid=process.pid, error=str(error))
            if self._guard.is_closed:
                self._guard.failed(self._guard.admit(), error)
            return False
        return True

    async def _next_job(self, errands: deque[_Job]) -> _Job | None:
        """The next question, this worker's errands first, or None when none came for as long as a worker may idle."""
        async with self._wakeup:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._policy.keepalive.total_seconds() or None):
                    while not self._jobs and not errands:
                        await self._wakeup.wait()
            # Also after a time-out: a wake-up that came at the same moment went to this worker alone.
            return next((queue.popleft() for queue in (errands, self._jobs) if queue), None)

    def _refuse_while_open(self) -> None:
        """What waits when the breaker opens is refused at once: its callers have other replicas."""
        refusal = self._guard.refusal
        if refusal is not None and not self._guard.is_probing:
            self._drop_waiting(refusal)

    def _put_back(self, job: _Job, error: WorkerGone) -> None:
        if job.answer.done() or job.ticket is None:
            return
        if isinstance(job.question, frames.Create) or job.attempts >= _ATTEMPTS:
            _refuse(job, TokenUnavailable(error.detail))
        else:
            self._jobs.appendleft(job)

    def _fail(self, error: KeyreeveError) -> None:
        if self._fault is None or self._fault.detail != error.detail:
            log_warning("backend_down", backend=self._name, error=str(error))
        self._fault = error
        self._drop_waiting(error)
        if isinstance(error, TokenPinIncorrect):
            # The other workers would log in with the same PIN as soon as their session is lost: at the next sign of life.
            for slot in self._slots:
                if slot is not asyncio.current_task():
                    slot.cancel()

    def _drop_waiting(self, error: KeyreeveError) -> None:
        while self._jobs:
            job = self._jobs.popleft()
            self._guard.abandoned(job.ticket)
            _refuse(job, self._again(error))

    @staticmethod
    def _again(error: KeyreeveError) -> KeyreeveError:
        """A fresh exception for each caller: one object raised in many tasks would gather their tracebacks."""
        return TokenUnavailable(error.detail, retry_after=error.retry_after or timedelta(seconds=1))

    async def _wake(self) -> None:
        async with self._wakeup:
            self._wakeup.notify()


def _refuse(job: _Job, error: KeyreeveError) -> None:
    if not job.answer.done():
        job.answer.set_result(frames.Failed(error))


def _pin_refusal(answer: frames.Answer) -> TokenPinIncorrect | None:
    outcomes = answer.outcomes if isinstance(answer, frames.TokenSigned) else ()
    failures = (answer.error,) if isinstance(answer, frames.Failed) else outcomes
    return next((failure for failure in failures if isinstance(failure, TokenPinIncorrect)), None)
