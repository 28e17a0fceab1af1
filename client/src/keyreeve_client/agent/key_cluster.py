"""The way to the key cluster: streams that live long; a request goes to the key server that can answer it soonest, to another when that fails.

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
from functools import partial
from time import monotonic
from typing import Any, cast

import grpc
from keyreeve_common.errors import ErrorCode, KeyreeveError, Unavailable
from keyreeve_common.identity import SpiffeId
from keyreeve_common.sign_socket import SignFrame
from keyreeve_common.telemetry import log, log_warning
from keyreeve_common.trace import make_trace
from keyreeve_common.v1 import keyserver_pb2, keyserver_pb2_grpc

from keyreeve_client.agent.alarms import Alarms
from keyreeve_client.agent.assignments import Clock, utc_now
from keyreeve_client.agent.balancer import Balancer, Fault, Replica, Settings, State
from keyreeve_client.agent.config import KeyServerConfig
from keyreeve_client.agent.flight import FAULTS, Flight
from keyreeve_client.agent.stream_group import Stream, StreamGroup
from keyreeve_client.channel import ReloadingChannel, SvidFiles
from keyreeve_client.sign_client import Answered, SignStreamClient, StreamLost, settle_future

_SHORT_S = 0.1  # what becomes of a request with less time than this says nothing of the replica: any local process can make such ones
_LINE_INTERVAL_S = 10.0
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
    channel: ReloadingChannel  # for probes; one of those that requests go over
    stream: Stream
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
        connections: int = 1,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._clock: Clock = clock
        self.alarms = Alarms()
        self._channels: list[ReloadingChannel] = []
        self._settings = settings or Settings()
        self.balancer = Balancer(len(addresses), self._settings, jitter=random.SystemRandom().random)
        self.servers = [
            self._server(address, files, server_id=server_id, replica=replica, connections=connections)
            for address, replica in zip(addresses, self.balancer.replicas, strict=True)
        ]
        self._look = asyncio.Event()
        self._sleeps_until: float | None = None  # until when the watcher does; None: for a first request
        self._watcher: asyncio.Task[None] | None = None
        self._probing: set[asyncio.Task[None]] = set()

    def begin(self, request: SignFrame, trace: bytes, ends_at: float, answered: Answered) -> Flight:
        """Sends a request off. `answered` gets the signature, from whichever key server gives it first, or a KeyreeveError: what the key server
        said, Unavailable when none is there, DeadlineExceeded at `ends_at` of the loop's clock. It may be called before this returns.

        Scheme and purpose go on as the client sent them; so does `trace`.
        """
        flight = Flight(self, request, trace, ends_at, answered)
        flight.start()
        return flight

    async def sign(self, request: SignFrame, trace: bytes = b"") -> bytes:
        """`begin` for a caller that awaits. Raises: what `begin` hands over."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bytes] = loop.create_future()
        ends_at = monotonic() + request.deadline_ms / 1000
        flight = self.begin(request, trace or make_trace(), ends_at, partial(settle_future, future))
        try:
            return await future
        finally:
            flight.cancel()

    async def close(self) -> None:
        tasks = [task for task in (self._watcher, *self._probing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self.servers:
            await server.stream.close()
        for channel in self._channels:
            await channel.close()
        self.alarms.close()

    def _server(
        self, address: str, files: SvidFiles, *, server_id: SpiffeId, replica: Replica, connections: int
    ) -> KeyServer:
        channels = [ReloadingChannel(address, files, server_id=server_id) for _ in range(connections)]
        self._channels += channels
        streams = [SignStreamClient(channel.current) for channel in channels]
        return KeyServer(address, channels[0], streams[0] if connections == 1 else StreamGroup(streams), replica)

    # What flights report

    def note_begin(self, index: int, scheme: int, now: float, *, hedge: bool) -> None:
        self.balancer.began(index, scheme, now, hedge=hedge)
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._probe_forever(), name="key-server-probes")
        elif self._sleeps_until is None or self._sleeps_until > now + self._settings.silence_s:
            self._look.set()

    def note_answer(self, index: int, scheme: int, took_s: float | None, now: float) -> None:
        """`took_s` is None for a refusal: it says nothing of how long a signature takes."""
        self.balancer.answered(index, scheme, now, took_s)
        server = self.servers[index]
        server.last_success = self._clock()
        self._back(server)

    def note_refusal(self, index: int, scheme: int, error: KeyreeveError, now: float) -> None:
        self.note_answer(index, scheme, None, now)
        if error.code in _DOUBTFUL:
            self.balancer.refused(index, scheme, now)

    def note_failure(self, index: int, scheme: int, error: KeyreeveError, *, had_s: float) -> None:
        """`had_s` is the time that the request had when it was sent there."""
        fault = Fault.LOST if isinstance(error, StreamLost) else FAULTS[error.code]
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
