"""Which of several replicas a request goes to, when it is asked for a second time, and which replica is left out. Pure: no I/O, time comes in.

Always true: a request goes to the ready replica with the least outstanding work; a replica that is lost, silent or far slower than the others is
ejected, except the last ready one; an ejected one comes back only after a probe that it answered; second requests on suspicion (hedges) are at
most `hedge_share` of all requests and a small burst, and none while replicas shed load. A class is a signature scheme: what a replica cannot
do or has too much of for one class says nothing of the others.

Times are seconds of one monotonic clock.
Spec: design section 5 step 5; docs/adr/0017-replicas-and-overload.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import StrEnum

_WINDOW = 128  # answers that a percentile is taken from
_RECOUNT = 16
_MIN_SAMPLES = 16
_UNMEASURED_HEDGE_S = 0.1
_EWMA = 0.1
_BURST = 10.0
_OUTLIER_FACTOR = 8.0
_OUTLIER_FLOOR_S = 0.1  # a replica that answers within this time is not ejected, however fast the others are
_SHED_QUIET_S = 1.0
_HOLD_S = 0.25
_LONGEST_HOLD_S = 5.0


class State(StrEnum):
    READY = "ready"
    SUSPECT = "suspect"  # silent: nothing new goes there until a probe tells
    EJECTED = "ejected"


class Fault(StrEnum):
    """What a failed request says of its replica."""

    LOST = "lost"  # the stream broke, ended or could not be opened: the whole replica
    ERROR = "error"  # it answered that it cannot; counts when it happens again and again
    CLASS = "class"  # it cannot do this class now (a token that is away)
    NONE = "none"  # nothing: the request came with too little time for anybody
    SHED = "shed"  # it has too much of this class


@dataclass(frozen=True, slots=True)
class Settings:
    """`hedge_share` is a share of all requests, 0 for no hedges."""

    hedge_floor_s: float = 0.02
    hedge_share: float = 0.03
    silence_s: float = 0.5
    errors: int = 3
    first_probe_s: float = 0.1
    longest_probe_s: float = 2.0
    longest_outlier_s: float = 30.0


@dataclass(slots=True)
class Latencies:
    """The times of the latest answers."""

    mean_s: float = 0.0
    count: int = 0
    _window: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _p50_s: float = 0.0
    _p95_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.mean_s = seconds if not self.count else self.mean_s + _EWMA * (seconds - self.mean_s)
        self.count += 1
        self._window.append(seconds)
        if self.count <= _MIN_SAMPLES or self.count % _RECOUNT == 0:
            ordered = sorted(self._window)
            self._p50_s = ordered[len(ordered) // 2]
            self._p95_s = ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]

    @property
    def measured(self) -> bool:
        return self.count >= _MIN_SAMPLES

    @property
    def p50_s(self) -> float:
        return self._p50_s

    @property
    def p95_s(self) -> float:
        return self._p95_s


@dataclass(slots=True)
class Lane:
    """One class of requests at one replica."""

    latencies: Latencies = field(default_factory=Latencies)
    held_until: float = 0.0
    refusals: int = 0  # in a row, of what another replica might know better


@dataclass(slots=True)
class Replica:
    """What is known of one replica. The counts grow; `outstanding` is that of now."""

    state: State = State.READY
    outstanding: int = 0
    unanswered: int = 0  # given up since the last answer: they weigh as if they were still there
    asked_since: float | None = None  # of the first request that no answer came after
    errors: int = 0
    failed_probes: int = 0
    relapses: int = 0  # ejections since the last answer: a probe that succeeds is no signature yet
    outlier_ejections: int = 0
    slow: bool = False  # ejected for its latency alone: better than none
    probe_at: float = 0.0
    probing: bool = False
    lanes: dict[int, Lane] = field(default_factory=dict)
    requests: int = 0
    answers: int = 0
    faults: int = 0
    hedges: int = 0  # second requests sent here
    ejections: int = 0

    @property
    def load(self) -> int:
        return self.outstanding + self.unanswered

    def lane(self, scheme: int) -> Lane:
        found = self.lanes.get(scheme)
        if found is None:
            found = self.lanes[scheme] = Lane()
        return found


class Balancer:
    """Replicas are known by their index. `jitter` gives 0.0 to 1.0, so that many agents do not probe in step."""

    def __init__(self, count: int, settings: Settings, *, jitter: Callable[[], float]) -> None:
        self.replicas = [Replica() for _ in range(count)]
        self._settings = settings
        self._jitter = jitter
        self._tokens = _BURST
        self._shed_at: dict[int, float] = {}
        self._answered_at: float | None = None

    # Who is asked

    def choose(self, scheme: int, now: float, *, avoid: Collection[int] = ()) -> int | None:
        """The best replica for a request. None when all are to be avoided.

        A ready one, if there is one; of those one that does not hold this class back; of those the one with the least outstanding. A class
        is held back as a preference only: a scheme tells neither the size of an RSA key nor the backend that a key lives in.
        """
        if len(self.replicas) == 1:
            return None if avoid else 0
        others = (index for index in range(len(self.replicas)) if index not in avoid)
        return min(others, key=lambda index: self._rank(index, scheme, now), default=None)

    def _rank(self, index: int, scheme: int, now: float) -> tuple[bool, bool, int, float, int]:
        replica = self.replicas[index]
        lane = replica.lanes.get(scheme)
        held = lane is not None and lane.held_until > now
        return replica.state is not State.READY, held, replica.load, lane.latencies.mean_s if lane else 0.0, index

    def hopeful(self, now: float, patience_s: float) -> bool:
        """Whether any replica answered lately, so that one more round of requests is worth its while."""
        return self._answered_at is not None and now - self._answered_at <= patience_s

    # What becomes of requests

    def began(self, index: int, scheme: int, now: float, *, hedge: bool = False) -> None:
        replica = self.replicas[index]
        replica.lane(scheme)
        replica.requests += 1
        replica.outstanding += 1
        if replica.asked_since is None:
            replica.asked_since = now
        if hedge:
            replica.hedges += 1
        else:
            self._tokens = min(_BURST, self._tokens + self._settings.hedge_share)

    def answered(self, index: int, scheme: int, now: float, took_s: float | None) -> None:
        """The replica gave a signature after `took_s`, or, None, a refusal that every replica would repeat."""
        replica = self.replicas[index]
        replica.answers += 1
        replica.errors = replica.relapses = 0
        self._answered_at = now
        self._heard(replica, now)
        if took_s is None:
            return
        lane = replica.lane(scheme)
        lane.refusals = 0
        lane.latencies.add(took_s)
        if replica.state is State.READY and self._is_outlier(index, scheme):
            self._eject(replica, now, outlier=True)

    def failed(self, index: int, scheme: int, now: float, *, fault: Fault, retry_after_s: float | None = None) -> None:
        replica = self.replicas[index]
        replica.faults += 1
        if fault is Fault.LOST:
            replica.outstanding -= 1
            self._eject(replica, now)
            return
        self._heard(replica, now)
        if fault is Fault.NONE:
            return
        if fault is Fault.ERROR:
            replica.errors += 1
            if replica.errors >= self._settings.errors:
                self._eject(replica, now)
            return
        lane = replica.lane(scheme)
        pause_s = _HOLD_S if retry_after_s is None else min(retry_after_s, _LONGEST_HOLD_S)
        lane.held_until = max(lane.held_until, now + pause_s)
        if fault is Fault.SHED:
            self._shed_at[scheme] = now

    def refused(self, index: int, scheme: int, now: float) -> None:
        """What the replica just answered is a refusal that another might not repeat (a catalog or clock that is behind).

        It counts as the answer, but refusals are quick: without this a replica that refuses all would have the least outstanding, and be
        asked first.
        """
        lane = self.replicas[index].lane(scheme)
        pause_s = min(_HOLD_S * 2 ** min(lane.refusals, 10), _LONGEST_HOLD_S)
        lane.refusals += 1
        lane.held_until = max(lane.held_until, now + pause_s)

    def given_up(self, index: int) -> None:
        """Nobody waits for this request any more: another answered first, its time was up, or its client left."""
        replica = self.replicas[index]
        replica.outstanding -= 1
        replica.unanswered += 1

    @staticmethod
    def _heard(replica: Replica, now: float) -> None:
        replica.outstanding -= 1
        replica.unanswered = 0
        replica.asked_since = now if replica.outstanding else None
        if replica.state is State.SUSPECT:
            replica.state = State.READY

    # Hedging

    def hedge_after(self, index: int, scheme: int, now: float, *, remaining_s: float) -> float | None:
        """How long to wait for the answer of a request that just began before another replica is asked too; None: never."""
        if self._settings.hedge_share <= 0 or len(self.replicas) < 2 or self._sheds(scheme, now):
            return None
        latencies = self.replicas[index].lane(scheme).latencies
        p95_s = latencies.p95_s if latencies.measured else _UNMEASURED_HEDGE_S
        return min(max(self._settings.hedge_floor_s, p95_s), remaining_s / 2)

    def take_hedge(self, scheme: int, now: float, *, avoid: Collection[int]) -> int | None:
        """The replica to ask as well, within the budget; None when there is no ready one, or the budget is used up."""
        if self._tokens < 1 or self._sheds(scheme, now):
            return None
        index = self.choose(scheme, now, avoid=avoid)
        if index is None or self.replicas[index].state is not State.READY:
            return None
        self._tokens -= 1
        return index

    def _sheds(self, scheme: int, now: float) -> bool:
        """Whether a replica lately had too much of this class: a second request would make it worse."""
        shed_at = self._shed_at.get(scheme)
        return shed_at is not None and now - shed_at < _SHED_QUIET_S

    # Ejection and probes

    def probes(self, now: float) -> list[int]:
        """The replicas to probe now; each is in this list once until `probed` says how it went."""
        due = []
        for index, replica in enumerate(self.replicas):
            if replica.state is State.READY and self._is_silent(replica, now):
                replica.state = State.SUSPECT
                replica.probe_at = now
            if replica.state is not State.READY and not replica.probing and replica.probe_at <= now:
                replica.probing = True
                due.append(index)
        return due

    def next_probe(self) -> float | None:
        """When `probes` may give something; None while no request is outstanding and no replica is out."""
        if len(self.replicas) < 2:
            return None  # there is no choice, so nothing to learn
        return min((time for replica in self.replicas if (time := self._due(replica)) is not None), default=None)

    def _due(self, replica: Replica) -> float | None:
        if replica.probing:
            return None
        if replica.state is not State.READY:
            return replica.probe_at
        return replica.asked_since + self._settings.silence_s if replica.asked_since is not None else None

    def probed(self, index: int, now: float, *, healthy: bool) -> bool:
        """Takes the replica back or puts the next probe off. True when requests that it holds are to be asked elsewhere."""
        replica = self.replicas[index]
        replica.probing = False
        if healthy:
            self._take_back(replica, now)
            return False
        if replica.state is State.READY:
            return False  # it answered a request meanwhile
        if replica.state is State.SUSPECT:
            return self._eject(replica, now)
        replica.failed_probes += 1
        replica.probe_at = now + self._pause(self._settings.first_probe_s, replica.failed_probes)
        return False

    def _is_silent(self, replica: Replica, now: float) -> bool:
        return replica.asked_since is not None and now - replica.asked_since >= self._settings.silence_s

    def _is_outlier(self, index: int, scheme: int) -> bool:
        if len(self.replicas) < 2:
            return False
        own = self.replicas[index].lane(scheme).latencies
        others = [
            replica.lanes[scheme].latencies.mean_s
            for other, replica in enumerate(self.replicas)
            if other != index and replica.state is State.READY and scheme in replica.lanes
            if replica.lanes[scheme].latencies.measured
        ]
        if not own.measured or not others:
            return False
        return own.mean_s > max(_OUTLIER_FLOOR_S, _OUTLIER_FACTOR * min(others))

    @staticmethod
    def _take_back(replica: Replica, now: float) -> None:
        if replica.state is State.EJECTED:
            replica.lanes = {}  # what it was like before says nothing
        replica.state = State.READY
        replica.slow = False
        replica.errors = replica.failed_probes = replica.unanswered = 0
        replica.asked_since = now if replica.outstanding else None

    def _eject(self, replica: Replica, now: float, *, outlier: bool = False) -> bool:
        """Whether it was ejected now. The last ready one stays until another is back; one that was out for being slow comes back for it."""
        if replica.state is State.EJECTED:
            return False
        if not outlier and not any(other is not replica and other.state is State.READY for other in self.replicas):
            for other in self.replicas:
                if other.state is State.EJECTED and other.slow:
                    self._take_back(other, now)
        if not any(other is not replica and other.state is State.READY for other in self.replicas):
            replica.state = State.READY
            replica.asked_since = now if replica.outstanding else None
            return False
        replica.state = State.EJECTED
        replica.ejections += 1
        replica.errors = 0
        replica.unanswered = 0
        replica.asked_since = None
        replica.failed_probes = 0
        replica.slow = outlier
        if outlier:
            replica.outlier_ejections += 1
            pause_s = min(self._settings.longest_outlier_s, float(2 ** min(replica.outlier_ejections - 1, 10)))
        else:
            pause_s = self._pause(self._settings.first_probe_s, replica.relapses)
            replica.failed_probes = replica.relapses
            replica.relapses += 1
        replica.probe_at = now + pause_s
        return True

    def _pause(self, first_s: float, failures: int) -> float:
        longest = min(self._settings.longest_probe_s, first_s * 2 ** min(failures, 16))
        return float(longest * (0.5 + self._jitter() / 2))
