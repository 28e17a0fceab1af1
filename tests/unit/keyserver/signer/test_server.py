"""The signer's end of the frames: its socket file ends when it is told to; what one class of keys holds up holds up no other."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
from keyreeve_common.key_id import KeyId
from keyreeve_keyserver import frames
from keyreeve_keyserver.frames import SignBatch, Signed, SignItem, SignResults
from keyreeve_keyserver.signer import server as server_module
from keyreeve_keyserver.signer.controls import ControlService
from keyreeve_keyserver.signer.server import Server
from keyreeve_keyserver.signer.service import SigningService


async def test_listening_ends_while_a_peer_is_connected(tmp_path: Path) -> None:
    """From Python 3.12 on `asyncio.Server.serve_forever` waits for the peers before it ends."""
    path, ready = tmp_path / "signer.sock", asyncio.Event()
    uids = frozenset({os.getuid()})
    server = Server(cast("SigningService", None), cast("ControlService", None), allowed_uids=uids)
    listening = asyncio.create_task(server.listen(path, ready.set))
    await ready.wait()
    _, writer = await asyncio.open_unix_connection(path)
    await asyncio.sleep(0.05)
    listening.cancel()
    done, _ = await asyncio.wait([listening], timeout=3)
    writer.close()
    assert done
    assert not path.exists()


class HangingService:
    """Answers a batch only when the test lets it; tells how many it holds."""

    def __init__(self) -> None:
        self.held = 0
        self.go_on = asyncio.Event()

    async def sign(self, batch: SignBatch) -> AsyncIterator[SignResults]:
        self.held += 1
        if batch.items[0].key_id == "k-slow":
            await self.go_on.wait()
        yield SignResults(batch.batch_id, tuple(Signed(item.id, b"s") for item in batch.items))


def batch(number: int, key_id: str) -> bytes:
    return SignBatch(number, "local", (SignItem(number, KeyId(key_id), 0x0403, 1, 1000, b"m"),)).to_bytes()


async def connection_to(
    service: HangingService,
) -> tuple[asyncio.Task[None], asyncio.StreamReader, asyncio.StreamWriter]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    server = Server(cast("SigningService", service), cast("ControlService", None), allowed_uids=frozenset())
    serving = asyncio.create_task(server.serve_fd(theirs.detach()))
    reader, writer = await asyncio.open_connection(sock=ours)
    return serving, reader, writer


async def test_batches_that_hang_do_not_hold_others_back() -> None:
    """A hundred batches of a token that hangs, and then one of a key that signs: it is answered."""
    service = HangingService()
    serving, reader, writer = await connection_to(service)
    for number in range(100):
        writer.write(batch(number, "k-slow"))
    writer.write(batch(1000, "k-fast"))
    answers = frames.splitter()
    async with asyncio.timeout(20):
        frame = next(iter(answers.feed(await reader.read(65_536))))
    answer = frames.parse_answer_frame(frame)
    assert isinstance(answer, SignResults)
    assert answer.batch_id == 1000
    service.go_on.set()
    writer.close()
    async with asyncio.timeout(20):
        await serving


@pytest.mark.parametrize("bound", ["MAX_IN_FLIGHT", "MAX_ITEMS_IN_FLIGHT"])
async def test_a_front_end_that_keeps_no_bound_is_held_back(monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    """Items count too: a frame of 36 kB holds 256 of them, which take a megabyte of locked memory."""
    monkeypatch.setattr(server_module, bound, 4)
    service = HangingService()
    serving, reader, writer = await connection_to(service)
    for number in range(10):
        writer.write(batch(number, "k-slow"))
    async with asyncio.timeout(20):
        while service.held < 4:
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        assert service.held == 4
        service.go_on.set()
        while service.held < 10:
            await reader.read(65_536)
    writer.close()
    async with asyncio.timeout(20):
        await serving
