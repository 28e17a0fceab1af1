"""The sign socket: frames of local processes in, signatures or refusals out (docs/protocol/sign-socket.md).

Always true: a request is forwarded only after its peer was authorised for its key at that moment; an unknown key and a forbidden one are
answered with the same bytes; connections, outstanding requests and unread answers are bounded; no input crashes the agent. Purpose and
scheme go on untouched: the key server decides on them, so that every such refusal is recorded in one place.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic
from typing import Protocol, cast

from keyreeve_common.client_frames import BadFrame, ClientFrames
from keyreeve_common.errors import (
    DeadlineExceeded,
    Internal,
    KeyreeveError,
    MalformedFrame,
    RateLimited,
    Unauthenticated,
)
from keyreeve_common.key_id import KeyId
from keyreeve_common.sign_socket import SIGNED, VERSION, PingFrame, PongFrame, RefusedFrame, SignFrame
from keyreeve_common.telemetry import log_exception, log_warning
from keyreeve_common.trace import TraceIds
from keyreeve_common.tracing import Span, Tracing

from keyreeve_client.agent.authorisation import Selector
from keyreeve_client.agent.config import SignSocketConfig
from keyreeve_client.agent.counts import Counts
from keyreeve_client.agent.workload import COSTLY_KINDS, Peer
from keyreeve_client.sign_client import Answered, Outcome

_BUSY = timedelta(milliseconds=50)
WRITE_HIGH_WATER = 256 * 1024
_SIGNED_HEAD = struct.Struct(">IBBIH")  # length, version, type, request_id, signature_len
_SIGNED_BODY_BYTES = _SIGNED_HEAD.size - 4


class Keys(Protocol):
    """What the agent may serve now."""

    def kinds_to_learn(self, key_id: KeyId, known: Set[Selector], costly: Set[str]) -> frozenset[str]: ...

    def check(self, key_id: KeyId, selectors: Set[Selector]) -> None:
        """Raises: KeyNotFound, SvidExpired."""


class Cancellable(Protocol):
    def cancel(self) -> object: ...


class Forward(Protocol):
    """Asks the key cluster. Spec: KeyCluster.begin, whose outcome comes by `ends_at`, at times before it returns."""

    def __call__(self, request: SignFrame, trace: bytes, ends_at: float, answered: Answered, /) -> Cancellable: ...


REQUEST_SPAN = "agent.sign"


@dataclass
class SignServer:
    """Makes one SignConnection for each client; `forward` asks the key cluster."""

    config: SignSocketConfig
    keys: Keys
    forward: Forward
    counts: Counts = field(default_factory=Counts)
    tracing: Tracing = field(default_factory=Tracing)
    open: set[SignConnection] = field(default_factory=set)
    draining: bool = False
    attestors: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "attest"))
    traces: TraceIds = field(default_factory=TraceIds)
    _listener: asyncio.Server | None = None
    _answered: list[SignConnection] = field(default_factory=list)
    _idle: asyncio.Event | None = None

    async def start(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_unix_server(lambda: SignConnection(self), sock=listener, backlog=1024)

    async def drain(self, limit: timedelta) -> None:
        """Takes no more connections or requests, answers what is outstanding, and closes."""
        self.draining = True
        if self._listener is not None:
            self._listener.close()
        for connection in list(self.open):
            connection.stop_reading()
        self._idle = asyncio.Event()
        if self.counts.outstanding_total:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit.total_seconds()):
                    await self._idle.wait()
        for connection in list(self.open):
            connection.close()
        self.attestors.shutdown(wait=False, cancel_futures=True)

    def refuse_connection(self, uid: int) -> KeyreeveError | None:
        """Why one more connection of this user is not taken, None when it is."""
        if self.draining:
            return RateLimited("agent is stopping", retry_after=timedelta(seconds=1))
        if self.counts.connections >= self.config.max_connections:
            return RateLimited(f"agent has its {self.config.max_connections} connections", retry_after=_BUSY)
        if self.counts.of_uid[uid] >= self.config.max_connections_per_uid:
            limit = self.config.max_connections_per_uid
            return RateLimited(f"user {uid} has the {limit} connections allowed to one user", retry_after=_BUSY)
        return None

    def ended(self, uid: int) -> None:
        """A request of this user is over."""
        self.counts.ended(uid)
        if self._idle is not None and not self.counts.outstanding_total:
            self._idle.set()

    def answer_soon(self, connection: SignConnection) -> None:
        """Answers of one turn of the loop leave in one write for each connection, and all of these from one callback."""
        if not self._answered:
            asyncio.get_running_loop().call_soon(self._flush)
        self._answered.append(connection)

    def _flush(self) -> None:
        connections, self._answered = self._answered, []
        for connection in connections:
            connection.flush()


class _Served:
    """One request of a connection, from its frame to its answer."""

    __slots__ = ("began", "connection", "flight", "learning", "request", "span", "uid")

    def __init__(self, connection: SignConnection, request: SignFrame, uid: int, began: float) -> None:
        self.connection = connection
        self.request = request
        self.uid = uid
        self.began = began
        self.flight: Cancellable | None = None
        self.learning: asyncio.Task[None] | None = None
        self.span: Span | None = None

    def answered(self, outcome: Outcome) -> None:
        self.connection.answered(self, outcome)

    def cancel(self) -> None:
        if self.learning is not None:
            self.learning.cancel()
        if self.flight is not None:
            self.flight.cancel()


class SignConnection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: SignServer) -> None:
        self._server = server
        self._frames = ClientFrames()
        self._outstanding: dict[int, _Served] = {}
        self._peer: Peer | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._paused = False
        self._learning = asyncio.Lock()
        self._answers: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # stream sockets have no other; uvloop's is no subclass
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        try:
            peer = Peer(transport.get_extra_info("socket"))
        except (Unauthenticated, RateLimited) as error:
            self._turn_away(error)
            return
        if (refusal := self._server.refuse_connection(peer.uid)) is not None:
            peer.close()
            self._turn_away(refusal)
            return
        self._peer = peer
        self._server.open.add(self)
        self._server.counts.connections += 1
        self._server.counts.of_uid[peer.uid] += 1

    def _turn_away(self, error: KeyreeveError) -> None:
        self._refuse(0, error)
        self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._stall is not None:
            self._stall.cancel()
        outstanding, self._outstanding = self._outstanding, {}
        for served in outstanding.values():
            self._server.ended(served.uid)
            served.cancel()
            if served.span is not None:
                served.span.end(error="cancelled")
        if self._peer is None:
            return
        self._server.open.discard(self)
        counts = self._server.counts
        counts.connections -= 1
        counts.of_uid[self._peer.uid] -= 1
        if not counts.of_uid[self._peer.uid]:
            del counts.of_uid[self._peer.uid]
        self._peer.close()
        self._peer = None

    def data_received(self, data: bytes) -> None:
        if self._peer is None or self._transport.is_closing():
            return
        now = monotonic()
        allowed: set[KeyId] = set()  # authorised in this read: its frames are of one moment
        for frame in self._frames.feed(data):
            if isinstance(frame, SignFrame):
                self._accept(self._peer, frame, now, allowed)
            elif isinstance(frame, PingFrame):
                self._send(PongFrame(frame.payload).to_bytes())
            else:
                self._refuse_frame(frame)
            if self._transport.is_closing():
                return

    def eof_received(self) -> None:
        """The client left; what it asked for is cancelled once the connection is closed."""
        self.close()

    # A client that does not read its answers is not read from either, and is cut off when that lasts.
    def pause_writing(self) -> None:
        self._paused = True
        self._transport.pause_reading()
        self._arm_stall()

    def resume_writing(self) -> None:
        self._paused = False
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        if not self._server.draining and not self._transport.is_closing():
            self._transport.resume_reading()

    def stop_reading(self) -> None:
        if not self._paused and not self._transport.is_closing():
            self._transport.pause_reading()

    def close(self) -> None:
        """Closes after what was written has left, or after the stall timeout."""
        self.flush()
        self._transport.close()
        self._arm_stall()

    def _arm_stall(self) -> None:
        if self._stall is None:
            delay = self._server.config.stall_timeout.total_seconds()
            self._stall = asyncio.get_running_loop().call_later(delay, self._transport.abort)

    def _refuse_frame(self, frame: BadFrame) -> None:
        if frame.final:
            self._fail(frame.request_id, frame.error)
        else:
            self._refuse(frame.request_id, frame.error)

    def _accept(self, peer: Peer, request: SignFrame, now: float, allowed: set[KeyId]) -> None:
        if request.request_id in self._outstanding:
            self._fail(request.request_id, MalformedFrame(f"request_id {request.request_id} is outstanding already"))
            return
        if (full := self._full(peer.uid)) is not None:
            self._refuse(request.request_id, RateLimited(f"{full} requests outstanding", retry_after=_BUSY))
            return
        server = self._server
        served = _Served(self, request, peer.uid, now)
        server.counts.began(peer.uid)
        self._outstanding[request.request_id] = served
        if server.tracing.records:
            served.span = server.tracing.root(REQUEST_SPAN, {"keyreeve.scheme": request.scheme})
        try:
            if request.key_id not in allowed:
                selectors = peer.selectors()
                if self._unlearnt(peer, request.key_id, selectors):
                    loop = asyncio.get_running_loop()
                    served.learning = loop.create_task(self._learn_and_forward(served, peer))
                    return
                server.keys.check(request.key_id, selectors)
                allowed.add(request.key_id)
            self._forward(served)
        except KeyreeveError as error:
            self.answered(served, error)
        except Exception:
            self._bug(served)

    def _forward(self, served: _Served) -> None:
        server, request = self._server, served.request
        trace = served.span.trace if served.span is not None else server.traces.make()
        ends_at = served.began + request.deadline_ms / 1000
        served.flight = server.forward(request, trace, ends_at, served.answered)

    def _full(self, uid: int) -> str | None:
        """Which bound one more request would pass, None when it passes none: no connection and no user can take all of the agent."""
        config, counts = self._server.config, self._server.counts
        if len(self._outstanding) >= config.max_outstanding_per_connection:
            return f"connection has {config.max_outstanding_per_connection}"
        if counts.outstanding[uid] >= config.max_outstanding_per_uid:
            return f"user {uid} has {config.max_outstanding_per_uid}"
        if counts.outstanding_total >= config.max_outstanding:
            return f"agent has {config.max_outstanding}"
        return None

    def answered(self, served: _Served, outcome: Outcome) -> None:
        """The outcome of a request, its last event."""
        request = served.request
        if self._outstanding.get(request.request_id) is not served:
            return  # the client left meanwhile
        del self._outstanding[request.request_id]
        server = self._server
        server.ended(served.uid)
        failed = ""
        if isinstance(outcome, KeyreeveError):
            failed = outcome.code.value
            self._refuse(request.request_id, outcome)
            if self._peer is not None and not self._peer.alive:
                self.close()
        else:
            took_s = monotonic() - served.began
            server.counts.count_signed(request.key_id, took_s)
            length, size = _SIGNED_BODY_BYTES + len(outcome), len(outcome)
            self._send(_SIGNED_HEAD.pack(length, VERSION, SIGNED, request.request_id, size) + outcome)
        if served.span is not None:
            served.span.end(error=failed)

    def _bug(self, served: _Served) -> None:
        log_exception("sign_request_failed")
        self.answered(served, Internal("internal error; the agent's log has the cause"))

    async def _learn_and_forward(self, served: _Served, peer: Peer) -> None:
        """For the first request of a process whose path or hash decides: the file system is read in a thread."""
        request = served.request
        try:
            async with asyncio.timeout_at(served.began + request.deadline_ms / 1000):
                selectors = await self._learn(peer, request.key_id)
            self._server.keys.check(request.key_id, selectors)
            self._forward(served)
        except TimeoutError:
            text = f"no signature within the {request.deadline_ms} ms that the request allowed"
            self.answered(served, DeadlineExceeded(text))
        except KeyreeveError as error:
            self.answered(served, error)
        except Exception:
            self._bug(served)

    async def _learn(self, peer: Peer, key_id: KeyId) -> frozenset[Selector]:
        async with self._learning:  # one request of this connection learns for all
            if kinds := self._unlearnt(peer, key_id, peer.selectors()):
                await asyncio.get_running_loop().run_in_executor(self._server.attestors, peer.learn, kinds)
        return peer.selectors()

    def _unlearnt(self, peer: Peer, key_id: KeyId, known: Set[Selector]) -> frozenset[str]:
        return peer.lacks(self._server.keys.kinds_to_learn(key_id, known, COSTLY_KINDS))

    def _refuse(self, request_id: int, error: KeyreeveError) -> None:
        self._server.counts.count_refused(error.code.value)
        self._send(RefusedFrame(request_id, error).to_bytes())

    def _fail(self, request_id: int, error: KeyreeveError) -> None:
        if (unlogged := self._server.counts.log_malformed(asyncio.get_running_loop().time())) is not None:
            uid = self._peer.uid if self._peer else None
            log_warning("sign_frame_malformed", detail=error.detail, uid=uid, unlogged=unlogged)
        self._refuse(request_id, error)
        self.close()

    def _send(self, frame: bytes) -> None:
        if self._transport.is_closing():
            return
        if not self._answers:
            self._server.answer_soon(self)
        self._answers.append(frame)

    def flush(self) -> None:
        """Writes the answers that were collected."""
        answers, self._answers = self._answers, []
        if answers and not self._transport.is_closing():
            self._transport.write(b"".join(answers))
