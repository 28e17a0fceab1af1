"""Which key server is asked: fail-over when one is unavailable, and when one takes requests and answers nothing."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from keyreeve_client.agent.key_cluster import KeyCluster
from keyreeve_client.channel import SvidFiles
from keyreeve_common.errors import DeadlineExceeded, KeyNotFound, KeyreeveError, Unavailable
from keyreeve_common.identity import SpiffeId
from keyreeve_common.key_id import KeyId
from keyreeve_common.sign_socket import SignFrame

SERVER_ID = SpiffeId.parse("spiffe://example.org/keyreeve/keyserver")


@dataclass
class FakeStream:
    """Signs with its name, raises `error`, or, when it hangs, answers nothing until the deadline."""

    name: bytes
    hangs: bool = False
    error: KeyreeveError | None = None
    asked: int = 0

    async def sign(self, *_: object, deadline: Any, **__: object) -> bytes:
        self.asked += 1
        if self.hangs:
            await asyncio.sleep(deadline.total_seconds())
            raise DeadlineExceeded("key server did not answer in time")
        if self.error is not None:
            raise self.error
        return self.name


@dataclass
class Pair:
    cluster: KeyCluster
    streams: list[FakeStream] = field(default_factory=list)

    async def sign(self, deadline_ms: int = 300) -> bytes:
        return await self.cluster.sign(SignFrame(1, deadline_ms, 0x0403, 1, KeyId("k"), b"m"))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    files = SvidFiles(tmp_path / "key", tmp_path / "chain", tmp_path / "bundle")
    cluster = KeyCluster(("one:1", "two:1"), files, server_id=SERVER_ID)
    made = Pair(cluster, [FakeStream(b"one"), FakeStream(b"two")])
    for server, stream in zip(cluster.servers, made.streams, strict=True):
        server.stream = stream  # type: ignore[assignment]
    return made


async def test_the_first_is_preferred_until_it_is_unavailable(pair: Pair) -> None:
    assert await pair.sign() == b"one"
    pair.streams[0].error = Unavailable("gone")
    assert await pair.sign() == b"two"
    assert await pair.sign() == b"two"
    assert pair.streams[0].asked == 2


async def test_a_refusal_is_the_answer(pair: Pair) -> None:
    pair.streams[0].error = KeyNotFound()
    with pytest.raises(KeyNotFound):
        await pair.sign()
    assert pair.streams[1].asked == 0


async def test_one_that_hangs_costs_what_it_holds_and_no_more(pair: Pair) -> None:
    pair.streams[0].hangs = True
    held = await asyncio.gather(pair.sign(), pair.sign(), pair.sign(), return_exceptions=True)
    assert [type(result) for result in held] == [DeadlineExceeded] * 3
    assert await pair.sign() == b"two"


async def test_a_client_in_a_hurry_moves_nobody(pair: Pair) -> None:
    pair.streams[0].hangs = True
    with pytest.raises(DeadlineExceeded):
        await pair.sign(deadline_ms=1)
    pair.streams[0].hangs = False
    assert await pair.sign() == b"one"
