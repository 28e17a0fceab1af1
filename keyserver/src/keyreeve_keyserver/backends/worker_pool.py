"""A pool of worker processes: hands each question to an idle one, brings dead ones back with back-off, and keeps every caller's deadline.

While a worker signs, the next signatures already wait in its socket: no token idles while an answer travels. A question whose worker died goes
to another once more: all questions but `Create` may be put twice. A refused PIN stops the pool for good, since a token locks after a few tries.
Where the token has no session left, the pool goes on with the workers that it has, and tries again after a while. An idle worker asks for a sign
of life now and then, so that a token that went away is found before a request is.
"""

from __future__ import annotations

import asyncio
import time
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
from keyreeve_keyserver.backends.worker_place import (
    Place,
    PoolPolicy,
    end_errands,
    give,
    newest_ticket,
    pin_refusal,
)
from keyreeve_keyserver.backends.worker_process import WorkerGone, WorkerProcess
from keyreeve_keyserver.backends.worker_queue import Job, JobQueue, Lane, merged, parted
from keyreeve_keyserver.frames import JsonObject

MAX_WAITING = 4_096
_ATTEMPTS = 3
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 10.0


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
        self._queue = JobQueue()
        self._slots: list[asyncio.Task[None]] = []
        self._processes: dict[int, WorkerProcess] = {}
        self._places = [Place() for _ in range(workers)]
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
        return len(self._queue)

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

    async def ask(self, question: frames.Question, *, within: timedelta) -> frames.Answer:
        """Raises: what the worker refused with, DeadlineExceeded, TokenUnavailable."""
        job = self.submit(question, deadline=time.monotonic() + within.total_seconds())
        try:
            answer = await job.answer
        except asyncio.CancelledError:
            self._give_up(job)
            raise
        if isinstance(answer, frames.Failed):
            raise answer.error
        return answer

    def submit(self, question: frames.Question, *, deadline: float, lane: Lane | None = None) -> Job:
        """Puts a question; its `answer` comes by `deadline` (monotonic clock) and is Failed where it was refused or came too late.

        `lane` is for a TokenSign: it may go to a worker together with others. Raises: TokenUnavailable where nothing is taken now.
        """
        if self._fault is not None:
            raise self._again(self._fault)
        if len(self._queue) >= MAX_WAITING:
            raise TokenUnavailable("too many requests wait for the token", retry_after=timedelta(seconds=1))
        loop = asyncio.get_running_loop()
        job = Job(question, loop.create_future(), self._guard.admit(), lane)
        job.timer = loop.call_later(max(deadline - time.monotonic(), 0), self._expire, job)
        self._queue.add(job)
        self._ring_one()
        return job

    def share(self, lane: Lane, items: int) -> int:
        """How many of `items` signatures of a lane to put into one question, so that no worker idles while another has many."""
        return self._queue.share(lane, items, workers=len(self._processes) or self._size)

    async def tell_all(self, question: frames.Question, *, within: timedelta) -> None:
        """Puts a question to every worker that is open now; one that ends meanwhile has nothing left to be told. Raises: TokenUnavailable."""
        waiting: list[asyncio.Future[frames.Answer]] = []
        for index in self._processes:
            job = Job(question, asyncio.get_running_loop().create_future(), None)
            self._places[index].errands.append(job)
            self._places[index].rung.set()
            waiting.append(job.answer)
        try:
            async with asyncio.timeout(within.total_seconds()):
                answers = await asyncio.gather(*waiting)
        except TimeoutError:
            raise TokenUnavailable("a worker did not answer in time") from None
        for answer in answers:
            if isinstance(answer, frames.Failed):
                raise answer.error

    def _expire(self, job: Job) -> None:
        self._give_up(job)
        give(job, frames.Failed(DeadlineExceeded("deadline passed while the token was at work")))

    def _give_up(self, job: Job) -> None:
        """Its caller waits no more. What a worker has already is worked out, and its answer dropped."""
        if self._queue.remove(job):
            self._guard.abandoned(job.ticket)

    def _ring_one(self) -> None:
        """Wakes one worker for a new question: an idle one, or else one whose next place is free."""
        roomy: Place | None = None
        for index in self._processes:
            place = self._places[index]
            if place.is_idle:
                place.rung.set()
                return
            if roomy is None and place.line and place.has_room and not place.rung.is_set():
                roomy = place
        if roomy is not None:
            roomy.rung.set()

    async def _run_slot(self, index: int, process: WorkerProcess | None) -> None:
        """Keeps one worker alive and busy."""
        pause, again, place = _FIRST_PAUSE, False, self._places[index]
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
                await self._work(place, process)
                log_warning("worker_lost", backend=self._name, pid=process.pid)
                del self._processes[index]
                if self._queue:
                    self._ring_one()
                end_errands(place)
                process.end()
                process = None
        except TokenPinIncorrect as error:
            self._fail(error)
        except Exception:
            log_exception("worker_slot_failed", backend=self._name)
            self._fail(TokenUnavailable("the pool of workers met a fault of ours: see the signer's log"))
        finally:
            self._processes.pop(index, None)
            self._leave(place)
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
                self._settle_at(len(self._processes))
            if again and not self._processes:
                self._fail(error)
            return None

    def _came_up(self) -> None:
        if self._fault is not None and not isinstance(self._fault, TokenPinIncorrect):
            self._fault = None
            self._guard.hurry()
        if len(self._processes) > self._settled:
            self._settle_at(len(self._processes))

    def _settle_at(self, workers: int) -> None:
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

    def _leave(self, place: Place) -> None:
        """Nobody works here any more: what was sent, and what this worker alone was to do, ends here."""
        for job in (job for jobs in place.line for job in jobs):
            give(job, frames.Failed(self._again(self._fault or TokenUnavailable("the signer is stopping"))))
        place.line.clear()
        end_errands(place)

    async def _work(self, place: Place, process: WorkerProcess) -> None:
        """Puts questions to this worker until it is lost. Raises: TokenPinIncorrect where it lost its session and could not log in anew."""
        process.ring = place.rung.set
        try:
            while True:
                place.rung.clear()
                while place.line and (answer := process.take_answer()) is not None:
                    self._settle(place, answer)
                while place.has_room and (jobs := self._next_jobs(place)):
                    self._send(place, process, jobs)
                    if self._queue:
                        self._ring_one()
                if not await self._until_rung(place) and not (place.rung.is_set() or await self._lives(place, process)):
                    return
        except WorkerGone as error:
            self._lost(place, error)

    def _next_jobs(self, place: Place) -> list[Job]:
        """This worker's errands first."""
        while True:
            if place.errands:
                jobs = [place.errands.popleft()]
            elif place.line and any(self._places[index].is_free for index in self._processes):
                return []  # another can begin it at once
            else:
                jobs = self._queue.take(workers=len(self._processes), behind_another=bool(place.line))
            waiting = [job for job in jobs if not job.answer.done()]
            for job in jobs:
                if job.answer.done():  # its caller was cancelled
                    self._guard.abandoned(job.ticket)
            if waiting or not jobs:
                return waiting

    def _send(self, place: Place, process: WorkerProcess, jobs: list[Job]) -> None:
        now_us = time.time_ns() // 1000
        for job in jobs:
            job.attempts += 1
            job.taken_us = now_us
        if not place.line:
            place.began = time.monotonic()
        place.line.append(jobs)
        process.send(merged(jobs))

    def _settle(self, place: Place, answer: frames.Answer) -> None:
        """The answer to the first of the line. Raises: WorkerGone; TokenPinIncorrect, which the worker heard as it logged in anew."""
        jobs = place.line[0]
        parts = parted(jobs, answer)
        if parts is None:
            raise WorkerGone("the worker gave an answer to another question")
        place.line.popleft()
        began, place.began = place.began, time.monotonic()
        if (lane := jobs[0].lane) is not None:
            self._queue.answered(lane, items=sum(job.size for job in jobs), seconds=place.began - began)
        if place.line:
            now_us = time.time_ns() // 1000
            for job in place.line[0]:
                job.taken_us = now_us
        self._guard.answered(newest_ticket(jobs), answer)
        for job, part in zip(jobs, parts, strict=True):
            give(job, part)
        self._refuse_while_open()
        if (refusal := pin_refusal(answer)) is not None:
            raise refusal

    async def _until_rung(self, place: Place) -> bool:
        """False where an idle worker heard nothing for as long as it may. Raises: WorkerGone where it did not answer in time."""
        if place.line:
            bound = self._policy.bound(place.line[0][0].question).total_seconds()
            left = place.began + bound - time.monotonic()
        else:
            bound = left = self._policy.keepalive.total_seconds()
        if left <= 0 < bound and place.line:
            raise WorkerGone(f"the worker did not answer within {bound:g}s")
        try:
            async with asyncio.timeout(left if bound else None):
                await place.rung.wait()
        except TimeoutError:
            if place.line and not place.rung.is_set():
                raise WorkerGone(f"the worker did not answer within {bound:g}s") from None
            return False
        return True

    def _lost(self, place: Place, error: WorkerGone) -> None:
        """The first of the line may have been its death; what waited behind it was not begun."""
        while len(place.line) > 1:
            for job in reversed(place.line.pop()):
                job.attempts -= 1
                self._put_back(job, error)
        if place.line:
            jobs = place.line.pop()
            self._guard.failed(newest_ticket(jobs), error)
            for job in reversed(jobs):
                self._put_back(job, error)
        self._refuse_while_open()

    async def _lives(self, place: Place, process: WorkerProcess) -> bool:
        """Whether the worker reaches its token. Raises: TokenPinIncorrect."""
        place.pings = True
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

    def _refuse_while_open(self) -> None:
        """What waits when the breaker opens is refused at once: its callers have other replicas."""
        refusal = self._guard.refusal
        if refusal is not None and not self._guard.is_probing:
            self._drop_waiting(refusal)

    def _put_back(self, job: Job, error: WorkerGone) -> None:
        if job.answer.done() or job.ticket is None:
            give(job, frames.Done({}))  # an errand: the worker is gone, and what it held with it
        elif isinstance(job.question, frames.Create) or job.attempts >= _ATTEMPTS:
            give(job, frames.Failed(TokenUnavailable(error.detail)))
        else:
            self._queue.add(job, first=True)

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
        for job in self._queue.take_all():
            self._guard.abandoned(job.ticket)
            give(job, frames.Failed(self._again(error)))

    @staticmethod
    def _again(error: KeyreeveError) -> KeyreeveError:
        """A fresh exception for each caller: one object raised in many tasks would gather their tracebacks."""
        return TokenUnavailable(error.detail, retry_after=error.retry_after or timedelta(seconds=1))
