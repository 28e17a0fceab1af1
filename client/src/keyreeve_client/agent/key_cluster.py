"""The way to the key cluster: one stream per key server; a request goes to the one that can answer it soonest, to another when that fails.

What may be asked again: a request whose stream broke, or that a replica could not or would not serve now. A signature may have been made of it
already; a second one of the same message by the same key tells nobody more than the first, and each is on record. What is not asked again: a
refusal of the caller or the request. `agent/balancer.py` decides; this module keeps its clock and carries out what it says.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

import grpc
from keyreeve_common.errors import DeadlineExceeded, ErrorCode, KeyreeveError, Unavailable
from keyreeve_common.identity import SpiffeId
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.sign_socket import SignFrame
from keyreeve_common.telemetry import log, log_warning
from keyreeve_common.trace import make_trace
from keyreeve_common.v1 import keyserver_pb2, keyserver_pb2_grpc

from keyreeve_client.agent.assignments import Clock, utc_now
from keyreeve_client.agent.balancer import Balancer, Fault, Replica, Settings, State
from keyreeve_client.agent.config import KeyServerConfig
from keyreeve_client.channel import ReloadingChannel, SvidFiles
from keyreeve_client.sign_client import SignStreamClient, StreamLost

_PATIENCE_S = 5.0  # a request that comes later than this after the cluster's last answer does not wait for a replica
_ROUND_S = (0.05, 0.1, 0.2, 0.4)
_MAX_SHED_ROUNDS = 1
_LATE_S = 0.01  # the sign socket's own deadline may end a flight a little before ours
_SHORT_S = 0.1  # what becomes of a request with less time than this says nothing of the replica: any local process can make such ones
_LINE_INTERVAL_S = 10.0
_SCHEMES = frozenset(int(scheme) for scheme in SignatureScheme)
_OTHER_SCHEME = 0
# What a failure says of its replica; a code that is not here is the answer, from whichever replica it came.
_FAULTS = {
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
_WHOLE_REPLICA = (Fault.LOST, Fault.ERROR)
_OF_THE_REQUESTS_TIME = (ErrorCode.OVERLOADED, ErrorCode.DEADLINE_EXCEEDED)
# Refusals that are the answer, and may yet tell of a replica that is behind: it is not to be the one that is asked first.
_DOUBTFUL = frozenset(
    {ErrorCode.KEY_NOT_FOUND, ErrorCode.UNAUTHENTICATED, ErrorCode.SVID_EXPIRED, ErrorCode.SVID_INVALID}
)


def balancer_settings(config: KeyServerConfig) -> Settings:
    return Settings(
        hedge_floor_s=config.hedge_floor.total_seconds(),
        hedge_share=config.hedge_percent / 100,
        silence_s=config.silence_timeout.total_seconds(),
        errors=config.max_errors,
    )


@dataclass(slots=True)
class Lines:
    """Lets one log line through in each interval, and counts the others: no fault, and no client, fills the log."""

    logged_at: float | None = None
    unlogged: int = 0

    def admit(self, now: float) -> int | None:
        """How many were kept back since the last; None where this one is."""
        if self.logged_at is not None and now - self.logged_at < _LINE_INTERVAL_S:
            self.unlogged += 1
            return None
        self.logged_at, unlogged, self.unlogged = now, self.unlogged, 0
        return unlogged


@dataclass(eq=False)
class KeyServer:
    """One key server, and how it did last."""

    address: str
    channel: ReloadingChannel
    stream: SignStreamClient
    replica: Replica
    last_success: datetime | None = None
    last_error: KeyreeveError | None = None
    said_lost: bool = False
    losses: Lines = field(default_factory=Lines)
    faults: dict[ErrorCode, Lines] = field(default_factory=dict)  # of one class of requests

    async def is_healthy(self, within_s: float) -> bool:
        """Asks for its health; waits for the connection, so that one that comes back is seen at once."""
        try:
            stub = keyserver_pb2_grpc.HealthStub(cast("Any", await self.channel.current()))
            said = await stub.Check(keyserver_pb2.HealthRequest(), timeout=within_s, wait_for_ready=True)
        except (grpc.RpcError, grpc.aio.UsageError, KeyreeveError):
            return False
        return bool(said.serving)


class KeyCluster:
    """Belongs to one event loop."""

    def __init__(
        self,
        addresses: tuple[str, ...],
        files: SvidFiles,
        *,
        server_id: SpiffeId,
        settings: Settings | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._clock: Clock = clock
        self._settings = settings or Settings()
        self.balancer = Balancer(len(addresses), self._settings, jitter=random.SystemRandom().random)
        self.servers = [
            self._server(address, files, server_id, replica)
            for address, replica in zip(addresses, self.balancer.replicas, strict=True)
        ]
        self._look = asyncio.Event()
        self._sleeps_until: float | None = None  # until when the watcher does; None: for a first request
        self._watcher: asyncio.Task[None] | None = None
        self._probing: set[asyncio.Task[None]] = set()

    async def sign(self, request: SignFrame, trace: bytes = b"") -> bytes:
        """The signature, from whichever key server gives it first. Scheme and purpose go on as the client sent them; so does `trace`.

        Raises: KeyreeveError as the key server said it; Unavailable when none is there; DeadlineExceeded.
        """
        if not self.servers:
            raise Unavailable("no key server is configured")
        return await _Flight(self, request, trace or make_trace()).run()

    async def close(self) -> None:
        tasks = [task for task in (self._watcher, *self._probing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self.servers:
            await server.stream.close()
            await server.channel.close()

    def _server(self, address: str, files: SvidFiles, server_id: SpiffeId, replica: Replica) -> KeyServer:
        channel = ReloadingChannel(address, files, server_id=server_id)
        return KeyServer(address, channel, SignStreamClient(channel.current), replica)

    # What flights report

    def note_begin(self, index: int, scheme: int, now: float, *, hedge: bool) -> None:
        self.balancer.began(index, scheme, now, hedge=hedge)
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._probe_forever(), name="key-server-probes")
        elif self._sleeps_until is None or self._sleeps_until > now + self._settings.silence_s:
            self._look.set()

    def note_answer(self, index: int, scheme: int, took_s: float | None) -> None:
        """`took_s` is None for a refusal: it says nothing of how long a signature takes."""
        self.balancer.answered(index, scheme, asyncio.get_running_loop().time(), took_s)
        server = self.servers[index]
        server.last_success = self._clock()
        self._back(server)

    def note_refusal(self, index: int, scheme: int, error: KeyreeveError) -> None:
        self.note_answer(index, scheme, None)
        if error.code in _DOUBTFUL:
            self.balancer.refused(index, scheme, asyncio.get_running_loop().time())

    def note_failure(self, index: int, scheme: int, error: KeyreeveError, *, had_s: float) -> None:
        """`had_s` is the time that the request had when it was sent there."""
        fault = Fault.LOST if isinstance(error, StreamLost) else _FAULTS[error.code]
        if error.code in _OF_THE_REQUESTS_TIME and had_s < _SHORT_S:
            fault = Fault.NONE
        retry_s = error.retry_after.total_seconds() if error.retry_after is not None else None
        server, now = self.servers[index], asyncio.get_running_loop().time()
        was = server.replica.state
        self.balancer.failed(index, scheme, now, fault=fault, retry_after_s=retry_s)
        if fault in _WHOLE_REPLICA:
            self._away(server, error)
        elif fault is Fault.CLASS:  # the rest of it serves: it is neither lost nor back at each turn
            unlogged = server.faults.setdefault(error.code, Lines()).admit(now)
            if unlogged is not None:
                code, detail = error.code.value, error.detail
                log_warning("key_server_fault", address=server.address, code=code, detail=detail, unlogged=unlogged)
        self._log_ejection(server, was, error.detail)

    def note_silence(self, index: int, waited_s: float) -> None:
        if waited_s >= self._settings.silence_s:  # else the request was in a hurry, and the replica not silent
            self._away(self.servers[index], Unavailable("key server did not answer in time"))

    def _back(self, server: KeyServer) -> None:
        if server.said_lost:
            log("key_server_back", address=server.address)
        server.said_lost = False
        server.last_error = None

    @staticmethod
    def _away(server: KeyServer, error: KeyreeveError) -> None:
        """Where it fails and serves by turns, not each turn is a line; one that stays away is said to be."""
        server.last_error = error
        if not server.said_lost and (unlogged := server.losses.admit(asyncio.get_running_loop().time())) is not None:
            server.said_lost = True
            code, detail = error.code.value, error.detail
            log_warning("key_server_lost", address=server.address, code=code, detail=detail, unlogged=unlogged)

    def _log_ejection(self, server: KeyServer, was: State, detail: str) -> None:
        if server.replica.state is State.EJECTED and was is not State.EJECTED:
            log_warning("key_server_ejected", address=server.address, detail=detail)
            self._look.set()

    # Probes

    async def _probe_forever(self) -> None:
        """Sleeps until a replica may be silent or is due for a probe; while nothing is outstanding and none is out, until woken."""
        loop = asyncio.get_running_loop()
        while True:
            self._look.clear()
            for index in self.balancer.probes(loop.time()):
                task = asyncio.create_task(self._probe(index), name="key-server-probe")
                self._probing.add(task)
                task.add_done_callback(self._probing.discard)
            due = self.balancer.next_probe()
            self._sleeps_until = max(due, loop.time() + 0.01) if due is not None else None
            try:
                async with asyncio.timeout_at(self._sleeps_until):
                    await self._look.wait()
            except TimeoutError:
                continue

    async def _probe(self, index: int) -> None:
        server = self.servers[index]
        was = server.replica.state
        healthy = await server.is_healthy(self._settings.silence_s)
        orphaned = self.balancer.probed(index, asyncio.get_running_loop().time(), healthy=healthy)
        self._look.set()
        if orphaned:
            error = StreamLost("key server takes requests and answers nothing")
            self._away(server, error)
            self._log_ejection(server, was, error.detail)
            server.stream.abandon(error)
        elif healthy and was is State.EJECTED:
            log("key_server_taken_back", address=server.address)
            self._back(server)


@dataclass(frozen=True, slots=True)
class _Attempt:
    index: int
    began: float
    had_s: float


@dataclass(slots=True)
class _Flight:
    """One request under way, at one replica or at two."""

    cluster: KeyCluster
    request: SignFrame
    trace: bytes  # one for all attempts: they are one request
    attempts: dict[asyncio.Future[bytes], _Attempt] = field(default_factory=dict)
    tried: set[int] = field(default_factory=set)
    rounds: int = 0
    hedge_at: float | None = None
    error: KeyreeveError | None = None
    hopeful: bool = False

    async def run(self) -> bytes:
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + self.request.deadline_ms / 1000
        scheme = self.request.scheme if self.request.scheme in _SCHEMES else _OTHER_SCHEME
        trace = self.trace
        self.hopeful = self.cluster.balancer.hopeful(loop.time(), _PATIENCE_S)
        try:
            while True:
                now = loop.time()
                if not self.attempts:
                    index = self.cluster.balancer.choose(scheme, now, avoid=self.tried)
                    if index is None:
                        await self._next_round(now, ends_at)
                        continue
                    self._begin(index, scheme, trace, ends_at=ends_at)
                    continue
                wake_at = min(ends_at, self.hedge_at) if self.hedge_at is not None else ends_at
                done, _ = await asyncio.wait(
                    self.attempts, timeout=max(wake_at - now, 0), return_when="FIRST_COMPLETED"
                )
                for answer in done:
                    signature = self._settle(answer, scheme)
                    if signature is not None:
                        return signature
                if not done and loop.time() >= ends_at:
                    raise DeadlineExceeded("key server did not answer in time")
                if not done:
                    self._hedge(scheme, trace, ends_at=ends_at)
        finally:
            now = loop.time()
            late = now >= ends_at - _LATE_S
            for answer, attempt in self.attempts.items():
                if not answer.cancel():
                    answer.exception()  # looked at: the other attempt's answer came in the same turn of the loop
                self.cluster.balancer.given_up(attempt.index)
                if late:
                    self.cluster.note_silence(attempt.index, now - attempt.began)

    def _begin(self, index: int, scheme: int, trace: bytes, *, ends_at: float, hedge: bool = False) -> None:
        """Asks one replica; what its stream refuses at once counts as its answer."""
        now, request, balancer = asyncio.get_running_loop().time(), self.request, self.cluster.balancer
        self.tried.add(index)
        self.cluster.note_begin(index, scheme, now, hedge=hedge)
        try:
            answer = self.cluster.servers[index].stream.begin(
                request.key_id, request.scheme, request.purpose, message=request.message, ends_at=ends_at, trace=trace
            )
        except KeyreeveError as error:
            answer = asyncio.get_running_loop().create_future()
            answer.set_exception(error)
        self.attempts[answer] = _Attempt(index, now, ends_at - now)
        if hedge:
            self.hedge_at = None
        else:
            after_s = balancer.hedge_after(index, scheme, now, remaining_s=ends_at - now)
            self.hedge_at = now + after_s if after_s is not None else None

    def _settle(self, answer: asyncio.Future[bytes], scheme: int) -> bytes | None:
        """The signature, or None after a failure that another replica may not repeat. Raises: every other refusal."""
        attempt = self.attempts.pop(answer)
        error = answer.exception()
        if error is None:
            self.cluster.note_answer(attempt.index, scheme, asyncio.get_running_loop().time() - attempt.began)
            return answer.result()
        if not isinstance(error, KeyreeveError):
            self.cluster.balancer.given_up(attempt.index)
            raise error
        if isinstance(error, StreamLost) or error.code in _FAULTS:
            self.cluster.note_failure(attempt.index, scheme, error, had_s=attempt.had_s)
            self.error = error
            return None
        self.cluster.note_refusal(attempt.index, scheme, error)
        raise error

    def _hedge(self, scheme: int, trace: bytes, *, ends_at: float) -> None:
        self.hedge_at = None
        now = asyncio.get_running_loop().time()
        index = self.cluster.balancer.take_hedge(scheme, now, avoid=self.tried)
        if index is not None:
            self._begin(index, scheme, trace, ends_at=ends_at, hedge=True)

    async def _next_round(self, now: float, ends_at: float) -> None:
        """All replicas failed: waits a little for the first to come back. Raises: what the last one said, when that is no use."""
        error = self.error or Unavailable("no key server is there")
        pause_s = _ROUND_S[min(self.rounds, len(_ROUND_S) - 1)]
        if error.retry_after is not None:
            pause_s = max(pause_s, error.retry_after.total_seconds())
        shed_again = error.code is ErrorCode.OVERLOADED and self.rounds >= _MAX_SHED_ROUNDS
        no_use = shed_again or not isinstance(error, Unavailable) or error.code is ErrorCode.VAULT_ACCESS_DENIED
        if len(self.cluster.servers) == 1 or no_use or not self.hopeful or now + pause_s >= ends_at:
            raise error
        self.rounds += 1
        self.tried.clear()
        await asyncio.sleep(pause_s * random.uniform(1.0, 1.25))  # noqa: S311 - spreads load, keeps no secret
