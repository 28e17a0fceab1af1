"""The sign socket's server: frames, garbage, bounds, deadlines and slow readers, in one event loop with a fake key cluster."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keyreeve_client.agent.authorisation import KeyRules, Selector
from keyreeve_client.agent.config import SignSocketConfig
from keyreeve_client.agent.counts import Counts
from keyreeve_client.agent.sign_listener import bind_sign_socket, remove_sign_socket
from keyreeve_client.agent.sign_server import WRITE_HIGH_WATER, SignServer
from keyreeve_client.sign_client import Answered
from keyreeve_common.errors import ConfigInvalid, DeadlineExceeded, ErrorCode, KeyreeveError, Unavailable
from keyreeve_common.key_id import KeyId
from keyreeve_common.sign_socket import (
    AgentFrame,
    PingFrame,
    PongFrame,
    RefusedFrame,
    SignedFrame,
    SignFrame,
    parse_agent_frame,
    splitter,
)
from keyreeve_common.trace import TRACE_BYTES

KEY = KeyId("key-web")
RULES = KeyRules({KEY: frozenset({frozenset({Selector("unix", f"uid:{os.geteuid()}")})})})


@dataclass
class FakeCluster:
    """Signs by echoing; `gate` keeps answers back."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    seen: list[SignFrame] = field(default_factory=list)
    cancelled: int = 0
    failure: KeyreeveError | None = None
    bug: Exception | None = None
    answer: bytes = b"signature"

    def begin(self, request: SignFrame, trace: bytes, ends_at: float, answered: Answered) -> asyncio.Task[None]:
        assert len(trace) == TRACE_BYTES
        self.seen.append(request)
        if self.bug is not None:
            raise self.bug
        return asyncio.get_running_loop().create_task(self._answer(ends_at, answered))

    async def _answer(self, ends_at: float, answered: Answered) -> None:
        try:
            async with asyncio.timeout_at(ends_at):
                await self.gate.wait()
        except TimeoutError:
            answered(DeadlineExceeded("key server did not answer in time"))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        else:
            answered(self.failure or self.answer)


class Client:
    """Raw bytes in, frames out."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._frames = splitter()
        self._ready: list[AgentFrame] = []

    def send(self, *frames: SignFrame | PingFrame | bytes) -> None:
        self.writer.write(b"".join(frame if isinstance(frame, bytes) else frame.to_bytes() for frame in frames))

    async def receive(self) -> AgentFrame | None:
        """The next frame, None at the end."""
        async with asyncio.timeout(10):
            while not self._ready:
                try:
                    data = await self.reader.read(65_536)
                except ConnectionResetError:  # what arrived before the reset still counts
                    data = bytes(self.reader._buffer)  # type: ignore[attr-defined]
                    self.reader._buffer.clear()  # type: ignore[attr-defined]
                if not data:
                    return None
                self._ready += [parse_agent_frame(frame) for frame in self._frames.feed(data)]
        return self._ready.pop(0)

    async def refusal(self) -> RefusedFrame:
        frame = await self.receive()
        assert isinstance(frame, RefusedFrame), frame
        return frame


@dataclass
class Harness:
    server: SignServer
    cluster: FakeCluster
    path: Path
    clients: list[Client] = field(default_factory=list)

    async def connect(self) -> Client:
        self.clients.append(Client(*await asyncio.open_unix_connection(str(self.path))))
        return self.clients[-1]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.002)


@asynccontextmanager
async def serving(tmp_path: Path, **bounds: object) -> AsyncIterator[Harness]:
    config = replace(SignSocketConfig(tmp_path / "s"), **bounds)  # type: ignore[arg-type]
    cluster = FakeCluster()
    cluster.gate.set()
    harness = Harness(SignServer(config, RULES, cluster.begin), cluster, config.path)
    await harness.server.start(bind_sign_socket(config.path, config.mode_bits))
    try:
        yield harness
    finally:
        for client in harness.clients:
            client.writer.close()
        await harness.server.drain(timedelta(seconds=5))
        await harness.until(lambda: not harness.server.open)


def sign(request_id: int = 1, *, key_id: str = KEY, message: bytes = b"m", deadline_ms: int = 5000) -> SignFrame:
    return SignFrame(request_id, deadline_ms, 0x0403, 1, KeyId(key_id), message)


async def test_signs_and_leaves_scheme_and_purpose_alone(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        client = await harness.connect()
        odd = SignFrame(7, 1000, 0xFFFE, 250, KEY, b"any bytes")
        client.send(odd)
        assert await client.receive() == SignedFrame(7, b"signature")
        assert harness.cluster.seen == [odd]
        assert harness.server.counts.signed == {KEY: 1}


async def test_all_frames_of_one_read_are_taken_together_and_answers_match_by_id(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        client = await harness.connect()
        client.send(*(sign(number) for number in range(100)), PingFrame(b"abcd"))
        answers = [await client.receive() for _ in range(101)]
        assert PongFrame(b"abcd") in answers
        assert {answer.request_id for answer in answers if isinstance(answer, SignedFrame)} == set(range(100))


async def test_frames_may_arrive_byte_by_byte(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        client = await harness.connect()
        for byte in sign(3).to_bytes():
            client.send(bytes((byte,)))
            await client.writer.drain()
            await asyncio.sleep(0)
        assert await client.receive() == SignedFrame(3, b"signature")


async def test_unknown_and_forbidden_keys_get_the_same_bytes(tmp_path: Path) -> None:
    other_user = frozenset({Selector("unix", "uid:4000000000")})
    async with serving(tmp_path) as harness:
        harness.server.keys = KeyRules({KeyId("key-theirs"): frozenset({other_user})})
        client = await harness.connect()
        answers = []
        for key_id in ("key-theirs", "key-none"):
            client.send(sign(5, key_id=key_id))
            answers.append((await client.refusal()).to_bytes())
        assert answers[0] == answers[1]
        assert answers[0][4 + 2 + 4] == 20
        assert harness.cluster.seen == []


async def test_a_message_over_the_limit_is_named_and_the_connection_goes_on(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        client = await harness.connect()
        client.send(sign(1, message=bytes(65_537)), sign(2, message=bytes(65_536)))
        refusal = await client.refusal()
        assert (refusal.request_id, refusal.error.code) == (1, ErrorCode.MESSAGE_TOO_LARGE)
        assert "65537" in refusal.error.detail
        assert "65536" in refusal.error.detail
        assert await client.receive() == SignedFrame(2, b"signature")


MALFORMED = [
    pytest.param(b"\x00\x01\x01\xd1" + b"x" * 64, 0, id="frame over 66,000 bytes"),
    pytest.param(b"\x00\x00\x00\x00", 0, id="length 0"),
    pytest.param(b"\x00\x00\x00\x02\x02\x01", 0, id="version 2"),
    pytest.param(b"\x00\x00\x00\x02\x01\x77", 0, id="unknown type"),
    pytest.param(b"\x00\x00\x00\x02\x01\x01", 0, id="empty sign"),
    pytest.param(SignedFrame(1, b"x").to_bytes(), 0, id="frame of the other direction"),
    pytest.param(sign(9, key_id="NOT*A*KEY").to_bytes(), 9, id="key id of other letters"),
    pytest.param(sign(9, deadline_ms=0).to_bytes(), 9, id="deadline 0"),
    pytest.param(sign(9, deadline_ms=60_001).to_bytes(), 9, id="deadline too long"),
    pytest.param(b"\x00\x00\x00\x05\x01\x02abc", 0, id="short ping"),
    pytest.param(b"GET / HTTP/1.1\r\n\r\n", 0, id="another protocol"),
]


@pytest.mark.parametrize(("data", "request_id"), MALFORMED)
async def test_malformed_frames_are_refused_by_number_and_the_connection_is_closed(
    tmp_path: Path, data: bytes, request_id: int
) -> None:
    async with serving(tmp_path) as harness:
        client = await harness.connect()
        client.send(data)
        refusal = await client.refusal()
        assert (refusal.request_id, refusal.error.rendering.wire) == (request_id, 28)
        assert await client.receive() is None
        other = await harness.connect()
        other.send(sign())
        assert await other.receive() == SignedFrame(1, b"signature")


def test_a_flood_of_malformed_frames_does_not_fill_the_log() -> None:
    counts = Counts()
    said = [counts.log_malformed(now) for now in (0.0, 0.1, 0.9, 1.0, 1.5, 3.0)]
    assert said == [0, None, None, 2, None, 1]


async def test_a_request_id_that_is_outstanding_is_malformed(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        harness.cluster.gate.clear()
        client = await harness.connect()
        client.send(sign(4), sign(4))
        assert (await client.refusal()).error.code is ErrorCode.MALFORMED_FRAME


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=300) | st.just(sign().to_bytes()) | st.just(PingFrame(b"ping").to_bytes())))
def test_no_bytes_crash_the_server(tmp_path: Path, chunks: list[bytes]) -> None:
    async def run() -> None:
        failures: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        async with serving(tmp_path) as harness:
            client = await harness.connect()
            client.send(b"".join(chunks))
            client.writer.write_eof()
            while await client.receive() is not None:
                pass
            other = await harness.connect()
            other.send(sign())
            assert await other.receive() == SignedFrame(1, b"signature")
        assert failures == []

    asyncio.run(run())


async def test_outstanding_requests_of_a_connection_are_bounded(tmp_path: Path) -> None:
    async with serving(tmp_path, max_outstanding_per_connection=4) as harness:
        harness.cluster.gate.clear()
        client = await harness.connect()
        client.send(*(sign(number) for number in range(5)))
        refusal = await client.refusal()
        assert (refusal.request_id, refusal.error.code) == (4, ErrorCode.RATE_LIMITED)
        assert refusal.error.retry_after == timedelta(milliseconds=50)
        harness.cluster.gate.set()
        assert {(await client.receive()).request_id for _ in range(4)} == {0, 1, 2, 3}  # type: ignore[union-attr]
        client.send(sign(9))
        assert await client.receive() == SignedFrame(9, b"signature")


@pytest.mark.parametrize("bound", ["max_outstanding", "max_outstanding_per_uid"])
async def test_outstanding_requests_of_all_connections_are_bounded(tmp_path: Path, bound: str) -> None:
    async with serving(tmp_path, **{bound: 3}) as harness:
        harness.cluster.gate.clear()
        one, two = await harness.connect(), await harness.connect()
        one.send(*(sign(number) for number in range(3)))
        await harness.until(lambda: len(harness.cluster.seen) == 3)
        two.send(sign(1))
        assert (await two.refusal()).error.code is ErrorCode.RATE_LIMITED
        harness.cluster.gate.set()
        await one.receive()
        two.send(sign(2))
        assert await two.receive() == SignedFrame(2, b"signature")


@pytest.mark.parametrize("bound", ["max_connections", "max_connections_per_uid"])
async def test_connections_are_bounded(tmp_path: Path, bound: str) -> None:
    async with serving(tmp_path, **{bound: 2}) as harness:
        clients = [await harness.connect() for _ in range(2)]
        await harness.until(lambda: harness.server.counts.connections == 2)
        refused = await harness.connect()
        refusal = await refused.refusal()
        assert (refusal.request_id, refusal.error.code) == (0, ErrorCode.RATE_LIMITED)
        assert refusal.error.retry_after is not None
        assert await refused.receive() is None
        clients[0].writer.close()
        await harness.until(lambda: harness.server.counts.connections == 1)
        again = await harness.connect()
        again.send(sign())
        assert await again.receive() == SignedFrame(1, b"signature")


async def test_the_deadline_of_a_request_is_kept(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        harness.cluster.gate.clear()
        client = await harness.connect()
        client.send(sign(6, deadline_ms=50))
        refusal = await client.refusal()
        assert (refusal.request_id, refusal.error.code) == (6, ErrorCode.DEADLINE_EXCEEDED)
        await harness.until(lambda: harness.server.counts.outstanding.total() == 0)


async def test_errors_of_the_key_cluster_go_through_and_bugs_do_not_show(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        client = await harness.connect()
        harness.cluster.failure = Unavailable("key server is away", retry_after=timedelta(seconds=2))
        client.send(sign())
        refusal = await client.refusal()
        assert (refusal.error.code, refusal.error.detail) == (ErrorCode.UNAVAILABLE, "key server is away")
        assert refusal.error.retry_after == timedelta(seconds=2)
        harness.cluster.bug = RuntimeError("inner text")
        client.send(sign())
        refusal = await client.refusal()
        assert refusal.error.code is ErrorCode.INTERNAL
        assert "inner text" not in refusal.error.detail


async def test_a_client_that_leaves_cancels_what_it_asked(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        harness.cluster.gate.clear()
        client = await harness.connect()
        client.send(sign(1), sign(2))
        await harness.until(lambda: len(harness.cluster.seen) == 2)
        client.writer.transport.abort()
        await harness.until(lambda: harness.cluster.cancelled == 2)
        await harness.until(lambda: harness.server.counts.outstanding.total() == 0)
        assert harness.server.counts.refused == {}


async def test_a_client_that_does_not_read_is_not_read_from_and_then_cut_off(tmp_path: Path) -> None:
    async with serving(tmp_path, stall_timeout=timedelta(milliseconds=300)) as harness:
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.setblocking(False)
            deaf.connect(str(harness.path))
            flood = PingFrame(b"ping").to_bytes() * 4096
            sent, loop = 0, asyncio.get_running_loop()
            buffered: list[int] = []
            with pytest.raises((ConnectionError, TimeoutError)):  # noqa: PT012 - one story
                while True:
                    async with asyncio.timeout(5):
                        await loop.sock_sendall(deaf, flood)
                    sent += len(flood)
                    buffered += [connection._transport.get_write_buffer_size() for connection in harness.server.open]
            assert max(buffered) < WRITE_HIGH_WATER + 512 * 1024
            assert sent < 8 * 1024 * 1024
        await harness.until(lambda: harness.server.counts.connections == 0)


async def test_a_client_that_asks_and_does_not_read_holds_a_bounded_memory(tmp_path: Path) -> None:
    """Signatures of the longest kind, far more than the socket takes: what waits for the client is bounded, whatever it asked for."""
    outstanding = 16
    bounds = {"max_outstanding_per_connection": outstanding, "stall_timeout": timedelta(milliseconds=300)}
    async with serving(tmp_path, **bounds) as harness:
        harness.cluster.answer = bytes(1024)
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.setblocking(False)
            deaf.connect(str(harness.path))
            loop, numbers = asyncio.get_running_loop(), itertools.count()
            buffered: list[int] = []
            with pytest.raises((ConnectionError, TimeoutError)):  # noqa: PT012 - one story
                while True:
                    flood = b"".join(sign(number).to_bytes() for number in itertools.islice(numbers, 256))
                    async with asyncio.timeout(5):
                        await loop.sock_sendall(deaf, flood)
                    for connection in harness.server.open:
                        held = sum(map(len, connection._answers))
                        buffered.append(connection._transport.get_write_buffer_size() + held)
                        assert len(connection._outstanding) <= outstanding
        await harness.until(lambda: harness.server.counts.connections == 0)
        assert harness.server.counts.outstanding_total == 0
        assert max(buffered) > WRITE_HIGH_WATER
        assert max(buffered) < WRITE_HIGH_WATER + 512 * 1024


@dataclass
class CountingTransport:
    """The size of each write; uvloop's transports cannot be changed."""

    transport: asyncio.Transport
    writes: list[int] = field(default_factory=list)

    def write(self, data: bytes) -> None:
        self.writes.append(len(data))
        self.transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


async def test_answers_that_come_together_leave_in_one_write(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        harness.cluster.gate.clear()
        client = await harness.connect()
        client.send(*(sign(number) for number in range(20)))
        await harness.until(lambda: len(harness.cluster.seen) == 20)
        (connection,) = harness.server.open
        counting = CountingTransport(connection._transport)
        connection._transport = cast("asyncio.Transport", counting)
        harness.cluster.gate.set()
        assert len([await client.receive() for _ in range(20)]) == 20
        assert counting.writes == [20 * len(SignedFrame(1, b"signature").to_bytes())]


async def test_what_came_before_a_malformed_frame_is_taken_and_what_comes_after_is_not(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        client = await harness.connect()
        client.send(PingFrame(b"ping"), sign(1), b"\x00\x00\x00\x02\x02\x01", sign(2))
        assert await client.receive() == PongFrame(b"ping")
        assert (await client.refusal()).error.code is ErrorCode.MALFORMED_FRAME
        assert await client.receive() is None
        assert [request.request_id for request in harness.cluster.seen] == [1]
        await harness.until(lambda: harness.server.counts.outstanding_total == 0)


async def test_a_key_that_is_withdrawn_is_refused_from_the_next_read_on(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        client = await harness.connect()
        client.send(sign(1), sign(2))
        assert {(await client.receive()).request_id for _ in range(2)} == {1, 2}  # type: ignore[union-attr]
        harness.server.keys = KeyRules({})
        client.send(sign(3), sign(4))
        assert {(await client.refusal()).error.code for _ in range(2)} == {ErrorCode.KEY_NOT_FOUND}
        assert len(harness.cluster.seen) == 2


async def test_one_read_may_ask_for_keys_of_which_some_are_forbidden(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        client = await harness.connect()
        client.send(sign(1), sign(2, key_id="key-theirs"), sign(3), sign(4, key_id="key-theirs"))
        answers = [await client.receive() for _ in range(4)]
        refused = {answer.request_id for answer in answers if isinstance(answer, RefusedFrame)}
        assert refused == {2, 4}
        assert [request.request_id for request in harness.cluster.seen] == [1, 3]


async def test_a_peer_whose_process_is_gone_is_refused_and_disconnected(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        parent, child = socket.socketpair()
        pid = os.fork()
        if pid == 0:  # connects and hands its socket to us by dying: we inherit nothing, so pass it over
            mine = socket.socket(socket.AF_UNIX)
            mine.connect(str(harness.path))
            socket.send_fds(child, [b"x"], [mine.fileno()])
            os._exit(0)
        fds = socket.recv_fds(parent, 1, 1)[1]
        os.waitpid(pid, 0)
        parent.close()
        child.close()
        reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=fds[0]))
        client = Client(reader, writer)
        harness.clients.append(client)
        client.send(sign())
        assert (await client.refusal()).error.code is ErrorCode.UNAUTHENTICATED
        assert await client.receive() is None
        assert harness.cluster.seen == []


async def test_draining_answers_what_is_outstanding(tmp_path: Path) -> None:
    async with serving(tmp_path) as harness:
        harness.cluster.gate.clear()
        client = await harness.connect()
        client.send(sign(1))
        await harness.until(lambda: len(harness.cluster.seen) == 1)
        draining = asyncio.create_task(harness.server.drain(timedelta(seconds=5)))
        await asyncio.sleep(0)
        client.send(sign(2))
        harness.cluster.gate.set()
        await draining
        assert await client.receive() == SignedFrame(1, b"signature")
        assert await client.receive() is None
        assert len(harness.cluster.seen) == 1


def test_a_stale_socket_file_is_replaced_and_anything_else_is_not(tmp_path: Path) -> None:
    path = tmp_path / "run" / "s"
    first = bind_sign_socket(path, 0o660)
    first.close()
    with bind_sign_socket(path, 0o666):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        assert sorted(entry.name for entry in path.parent.iterdir()) == ["s"]
    remove_sign_socket(path)
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(ConfigInvalid, match="is not a socket"):
        bind_sign_socket(path, 0o666)
    remove_sign_socket(path)
    assert path.read_text() == "precious"
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(ConfigInvalid, match="is not a socket"):
        bind_sign_socket(link, 0o666)
