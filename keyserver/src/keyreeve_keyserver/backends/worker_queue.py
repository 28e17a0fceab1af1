"""What waits for a worker, by lane: signatures that arrive while the workers are busy go out together in the next question.

There is no timer: a lone request waits for nobody. Lanes take turns, and a question that is no signature waits in a lane of its own. Pure.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from keyreeve_keyserver.backends import worker_frames as frames
from keyreeve_keyserver.domain.breaker import Ticket

QUESTION_S = (
    0.005  # a slow token gets fewer signatures in a question, so that other requests and the time-outs stay near
)
_PACE_WEIGHT = 1 / 8


@dataclass(frozen=True, slots=True)
class Lane:
    """Signatures of one `name` may go to one worker in one question: `most` of them, and `least` even while other workers are idle.

    `paced`: fewer where they take longer than `QUESTION_S` together.
    """

    name: Hashable
    most: int
    least: int = 1
    paced: bool = True


@dataclass(slots=True, eq=False)
class Job:
    """One caller's question. `lane` stands beside a TokenSign only; an errand for one worker has no ticket."""

    question: frames.Question
    answer: asyncio.Future[frames.Answer]
    ticket: Ticket | None
    lane: Lane | None = None
    timer: asyncio.TimerHandle | None = None
    attempts: int = field(default=0)
    taken_us: int = field(default=0)  # when a worker last took it, Unix microseconds

    @property
    def size(self) -> int:
        return len(self.question.items) if isinstance(self.question, frames.TokenSign) else 1


@dataclass(slots=True)
class _Waiting:
    lane: Lane | None
    jobs: deque[Job] = field(default_factory=deque)
    items: int = 0


class JobQueue:
    def __init__(self) -> None:
        self._lanes: OrderedDict[Hashable, _Waiting] = OrderedDict()
        self._count = 0
        self._pace: dict[Hashable, float] = {}

    def __len__(self) -> int:
        """How many jobs wait."""
        return self._count

    def add(self, job: Job, *, first: bool = False) -> None:
        name = None if job.lane is None else job.lane.name
        waiting = self._lanes.get(name)
        if waiting is None:
            waiting = self._lanes[name] = _Waiting(job.lane)
        if first:
            waiting.jobs.appendleft(job)
            self._lanes.move_to_end(name, last=False)
        else:
            waiting.jobs.append(job)
        waiting.items += job.size
        self._count += 1

    def remove(self, job: Job) -> bool:
        """Whether it still waited."""
        name = None if job.lane is None else job.lane.name
        waiting = self._lanes.get(name)
        if waiting is None or job not in waiting.jobs:
            return False
        waiting.jobs.remove(job)
        self._took(name, waiting, [job])
        return True

    def take(self, *, workers: int, behind_another: bool = False) -> list[Job]:
        """The jobs of the next question, in their order; none where nothing waits.

        `behind_another`: the worker has not answered its last one; only signatures may follow that.
        """
        if not self._lanes:
            return []
        name, waiting = next(iter(self._lanes.items()))
        if waiting.lane is None and behind_another:
            return []
        jobs = [waiting.jobs.popleft()]
        if waiting.lane is not None:
            limit, size = self._limit(waiting, workers), jobs[0].size
            while waiting.jobs and size + waiting.jobs[0].size <= limit:
                jobs.append(waiting.jobs.popleft())
                size += jobs[-1].size
        self._lanes.move_to_end(name)
        self._took(name, waiting, jobs)
        return jobs

    def take_all(self) -> list[Job]:
        jobs = [job for waiting in self._lanes.values() for job in waiting.jobs]
        self._lanes.clear()
        self._count = 0
        return jobs

    def answered(self, lane: Lane, *, items: int, seconds: float) -> None:
        """Takes note of how fast the workers are."""
        if lane.paced:
            now = seconds / items
            before = self._pace.get(lane.name, now)
            self._pace[lane.name] = before + (now - before) * _PACE_WEIGHT

    def share(self, lane: Lane, items: int, *, workers: int) -> int:
        """How many of `items` signatures one worker gets while others could take theirs."""
        most = lane.most
        pace = self._pace.get(lane.name, 0.0)
        if pace * most > QUESTION_S:
            most = max(int(QUESTION_S / pace), 1)
        return min(most, max(lane.least, -(-items // max(workers, 1))))

    def _limit(self, waiting: _Waiting, workers: int) -> int:
        return self.share(waiting.lane, waiting.items, workers=workers) if waiting.lane is not None else 1

    def _took(self, name: Hashable, waiting: _Waiting, jobs: Sequence[Job]) -> None:
        self._count -= len(jobs)
        if waiting.jobs:
            waiting.items -= sum(job.size for job in jobs)
        else:
            del self._lanes[name]


def merged(jobs: Sequence[Job]) -> frames.Question:
    """The one question that these jobs make: several are all TokenSign."""
    if len(jobs) == 1:
        return jobs[0].question
    return frames.TokenSign(
        tuple(item for job in jobs if isinstance(job.question, frames.TokenSign) for item in job.question.items)
    )


def parted(jobs: Sequence[Job], answer: frames.Answer) -> list[frames.Answer] | None:
    """The answer to each of the jobs, None where there is not one outcome for each of their signatures."""
    if isinstance(answer, frames.TokenSigned) and jobs[0].lane is not None:
        if len(answer.outcomes) != sum(job.size for job in jobs):
            return None
        if len(jobs) == 1:
            return [answer]
        parts: list[frames.Answer] = []
        at = 0
        for job in jobs:
            parts.append(frames.TokenSigned(answer.outcomes[at : at + job.size]))
            at += job.size
        return parts
    return [answer] * len(jobs)
