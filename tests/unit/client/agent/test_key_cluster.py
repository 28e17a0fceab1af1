"""The life of one request over several replicas: retries, hedges, silence, what is not asked again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from keyreeve_client.agent.balancer import Settings, State
from keyreeve_client.agent.key_cluster import KeyCluster
from keyreeve_client.channel import SvidFiles
from keyreeve_client.sign_client import Answered, Outcome, StreamLost
from keyreeve_common.errors import (
    DeadlineExceeded,
    ErrorCode,
    Internal,
    InvalidRequest,
    KeyNotFound,
    KeyreeveError,
    KeySelfTestFailed,
    Overloaded,
    RateLimited,
    SealedRecordInvalid,
    TokenPinIncorrect,
    TokenUnavailable,
    Unavailable,
    VaultAccessDenied,
)
from keyreeve_common.identity import SpiffeId
from keyreeve_common.key_id import KeyId
from keyreeve_common.sign_socket import SignFrame

SERVER_ID = SpiffeId.parse("spiffe://example.org/keyreeve/keyserver")
LONG_MS = 20_000


@dataclass
class _Asked:
    """One request at a replica, as sign_client.Pending is."""

    answered: Answered | None

    def cancel(self) -> None:
        self.answered = None

    def settle(self, outcome: Outcome) -> None:
        answered, self.answered = self.answered, None
        if answered is not None:
            answered(outcome)

    def answer_soon(self, outcome: Outcome) -> None:
        asyncio.get_running_loop().call_soon(self.settle, outcome)


@dataclass
class FakeReplica:
    """Signs with its name, fails with `error`, or hangs; `healthy` is what a probe finds."""

    name: bytes
    hangs: bool = False
    error: KeyreeveError | None = None
    healthy: bool = True
    traces: list[bytes] = field(default_factory=list)
    deadlines: list[float] = field(default_factory=list)
    held: list[_Asked] = field(default_factory=list)

    @property
    def asked(self) -> int:
        return len(self.traces)

    def begin(self, *_: object, trace: bytes, ends_at: float, answered: Answered, **__: object) -> _Asked:
        self.traces.append(trace)
        self.deadlines.append(ends_at)
        asked = _Asked(answered)
        if self.hangs:
            self.held.append(asked)
        elif self.error is not None:
            asked.answer_soon(type(self.error)(self.error.detail, retry_after=self.error.retry_after))
        else:
            asked.answer_soon(self.name)
        return asked

    def abandon(self, error: KeyreeveError) -> None:
        for asked in self.held:
            asked.settle(error)

    async def close(self) -> None:
        return

    async def is_healthy(self, _within_s: float) -> bool:
        return self.healthy


@dataclass
class Rig:
    cluster: KeyCluster
    replicas: list[FakeReplica]

    async def sign(self, deadline_ms: int = LONG_MS) -> bytes:
        return await self.cluster.sign(SignFrame(1, deadline_ms, 0x0403, 1, KeyId("k"), b"m"))

    @property
    def states(self) -> list[State]:
        return [server.replica.state for server in self.cluster.servers]


def make(tmp_path: Path, *names: bytes, **settings: Any) -> Rig:
    files = SvidFiles(tmp_path / "key", tmp_path / "chain", tmp_path / "bundle")
    addresses = tuple(f"{name.decode()}:1" for name in names)
    cluster = KeyCluster(addresses, files, server_id=SERVER_ID, settings=Settings(**settings))
    rig = Rig(cluster, [FakeReplica(name) for name in names])
    for server, replica in zip(cluster.servers, rig.replicas, strict=True):
        server.stream = replica  # type: ignore[assignment]
        server.is_healthy = replica.is_healthy  # type: ignore[method-assign]
    return rig


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = make(tmp_path, b"one", b"two", silence_s=0.05, first_probe_s=0.01)
    yield rig
    await rig.cluster.close()


@pytest.fixture
async def alone(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = make(tmp_path, b"one")
    yield rig
    await rig.cluster.close()


@pytest.mark.parametrize(
    "error",
    [
        StreamLost("broke"),
        Unavailable("signer ended"),
        TokenUnavailable("token away"),
        Overloaded("full", retry_after=timedelta(seconds=1)),
        DeadlineExceeded("signer is slow"),
    ],
    ids=lambda error: error.code.value,
)
async def test_what_one_replica_cannot_another_does(pair: Rig, error: KeyreeveError) -> None:
    pair.replicas[0].error, pair.replicas[0].healthy = error, False  # no probe takes it back meanwhile
    assert await pair.sign() == b"two"
    assert pair.replicas[0].traces == pair.replicas[1].traces  # one request, one id
    whole = error.code is ErrorCode.UNAVAILABLE
    assert (
        pair.cluster.servers[0].last_error is not None
    ) == whole  # one that cannot do one class of requests is not lost


@pytest.mark.parametrize(
    "error",
    [
        VaultAccessDenied("policy"),
        TokenPinIncorrect("PIN"),
        KeySelfTestFailed("another key"),
        SealedRecordInvalid("another key-encryption key"),
        Internal("the token gave a signature that does not verify"),
    ],
    ids=lambda error: error.code.value,
)
async def test_a_fault_of_one_replica_alone_is_asked_elsewhere_and_not_waited_for(
    pair: Rig, error: KeyreeveError
) -> None:
    assert await pair.sign() == b"one"
    pair.replicas[0].error = error
    assert await pair.sign() in {b"one", b"two"}
    assert await pair.sign() == b"two"
    pair.replicas[1].error = error
    asked = sum(replica.asked for replica in pair.replicas)
    with pytest.raises(type(error)):
        await pair.sign()
    assert sum(replica.asked for replica in pair.replicas) == asked + 2  # each once, whatever time there was


async def test_a_token_that_is_away_beside_keys_that_are_there_fills_no_log(
    pair: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="keyreeve")
    for _ in range(300):
        pair.replicas[0].error = pair.replicas[1].error = TokenUnavailable(
            "token away", retry_after=timedelta(seconds=60)
        )
        with pytest.raises(TokenUnavailable):
            await pair.sign()
        pair.replicas[0].error = pair.replicas[1].error = None
        await pair.sign()
    lines = caplog.messages
    assert not [line for line in lines if "key_server_lost" in line or "key_server_back" in line]
    assert len([line for line in lines if "key_server_fault" in line]) == 2  # one for each replica
    assert all(server.last_error is None for server in pair.cluster.servers)


async def test_a_replica_that_fails_and_serves_by_turns_fills_no_log(
    alone: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="keyreeve")
    for _ in range(300):
        alone.replicas[0].error = Unavailable("signer ended")
        with pytest.raises(Unavailable):
            await alone.sign()
        alone.replicas[0].error = None
        await alone.sign()
    lines = caplog.messages
    assert len([line for line in lines if "key_server_lost" in line]) == 1
    assert len([line for line in lines if "key_server_back" in line]) == 1


async def test_requests_in_a_hurry_say_nothing_of_a_replica(pair: Rig, caplog: pytest.LogCaptureFixture) -> None:
    for replica in pair.replicas:
        replica.hangs = True
    with pytest.raises(DeadlineExceeded):
        await pair.sign(deadline_ms=1)
    for replica in pair.replicas:
        replica.hangs, replica.error = False, Overloaded("full", retry_after=timedelta(seconds=5))
    with pytest.raises(Overloaded):
        await pair.sign(deadline_ms=90)
    assert all(server.last_error is None for server in pair.cluster.servers)
    assert pair.cluster.balancer.hedge_after(0, 0x0403, asyncio.get_running_loop().time(), remaining_s=5) is not None
    assert all(lane.held_until == 0 for server in pair.cluster.servers for lane in server.replica.lanes.values())
    assert "key_server_lost" not in caplog.messages


async def test_a_replica_that_refuses_all_is_not_the_one_that_is_asked(pair: Rig) -> None:
    pair.replicas[0].error = KeyNotFound()
    refused = 0
    for _ in range(100):
        try:
            await pair.sign()
        except KeyNotFound:
            refused += 1
    assert refused <= 10  # one, and another each time that it is tried again


async def test_one_that_hangs_while_the_other_is_out_for_being_slow_is_left(tmp_path: Path) -> None:
    rig = make(tmp_path, b"one", b"two", silence_s=0.05, hedge_share=0.0)
    balance = rig.cluster.balancer
    now = asyncio.get_running_loop().time()
    for index, took_s in ((1, 0.001), (0, 5.0)):
        for _ in range(16):
            balance.began(index, 0x0403, now)
            balance.answered(index, 0x0403, now, took_s)
    assert rig.states == [State.EJECTED, State.READY]
    balance.replicas[0].probe_at = now + 3600
    assert await rig.sign() == b"two"  # and the watcher has nothing to do until the slow one is due
    await asyncio.sleep(0)
    rig.replicas[1].hangs, rig.replicas[1].healthy = True, False
    assert await rig.sign() == b"one"
    await rig.cluster.close()


@pytest.mark.parametrize("error", [KeyNotFound(), RateLimited("rate"), InvalidRequest("form")], ids=repr)
async def test_a_refusal_is_the_answer(pair: Rig, error: KeyreeveError) -> None:
    pair.replicas[0].error = error
    with pytest.raises(type(error)):
        await pair.sign()
    assert pair.replicas[1].asked == 0
    assert pair.states[0] is State.READY


async def test_a_stream_that_ends_moves_all_at_once_and_fails_none(pair: Rig) -> None:
    pair.replicas[0].hangs = pair.replicas[1].hangs = True
    pair.replicas[0].healthy = False
    requests = [asyncio.create_task(pair.sign()) for _ in range(20)]
    await asyncio.sleep(0)
    pair.replicas[1].hangs = False
    for answer in pair.replicas[1].held:
        answer.settle(b"two")
    pair.replicas[0].abandon(StreamLost("this key server is stopping", retry_after=timedelta(milliseconds=100)))
    assert await asyncio.gather(*requests) == [b"two"] * 20
    asked = pair.replicas[0].asked
    assert pair.states == [State.EJECTED, State.READY]
    assert await asyncio.gather(*(pair.sign() for _ in range(5))) == [b"two"] * 5
    assert pair.replicas[0].asked == asked


async def test_a_slow_answer_is_hedged_and_the_first_one_counts(pair: Rig) -> None:
    pair.replicas[0].hangs = True
    assert await pair.sign() == b"two"
    assert pair.cluster.servers[1].replica.hedges == 1
    assert [answer.answered is None for answer in pair.replicas[0].held] == [True]


async def test_no_hedge_without_budget_but_silence_moves_the_requests(tmp_path: Path) -> None:
    rig = make(tmp_path, b"one", b"two", silence_s=0.05, hedge_share=0.0)
    rig.replicas[0].hangs, rig.replicas[0].healthy = True, False
    assert await asyncio.gather(*(rig.sign() for _ in range(10))) == [b"two"] * 10
    assert rig.states == [State.EJECTED, State.READY]
    assert rig.cluster.servers[1].replica.hedges == 0
    await rig.cluster.close()


async def test_a_silent_replica_that_answers_a_probe_keeps_its_requests(tmp_path: Path) -> None:
    rig = make(tmp_path, b"one", b"two", silence_s=0.02, hedge_share=0.0)
    rig.replicas[0].hangs = True
    request = asyncio.create_task(rig.sign())
    async with asyncio.timeout(20):
        while not rig.replicas[0].held:
            await asyncio.sleep(0)
        while rig.cluster.balancer.replicas[0].state is not State.SUSPECT:
            await asyncio.sleep(0)
        while rig.cluster.balancer.replicas[0].state is State.SUSPECT:
            await asyncio.sleep(0)
    rig.replicas[0].held[0].settle(b"late")
    assert await request == b"late"
    await rig.cluster.close()


async def test_an_ejected_replica_is_taken_back_after_a_probe(pair: Rig) -> None:
    pair.replicas[0].error, pair.replicas[0].healthy = StreamLost("gone"), False
    assert await pair.sign() == b"two"
    assert pair.states == [State.EJECTED, State.READY]
    pair.replicas[0].error, pair.replicas[0].healthy = None, True
    async with asyncio.timeout(20):
        while pair.states[0] is not State.READY:
            await asyncio.sleep(0.005)
    assert pair.cluster.servers[0].last_error is None


async def test_all_away_for_a_moment_is_waited_out(pair: Rig) -> None:
    assert await pair.sign() == b"one"
    for replica in pair.replicas:
        replica.error = Unavailable("restarting")
    request = asyncio.create_task(pair.sign())
    async with asyncio.timeout(20):
        while pair.replicas[0].asked + pair.replicas[1].asked < 5:
            await asyncio.sleep(0.005)
    pair.replicas[1].error = None
    assert await request == b"two"


async def test_all_away_for_long_is_said_at_once(pair: Rig) -> None:
    for replica in pair.replicas:
        replica.error = Unavailable("gone")
    with pytest.raises(Unavailable, match="gone"):
        await pair.sign()
    assert [replica.asked for replica in pair.replicas] == [1, 1]


async def test_overload_everywhere_is_retried_once_when_it_may_be(pair: Rig) -> None:
    assert await pair.sign() == b"one"
    for replica in pair.replicas:
        replica.error = Overloaded("full", retry_after=timedelta(milliseconds=100))
    began = asyncio.get_running_loop().time()
    with pytest.raises(Overloaded):
        await pair.sign()
    assert asyncio.get_running_loop().time() - began >= 0.1
    assert sum(replica.asked for replica in pair.replicas) == 1 + 4
    assert sum(server.replica.hedges for server in pair.cluster.servers) == 0


async def test_overload_is_not_waited_for_beyond_the_deadline(pair: Rig) -> None:
    assert await pair.sign() == b"one"
    for replica in pair.replicas:
        replica.error = Overloaded("full", retry_after=timedelta(seconds=30))
    with pytest.raises(Overloaded):
        await pair.sign(deadline_ms=10_000)
    assert sum(replica.asked for replica in pair.replicas) == 1 + 2


async def test_the_deadline_of_a_retry_is_what_is_left(pair: Rig) -> None:
    pair.replicas[0].error = StreamLost("broke")
    await pair.sign()
    assert pair.replicas[0].deadlines == pair.replicas[1].deadlines


async def test_time_is_up_where_nobody_answers(pair: Rig) -> None:
    for replica in pair.replicas:
        replica.hangs = True
    with pytest.raises(DeadlineExceeded):
        await pair.sign(deadline_ms=60)
    assert [server.replica.outstanding for server in pair.cluster.servers] == [0, 0]
    assert pair.cluster.servers[0].last_error is not None


async def test_a_client_that_leaves_frees_everything(pair: Rig) -> None:
    pair.replicas[0].hangs = True
    request = asyncio.create_task(pair.sign())
    while not pair.replicas[0].held:
        await asyncio.sleep(0)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert pair.cluster.servers[0].replica.outstanding == 0
    assert pair.replicas[0].held[0].answered is None


async def test_one_alone_fails_as_it_says_and_is_asked_again_next_time(alone: Rig) -> None:
    alone.replicas[0].error = Unavailable("restarting")
    with pytest.raises(Unavailable, match="restarting"):
        await alone.sign()
    assert alone.replicas[0].asked == 1
    alone.replicas[0].error = None
    assert await alone.sign() == b"one"


async def test_schemes_that_nobody_knows_share_one_class(pair: Rig) -> None:
    for scheme in range(0x2000, 0x2100):
        await pair.cluster.sign(SignFrame(1, LONG_MS, scheme, 1, KeyId("k"), b"m"))
    assert all(len(server.replica.lanes) <= 1 for server in pair.cluster.servers)
