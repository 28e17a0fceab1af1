"""One request under way, at one replica or at two: begun, hedged, asked again, ended. `agent/key_cluster.py` says what may be asked again.

It runs in callbacks, not in a task: a task, its timers and its waiting cost more than all the rest of a request. Times are of the monotonic
clock, which is the loop's own; uvloop's `time` would give the same in whole milliseconds, as of the beginning of the loop's turn.
"""

from __future__ import annotations

import random
from time import monotonic
from typing import TYPE_CHECKING

from keyreeve_common.errors import DeadlineExceeded, ErrorCode, KeyreeveError, Unavailable
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.sign_socket import SignFrame

from keyreeve_client.agent.balancer import Fault
from keyreeve_client.sign_client import Answered, Outcome, Pending, StreamLost

if TYPE_CHECKING:
    from keyreeve_client.agent.key_cluster import KeyCluster

_PATIENCE_S = 5.0  # a request that comes later than this after the cluster's last answer does not wait for a replica
_ROUND_S = (0.05, 0.1, 0.2, 0.4)
_MAX_SHED_ROUNDS = 1
_LATE_S = 0.01  # a client that leaves this shortly before its deadline found its replicas silent
_SCHEMES = frozenset(int(scheme) for scheme in SignatureScheme)
_OTHER_SCHEME = 0
# What a failure says of its replica; a code that is not here is the answer, from whichever replica it came.
FAULTS = {
    ErrorCode.UNAVAILABLE: Fault.ERROR,
    ErrorCode.STORAGE_FULL: Fault.ERROR,
    ErrorCode.STORAGE_BUSY: Fault.ERROR,
    ErrorCode.AUDIT_UNAVAILABLE: Fault.ERROR,
    ErrorCode.TOKEN_UNAVAILABLE: Fault.CLASS,
    ErrorCode.TOKEN_SESSIONS_EXHAUSTED: Fault.CLASS,
    ErrorCode.TOKEN_PIN_INCORRECT: Fault.CLASS,
    ErrorCode.VAULT_ACCESS_DENIED: Fault.CLASS,
    ErrorCode.KEY_SELF_TEST_FAILED: Fault.CLASS,  # its token, its key-encryption key, or a fault in it: not of the request
    ErrorCode.SEALED_RECORD_INVALID: Fault.CLASS,
    ErrorCode.INTERNAL: Fault.CLASS,
    ErrorCode.DEADLINE_EXCEEDED: Fault.CLASS,  # said by the key server: its backend is slow, or its own bound is short
    ErrorCode.OVERLOADED: Fault.SHED,
}


class _Attempt:
    """The request at one replica."""

    __slots__ = ("began", "flight", "had_s", "index", "pending")

    def __init__(self, flight: Flight, index: int, began: float, had_s: float) -> None:
        self.flight = flight
        self.index = index
        self.began = began
        self.had_s = had_s
        self.pending: Pending | None = None

    def settled(self, outcome: Outcome) -> None:
        self.flight.settled(self, outcome)


class Flight:
    """`cancel` it when nobody wants its outcome any more; after the outcome that does nothing."""

    __slots__ = (
        "_answered", "_attempts", "_cluster", "_ends_at", "_error", "_hedge_at", "_hopeful", "_request", "_round_at",
        "_rounds", "_scheme", "_trace", "_tried", "slot",
    )  # fmt: skip

    def __init__(
        self, cluster: KeyCluster, request: SignFrame, trace: bytes, ends_at: float, answered: Answered
    ) -> None:
        self._cluster = cluster
        self._request = request
        self._trace = trace  # one for all attempts: they are one request
        self._ends_at = ends_at
        self._answered: Answered | None = answered
        self._scheme = request.scheme if request.scheme in _SCHEMES else _OTHER_SCHEME
        self._attempts: list[_Attempt] = []
        self._tried: set[int] = set()
        self._rounds = 0
        self._hedge_at: float | None = None
        self._round_at: float | None = None
        self._error: KeyreeveError | None = None
        self._hopeful = False
        self.slot = 0

    def start(self) -> None:
        now = monotonic()
        self._hopeful = self._cluster.balancer.hopeful(now, _PATIENCE_S)
        self._try_next(now)

    def cancel(self) -> None:
        if self._answered is not None:
            self._answered = None
            self._leave(monotonic())

    def wake(self, now: float) -> None:
        """By its alarm: the deadline, a hedge, or the next round of all replicas is due."""
        if now >= self._ends_at:
            self._end(DeadlineExceeded("key server did not answer in time"), now)
        elif self._round_at is not None and now >= self._round_at:
            self._round_at = None
            self._try_next(now)
        elif self._hedge_at is not None and now >= self._hedge_at:
            self._hedge(now)
        else:
            self._set_alarm()

    def settled(self, attempt: _Attempt, outcome: Outcome) -> None:
        """A replica answered."""
        now = monotonic()
        self._attempts.remove(attempt)
        cluster, index, scheme = self._cluster, attempt.index, self._scheme
        if not isinstance(outcome, KeyreeveError):
            cluster.note_answer(index, scheme, now - attempt.began, now)
            self._end(outcome, now)
        elif isinstance(outcome, StreamLost) or outcome.code in FAULTS:
            cluster.note_failure(index, scheme, outcome, had_s=attempt.had_s)
            self._error = outcome
            if not self._attempts:
                self._try_next(now)
        else:
            cluster.note_refusal(index, scheme, outcome, now)
            self._end(outcome, now)

    def _try_next(self, now: float) -> None:
        """Asks the best replica that was not asked in this round."""
        index = self._cluster.balancer.choose(self._scheme, now, avoid=self._tried)
        if index is None:
            self._next_round(now)
        else:
            self._ask(index, now)

    def _ask(self, index: int, now: float, *, hedge: bool = False) -> None:
        cluster, request, scheme = self._cluster, self._request, self._scheme
        self._tried.add(index)
        cluster.note_begin(index, scheme, now, hedge=hedge)
        attempt = _Attempt(self, index, now, self._ends_at - now)
        self._attempts.append(attempt)
        if hedge:
            self._hedge_at = None
        else:
            after_s = cluster.balancer.hedge_after(index, scheme, now, remaining_s=attempt.had_s)
            self._hedge_at = now + after_s if after_s is not None else None
        try:
            attempt.pending = cluster.servers[index].stream.begin(
                request.key_id,
                request.scheme,
                request.purpose,
                message=request.message,
                ends_at=self._ends_at,
                answered=attempt.settled,
                trace=self._trace,
            )
        except KeyreeveError as error:  # what its stream refuses at once counts as its answer
            self.settled(attempt, error)
        else:
            if self._answered is not None and attempt in self._attempts:
                self._set_alarm()

    def _set_alarm(self) -> None:
        at = self._ends_at
        for time in (self._hedge_at, self._round_at):
            if time is not None and time < at:
                at = time
        self._cluster.alarms.set(self, at)

    def _hedge(self, now: float) -> None:
        self._hedge_at = None
        index = self._cluster.balancer.take_hedge(self._scheme, now, avoid=self._tried)
        if index is not None:
            self._ask(index, now, hedge=True)
        else:
            self._set_alarm()

    def _next_round(self, now: float) -> None:
        """All replicas failed: waits a little for the first to come back, or ends with what the last one said where that is no use."""
        error = self._error or Unavailable("no key server is there")
        pause_s = _ROUND_S[min(self._rounds, len(_ROUND_S) - 1)]
        if error.retry_after is not None:
            pause_s = max(pause_s, error.retry_after.total_seconds())
        shed_again = error.code is ErrorCode.OVERLOADED and self._rounds >= _MAX_SHED_ROUNDS
        no_use = shed_again or not isinstance(error, Unavailable) or error.code is ErrorCode.VAULT_ACCESS_DENIED
        if len(self._cluster.servers) == 1 or no_use or not self._hopeful or now + pause_s >= self._ends_at:
            self._end(error, now)
            return
        self._rounds += 1
        self._tried.clear()
        self._hedge_at = None
        self._round_at = now + pause_s * random.uniform(1.0, 1.25)  # noqa: S311 - spreads load, keeps no secret
        self._set_alarm()

    def _end(self, outcome: Outcome, now: float) -> None:
        answered, self._answered = self._answered, None
        self._leave(now)
        if answered is not None:
            answered(outcome)

    def _leave(self, now: float) -> None:
        """Gives up what is still outstanding."""
        self._cluster.alarms.clear(self)
        if not self._attempts:
            return
        attempts, self._attempts = self._attempts, []
        late = now >= self._ends_at - _LATE_S
        for attempt in attempts:
            if attempt.pending is not None:
                attempt.pending.cancel()
            self._cluster.balancer.given_up(attempt.index)
            if late:
                self._cluster.note_silence(attempt.index, now - attempt.began)
