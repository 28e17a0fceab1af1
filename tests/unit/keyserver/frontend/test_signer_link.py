"""The link to the signer, against a signer that the test plays itself."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from keyreeve_common.errors import DeadlineExceeded, InvalidRequest, KeyreeveError, Unavailable
from keyreeve_common.key_id import KeyId
from keyreeve_keyserver import frames
from keyreeve_keyserver.frames import Control, ControlOk, ControlRefused, Refused, Signed, SignItem, SignResult
from keyreeve_keyserver.frontend.signer_link import SignerLink, _parts

BYTES = 134_217_728


class FakeSigner:
    """The other end of the socketpair: `next_frame` reads a request, `say` answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def next_frame(self) -> frames.RequestFrame:
        length = int.from_bytes(await self.reader.readexactly(4), "big")
        return frames.parse_request_frame(await self.reader.readexactly(length))

    def say(self, frame: frames.AnswerFrame) -> None:
        self.writer.write(frame.to_bytes())

    async def hang_up(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


@asynccontextmanager
async def connected(*, limit: int = BYTES) -> AsyncIterator[tuple[SignerLink, FakeSigner]]:
    ours, theirs = socket.socketpair()
    link = SignerLink(bytes_in_flight=limit)
    serving = asyncio.create_task(link.serve_descriptor(ours.detach()))
    signer = FakeSigner(*await asyncio.open_unix_connection(sock=theirs))
    hello = await signer.next_frame()
    assert isinstance(hello, Control)
    assert hello.op == "capabilities"
    signer.say(ControlOk(hello.request_id, {"backends": [], "default_backend": "soft"}))
    await link.ready.wait()
    yield link, signer
    link.close()
    await signer.hang_up()
    await serving


def item(number: int, message: bytes = b"m") -> SignItem:
    return SignItem(number, KeyId("k-1"), 0x0403, 1, 1000, message)


class Results:
    def __init__(self) -> None:
        self.by_id: dict[int, SignResult] = {}
        self._changed = asyncio.Event()

    def __call__(self, results: object) -> None:
        for result in results:  # type: ignore[attr-defined]
            assert result.id not in self.by_id, "answered twice"
            self.by_id[result.id] = result
        self._changed.set()

    async def wait(self, count: int) -> dict[int, SignResult]:
        while len(self.by_id) < count:
            self._changed.clear()
            await self._changed.wait()
        return self.by_id


def error_of(result: SignResult) -> KeyreeveError:
    assert isinstance(result, Refused)
    return result.error


async def test_results_in_any_order_and_in_pieces() -> None:
    async with connected() as (link, signer):
        results = Results()
        link.submit("local", [item(number) for number in range(4)], results, timeout_s=5)
        batch = await signer.next_frame()
        assert isinstance(batch, frames.SignBatch)
        signer.say(frames.SignResults(batch.batch_id, (Signed(3, b"3"), Signed(0, b"0"))))
        signer.say(frames.SignResults(batch.batch_id, (Refused(1, InvalidRequest("no")), Signed(2, b"2"))))
        found = await results.wait(4)
        assert found[3] == Signed(3, b"3")
        assert error_of(found[1]).detail == "no"


async def test_answers_nobody_asked_for_are_dropped() -> None:
    async with connected() as (link, signer):
        results = Results()
        link.submit("local", [item(1)], results, timeout_s=5)
        batch = await signer.next_frame()
        assert isinstance(batch, frames.SignBatch)
        signer.say(frames.SignResults(batch.batch_id + 7, (Signed(1, b"x"),)))
        signer.say(frames.SignResults(batch.batch_id, (Signed(9, b"x"),)))
        signer.say(frames.SignResults(batch.batch_id, (Signed(1, b"good"),)))
        assert (await results.wait(1))[1] == Signed(1, b"good")


async def test_a_silent_signer_costs_the_deadline_only() -> None:
    async with connected() as (link, _signer):
        results = Results()
        link.submit("local", [item(1), item(2)], results, timeout_s=0.01)
        found = await results.wait(2)
        assert all(isinstance(error_of(result), DeadlineExceeded) for result in found.values())
        with pytest.raises(DeadlineExceeded):
            await link.control("health", timeout=0.01)


async def test_lost_signer_answers_everyone() -> None:
    async with connected() as (link, signer):
        results = Results()
        link.submit("local", [item(number) for number in range(3)], results, timeout_s=5)
        waiting = asyncio.create_task(link.control("health", timeout=5))
        await signer.next_frame()
        await signer.next_frame()
        await signer.hang_up()
        found = await results.wait(3)
        assert all(type(error_of(result)) is Unavailable for result in found.values())
        assert all(error_of(result).retry_after for result in found.values())
        with pytest.raises(Unavailable):
            await waiting
        late = Results()
        link.submit("local", [item(1)], late, timeout_s=5)
        assert type(error_of(late.by_id[1])) is Unavailable
        with pytest.raises(Unavailable):
            _ = link.capabilities


async def test_malformed_answer_closes_the_connection() -> None:
    async with connected() as (link, signer):
        results = Results()
        link.submit("local", [item(1)], results, timeout_s=5)
        await signer.next_frame()
        signer.writer.write(b"\x00\x00\x00\x02\x07\x07")
        assert type(error_of((await results.wait(1))[1])) is Unavailable


async def test_refused_control_is_the_signers_error() -> None:
    async with connected() as (link, signer):
        waiting = asyncio.create_task(link.control("create_key", timeout=5))
        request = await signer.next_frame()
        assert isinstance(request, Control)
        signer.say(ControlRefused(request.request_id, InvalidRequest("no such type")))
        with pytest.raises(InvalidRequest, match="no such type"):
            await waiting


async def test_bytes_in_flight_are_bounded() -> None:
    async with connected(limit=100_000) as (link, signer):
        first, second, third = Results(), Results(), Results()
        link.submit("local", [item(1, b"x" * 60_000)], first, timeout_s=5)
        link.submit("local", [item(2, b"x" * 60_000)], second, timeout_s=5)
        assert "too many" in error_of(second.by_id[2]).detail
        batch = await signer.next_frame()
        assert isinstance(batch, frames.SignBatch)
        signer.say(frames.SignResults(batch.batch_id, (Signed(1, b"s"),)))
        await first.wait(1)
        link.submit("local", [item(3, b"x" * 60_000)], third, timeout_s=5)
        assert isinstance(await signer.next_frame(), frames.SignBatch)


def test_large_batches_are_cut_to_the_frame() -> None:
    items = [item(number, b"x" * 65_536) for number in range(256)]
    parts = list(_parts(items))
    assert [entry for part in parts for entry in part] == items
    for part in parts:
        assert len(frames.SignBatch(1, "spiffe://" + "t" * 255 + "/" + "x" * 1700, tuple(part)).to_bytes()) > 0
    assert list(_parts(items[:64])) == [items[:64]]


async def test_a_signer_that_refuses_us_is_not_stormed(tmp_path: Path) -> None:
    refused = 0

    async def refuse(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal refused
        refused += 1
        writer.close()

    async with await asyncio.start_unix_server(refuse, tmp_path / "s"):
        link = SignerLink(bytes_in_flight=BYTES)
        serving = asyncio.create_task(link.serve_path(tmp_path / "s"))
        await asyncio.sleep(0.4)
        serving.cancel()
    assert refused == 1
