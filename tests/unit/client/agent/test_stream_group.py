"""Several streams to one key server: the one with the least to do is taken, and all end together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from keyreeve_client.agent.stream_group import StreamGroup
from keyreeve_client.channel import open_local_channel
from keyreeve_client.sign_client import Outcome, SignStreamClient, StreamLost

SCHEME, PURPOSE = 0x0403, 1


@asynccontextmanager
async def group_of(signing: Any, count: int) -> AsyncIterator[tuple[StreamGroup, list[SignStreamClient]]]:
    channels = [open_local_channel(signing.socket) for _ in range(count)]

    def client(channel: grpc.aio.Channel) -> SignStreamClient:
        async def current() -> grpc.aio.Channel:
            return channel

        return SignStreamClient(current)

    streams = [client(channel) for channel in channels]
    group = StreamGroup(streams)
    try:
        yield group, streams
    finally:
        await group.close()
        for channel in channels:
            await channel.close()


def begin(group: StreamGroup, outcomes: list[Outcome]) -> Any:
    ends_at = asyncio.get_running_loop().time() + 30
    return group.begin("key-1", SCHEME, PURPOSE, message=b"m", ends_at=ends_at, answered=outcomes.append)


async def until_answered(outcomes: list[Outcome], count: int) -> None:
    async with asyncio.timeout(10):
        while len(outcomes) < count:
            await asyncio.sleep(0.002)


async def test_requests_are_spread_by_what_is_outstanding(signing: Any) -> None:
    outcomes: list[Outcome] = []
    async with group_of(signing, 3) as (group, streams):
        pending = [begin(group, outcomes) for _ in range(9)]
        assert [stream.load for stream in streams] == [3, 3, 3]
        for each in pending[:1] + pending[3:4]:  # both of the first stream
            each.cancel()
        assert [stream.load for stream in streams] == [1, 3, 3]
        begin(group, outcomes)
        assert [stream.load for stream in streams] == [2, 3, 3]
        signing.service.gate.set()
        await until_answered(outcomes, 8)
        assert signing.service.streams == 3
        assert group.items_sent == 8
        assert group.batches_sent >= 3


async def test_abandoning_fails_what_each_holds(signing: Any) -> None:
    outcomes: list[Outcome] = []
    async with group_of(signing, 2) as (group, _):
        begin(group, outcomes)
        begin(group, outcomes)
        await signing.service.until(lambda: len(signing.service.batches) == 2)
        group.abandon(StreamLost("silent"))
        assert [type(outcome) for outcome in outcomes] == [StreamLost, StreamLost]
