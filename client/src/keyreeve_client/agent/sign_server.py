"""The sign socket: frames of local processes in, signatures or refusals out (docs/protocol/sign-socket.md).

Always true: a request is forwarded only after its peer was authorised for its key at that moment; an unknown key and a forbidden one are
answered with the same bytes; connections, outstanding requests and unread answers are bounded; no input crashes the agent. Purpose and
scheme go on untouched: the key server decides on them, so that every such refusal is recorded in one place.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

from keyreeve_common.errors import (
    DeadlineExceeded,
    ErrorCode,
    Internal,
    InvalidRequest,
    KeyreeveError,
    MalformedFrame,
    MessageTooLarge,
    RateLimited,
    Unauthenticated,
)
from keyreeve_common.key_id import KeyId
from keyreeve_common.sign_socket import (
    AgentFrame,
    PingFrame,
    PongFrame,
    RefusedFrame,
    SignedFrame,
    SignFrame,
    parse_client_frame,
    request_id_of,
    splitter,
)
from keyreeve_common.telemetry import log_exception, log_warning
from keyreeve_common.tracing import Tracing

from keyreeve_client.agent.authorisation import Selector
from keyreeve_client.agent.config import SignSocketConfig
from keyreeve_client.agent.counts import Counts
from keyreeve_client.agent.workload import COSTLY_KINDS, Peer

_BUSY = timedelta(milliseconds=50)
WRITE_HIGH_WATER = 256 * 1024


class Keys(Protocol):
    """What the agent may serve now."""

    def kinds_to_learn(self, key_id: KeyId, known: Set[Selector], costly: Set[str]) -> frozenset[str]: ...

    def check(self, key_id: KeyId, selectors: Set[Selector]) -> None:
        """Raises: KeyNotFound, SvidExpired."""


Forward = Callable[[SignFrame, bytes], Awaitable[bytes]]  # the request, and its trace context
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
    _listener: asyncio.Server | None = None

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
        tasks = [task for connection in self.open for task in connection.tasks]
        if tasks:
            await asyncio.wait(tasks, timeout=limit.total_seconds())
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


class SignConnection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: SignServer) -> None:
        self._server = server
        self._frames = splitter()
        self._outstanding: dict[int, asyncio.Task[None]] = {}
        self._peer: Peer | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._paused = False
        self._learning = asyncio.Lock()
        self._answers: list[bytes] = []

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        return list(self._outstanding.values())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - stream sockets have no other
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
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
        for task in self.tasks:
            task.cancel()
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
        try:
            for frame in self._frames.feed(data):
                self._take(frame)
                if self._transport.is_closing():
                    return
        except MalformedFrame as error:
            self._fail(0, error)

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
        self._flush()
        self._transport.close()
        self._arm_stall()

    def _arm_stall(self) -> None:
        if self._stall is None:
            delay = self._server.config.stall_timeout.total_seconds()
            self._stall = asyncio.get_running_loop().call_later(delay, self._transport.abort)

    def _take(self, frame: bytes) -> None:
        try:
            parsed = parse_client_frame(frame)
        except MessageTooLarge as error:
            self._refuse(request_id_of(frame), error)
        except InvalidRequest as error:
            self._fail(request_id_of(frame), MalformedFrame(error.detail))
        else:
            if isinstance(parsed, PingFrame):
                self._send(PongFrame(parsed.payload))
            else:
                self._accept(parsed)

    def _accept(self, request: SignFrame) -> None:
        if self._peer is None:
            return
        uid = self._peer.uid
        if request.request_id in self._outstanding:
            self._fail(request.request_id, MalformedFrame(f"request_id {request.request_id} is outstanding already"))
        elif (full := self._full(uid)) is not None:
            self._refuse(request.request_id, RateLimited(f"{full} requests outstanding", retry_after=_BUSY))
        else:
            self._server.counts.outstanding[uid] += 1
            task = asyncio.get_running_loop().create_task(self._serve(request))
            self._outstanding[request.request_id] = task
            task.add_done_callback(lambda _: self._done(request.request_id, uid))

    def _full(self, uid: int) -> str | None:
        """Which bound one more request would pass, None when it passes none: no connection and no user can take all of the agent."""
        config, outstanding = self._server.config, self._server.counts.outstanding
        if len(self._outstanding) >= config.max_outstanding_per_connection:
            return f"connection has {config.max_outstanding_per_connection}"
        if outstanding[uid] >= config.max_outstanding_per_uid:
            return f"user {uid} has {config.max_outstanding_per_uid}"
        if outstanding.total() >= config.max_outstanding:
            return f"agent has {config.max_outstanding}"
        return None

    def _done(self, request_id: int, uid: int) -> None:
        outstanding = self._server.counts.outstanding
        outstanding[uid] -= 1
        if not outstanding[uid]:
            del outstanding[uid]
        del self._outstanding[request_id]

    async def _serve(self, request: SignFrame) -> None:
        peer = self._peer
        if peer is None:
            return
        loop = asyncio.get_running_loop()
        began, failed = loop.time(), ""
        span = self._server.tracing.root(REQUEST_SPAN, {"keyreeve.scheme": request.scheme})
        try:
            async with asyncio.timeout(request.deadline_ms / 1000):
                selectors = peer.selectors()
                if self._unlearnt(peer, request.key_id, selectors):
                    selectors = await self._learn(peer, request.key_id)
                self._server.keys.check(request.key_id, selectors)
                signature = await self._server.forward(request, span.trace)
        except TimeoutError:
            late = DeadlineExceeded(f"no signature within the {request.deadline_ms} ms that the request allowed")
            failed = late.code.value
            self._refuse(request.request_id, late)
        except KeyreeveError as error:
            failed = error.code.value
            self._refuse(request.request_id, error)
            if not peer.alive:
                self.close()
        except Exception:
            log_exception("sign_request_failed")
            failed = ErrorCode.INTERNAL.value
            self._refuse(request.request_id, Internal("internal error; the agent's log has the cause"))
        else:
            self._server.counts.count_signed(request.key_id, loop.time() - began)
            self._send(SignedFrame(request.request_id, signature))
        finally:
            span.end(error=failed)

    async def _learn(self, peer: Peer, key_id: KeyId) -> frozenset[Selector]:
        async with self._learning:  # one request of this connection learns for all
            if kinds := self._unlearnt(peer, key_id, peer.selectors()):
                await asyncio.get_running_loop().run_in_executor(self._server.attestors, peer.learn, kinds)
        return peer.selectors()

    def _unlearnt(self, peer: Peer, key_id: KeyId, known: Set[Selector]) -> frozenset[str]:
        return peer.lacks(self._server.keys.kinds_to_learn(key_id, known, COSTLY_KINDS))

    def _refuse(self, request_id: int, error: KeyreeveError) -> None:
        self._server.counts.count_refused(error.code.value)
        self._send(RefusedFrame(request_id, error))

    def _fail(self, request_id: int, error: MalformedFrame) -> None:
        if (unlogged := self._server.counts.log_malformed(asyncio.get_running_loop().time())) is not None:
            uid = self._peer.uid if self._peer else None
            log_warning("sign_frame_malformed", detail=error.detail, uid=uid, unlogged=unlogged)
        self._refuse(request_id, error)
        self.close()

    def _send(self, frame: AgentFrame) -> None:
        """Answers of one turn of the loop leave in one write."""
        if self._transport.is_closing():
            return
        if not self._answers:
            asyncio.get_running_loop().call_soon(self._flush)
        self._answers.append(frame.to_bytes())

    def _flush(self) -> None:
        if self._answers and not self._transport.is_closing():
            self._transport.write(b"".join(self._answers))
        self._answers.clear()
