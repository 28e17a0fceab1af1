"""SignStream against an engine that the test plays: back-pressure, draining, and the clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from keyreeve_common.errors import (
    ErrorCode,
    Internal,
    InvalidRequest,
    KeyreeveError,
    Overloaded,
    PurposeMismatch,
    RateLimited,
    SvidExpired,
    Unavailable,
)
from keyreeve_common.grpc_edge import Peer, _current_peer
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import Purpose
from keyreeve_common.sign_batch import (
    PackedItems,
    Refused,
    Signed,
    SignItem,
    SignResult,
    pack_items,
    pack_results,
    read_results,
    scan_results,
    split_count,
    with_count,
)
from keyreeve_common.v1 import keyserver_pb2
from keyreeve_common.x509_svid import parse_x509_svid
from keyreeve_keyserver.config import Limits
from keyreeve_keyserver.domain.policy import Grant
from keyreeve_keyserver.domain.rates import MIN_PER_SECOND, Rate
from keyreeve_keyserver.frontend.access import Access
from keyreeve_keyserver.frontend.audit_trail import AuditTrail
from keyreeve_keyserver.frontend.engine import SigningEngine
from keyreeve_keyserver.frontend.metrics import FrontEndMetrics
from keyreeve_keyserver.frontend.quarantine_watch import QuarantineWatch, Refusal
from keyreeve_keyserver.frontend.rates import RateExceeded
from keyreeve_keyserver.frontend.sign_stream import ITEMS_PER_BATCH
from keyreeve_keyserver.frontend.signer_link import OnResults
from keyreeve_keyserver.frontend.signing import MAX_STREAMS_PER_CALLER, SigningServicer
from keyreeve_testing.keyserver import sign_item
from keyreeve_testing.pki import TestPki

KEY_ID = "k-" + "a" * 26


class OpenAccess:
    """Lets everything through; `grant` is by what, None where nothing limits it."""

    generation = 0
    is_fresh = True

    def __init__(self) -> None:
        self.grant: Grant | None = None

    def require_admitted(self, caller: str, now: datetime) -> None:
        return

    def authorize(self, holder: str, key_id: str, purpose: int, now: datetime) -> Grant | None:
        return self.grant


class ScriptedEngine:
    """Keeps what is submitted until `answer`."""

    def __init__(self) -> None:
        self.trail = AuditTrail()
        self.waiting: list[tuple[Sequence[SignItem], OnResults]] = []
        self.submitted = asyncio.Event()
        self.count = 0
        self.metrics = FrontEndMetrics()

    def submit(self, caller: str, items: Sequence[SignItem], on_results: OnResults, *, timeout_s: float) -> None:
        self.waiting.append((items, on_results))
        self.count += 1
        self.submitted.set()

    def answer(self) -> None:
        items, on_results = self.waiting.pop(0)
        on_results([Signed(item.id, b"s") for item in items])


class KeptRefusals:
    """In the place of the watch that puts holders in quarantine."""

    def __init__(self) -> None:
        self.found: list[tuple[type[KeyreeveError], bool]] = []

    def refused(self, holder: str, refusals: Sequence[Refusal], *, by_signer: bool = False) -> None:
        self.found += [(type(error), by_signer) for _, _, error in refusals]


class Context:
    """The transport: keeps what the stream says of itself at its begin."""

    def __init__(self) -> None:
        self.metadata: tuple[tuple[str, str], ...] = ()

    def time_remaining(self) -> float:
        return 1.0

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        await asyncio.sleep(0)  # as the real one, which waits for the transport
        self.metadata = metadata


class Rig:
    def __init__(self, *, batches_per_stream: int = 32) -> None:
        self.now = datetime.now(UTC)
        self.engine = ScriptedEngine()
        limits = Limits(batches_per_stream=batches_per_stream)
        self.access, self.watch = OpenAccess(), KeptRefusals()
        access, engine = cast("Access", self.access), cast("SigningEngine", self.engine)
        watch = cast("QuarantineWatch", self.watch)
        self.service = SigningServicer(access, engine, limits, lambda: self.now, watch)
        svid = TestPki().svid("agent/a", not_after=self.now + timedelta(hours=1))
        self.peer = Peer(svid=parse_x509_svid(svid.chain[0]))
        self.sent: asyncio.Queue[keyserver_pb2.SignBatch | None] = asyncio.Queue()
        self.read = 0

    async def _requests(self) -> AsyncIterator[keyserver_pb2.SignBatch]:
        while (batch := await self.sent.get()) is not None:
            self.read += 1
            yield batch

    def open(self) -> AsyncIterator[keyserver_pb2.SignResultBatch]:
        _current_peer.set(self.peer)
        return self.service.SignStream(self._requests(), cast("Any", Context()))

    def limit(self, burst: int) -> None:
        """So many signatures at once, and hardly any later."""
        purposes = frozenset({Purpose.TLS13_SERVER_VERIFY})
        self.access.grant = Grant(KeyId(KEY_ID), self.peer.name, purposes, self.now, rate=Rate(MIN_PER_SECOND, burst))

    async def sign(self) -> bytes:
        """One call of the unary method."""
        _current_peer.set(self.peer)
        request = keyserver_pb2.SignRequest(key_id=KEY_ID, scheme=0x0403, purpose=1, message=b"m")  # type: ignore[arg-type]
        return (await self.service.Sign(request, cast("Any", Context()))).signature

    def send(self, number: int) -> None:
        self.sent.put_nowait(keyserver_pb2.SignBatch(items=[sign_item(number, KEY_ID)]))

    async def until_submitted(self, count: int) -> None:
        while self.engine.count < count:
            self.engine.submitted.clear()
            await self.engine.submitted.wait()


async def turns(count: int = 50) -> None:
    """Lets every task run as far as it can."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_client_that_never_reads_is_held_back() -> None:
    rig = Rig(batches_per_stream=1)
    room = ITEMS_PER_BATCH
    stream = rig.open()
    for number in range(2 * room):
        rig.send(number)
    first = asyncio.ensure_future(anext(stream))
    await rig.until_submitted(room)
    rig.engine.answer()
    await first
    rig.engine.answer()
    await turns()
    assert rig.engine.count == room  # all room is taken until results are out
    assert (await anext(stream)).results
    await rig.until_submitted(room + 1)
    await stream.aclose()  # type: ignore[attr-defined]


async def test_a_batch_with_one_slow_item_gives_the_room_of_the_others_back() -> None:
    rig = Rig(batches_per_stream=1)
    stream = rig.open()
    numbers = range(ITEMS_PER_BATCH)
    rig.sent.put_nowait(keyserver_pb2.SignBatch(items=[sign_item(number, KEY_ID) for number in numbers]))
    first = asyncio.ensure_future(anext(stream))
    await rig.until_submitted(1)
    items, on_results = rig.engine.waiting.pop(0)
    on_results([Signed(item.id, b"s") for item in items[1:]])
    assert len((await first).results) == ITEMS_PER_BATCH - 1
    rig.send(1000)
    second = asyncio.ensure_future(anext(stream))
    await rig.until_submitted(2)  # while the first item of the first batch is still under way
    rig.engine.answer()
    assert [result.id for result in (await second).results] == [1000]
    await stream.aclose()  # type: ignore[attr-defined]


async def test_a_stream_that_ends_while_a_batch_waits_for_room_ends() -> None:
    rig = Rig(batches_per_stream=1)
    stream = rig.open()
    for number in range(ITEMS_PER_BATCH + 1):
        rig.send(number)
    first = asyncio.ensure_future(anext(stream))
    await rig.until_submitted(ITEMS_PER_BATCH)
    rig.service.drain()
    for _ in range(ITEMS_PER_BATCH):
        rig.engine.answer()
    await first
    for _ in range(ITEMS_PER_BATCH - 1):
        await anext(stream)
    with pytest.raises(Unavailable):
        await anext(stream)
    assert rig.engine.count == ITEMS_PER_BATCH


async def test_expired_svid_ends_the_stream_after_its_answers() -> None:
    rig = Rig()
    stream = rig.open()
    rig.send(1)
    first = asyncio.ensure_future(anext(stream))
    await rig.until_submitted(1)
    rig.now += timedelta(hours=2)
    rig.send(2)
    await turns()
    rig.engine.answer()
    assert (await first).results[0].signature == b"s"
    with pytest.raises(SvidExpired):
        await anext(stream)
    assert rig.engine.count == 1


async def test_draining_answers_what_was_taken() -> None:
    rig = Rig()
    stream = rig.open()
    rig.send(1)
    first = asyncio.ensure_future(anext(stream))
    await rig.until_submitted(1)
    rig.service.drain()
    rig.engine.answer()
    assert (await first).results[0].signature == b"s"
    with pytest.raises(Unavailable):
        await anext(stream)
    late = rig.open()
    with pytest.raises(Unavailable):
        await anext(late)


async def test_end_of_requests_ends_the_stream_after_the_last_result() -> None:
    rig = Rig()
    stream = rig.open()
    rig.send(1)
    rig.sent.put_nowait(keyserver_pb2.SignBatch())
    rig.sent.put_nowait(None)
    first = asyncio.ensure_future(anext(stream))
    await rig.until_submitted(1)
    rig.engine.answer()
    await first
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_fault_of_ours_does_not_end_the_stream_well(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(rig.service.access, "authorize", broken)
    stream = rig.open()
    rig.send(1)
    with pytest.raises(Internal):
        await anext(stream)


async def test_one_caller_has_so_many_streams_and_takes_none_of_others() -> None:
    """Each stream of a client that never reads holds a batch: without a bound, as many as it likes."""
    rig = Rig()
    streams = [rig.open() for _ in range(MAX_STREAMS_PER_CALLER + 1)]
    reading = [asyncio.create_task(anext(stream)) for stream in streams]
    await turns()
    refused = [task for task in reading if task.done()]
    assert [type(task.exception()) for task in refused] == [Overloaded]
    other = rig.service.SignStream(rig._requests(), cast("Any", Context()))
    svid = TestPki().svid("agent/b", not_after=rig.now + timedelta(hours=1))
    _current_peer.set(Peer(svid=parse_x509_svid(svid.chain[0])))
    of_other = asyncio.create_task(anext(other))
    await turns()
    assert not of_other.done()
    for task in [*reading, of_other]:
        task.cancel()
    await asyncio.gather(*reading, of_other, return_exceptions=True)
    assert not rig.service._streams
    again = asyncio.create_task(anext(rig.open()))
    await turns()
    assert not again.done()
    again.cancel()


async def test_what_a_call_exceeds_is_its_callers_conduct_and_no_word_of_the_signer() -> None:
    """Else no rate would ever put a holder in quarantine that asks one by one."""
    rig = Rig()
    rig.limit(burst=1)
    first = asyncio.create_task(rig.sign())
    await rig.until_submitted(1)
    with pytest.raises(RateLimited):
        await rig.sign()
    assert rig.watch.found == [(RateExceeded, False)]
    rig.engine.answer()
    assert await first == b"s"


async def test_what_the_signer_refuses_in_a_call_is_marked_as_its_word() -> None:
    rig = Rig()
    asked = asyncio.create_task(rig.sign())
    await rig.until_submitted(1)
    items, on_results = rig.engine.waiting.pop(0)
    on_results([Refused(items[0].id, PurposeMismatch("form"))])
    with pytest.raises(PurposeMismatch):
        await asked
    assert rig.watch.found == [(PurposeMismatch, True)]


def packed(*items: SignItem) -> keyserver_pb2.SignBatch:
    return keyserver_pb2.SignBatch(packed=with_count(len(items), pack_items(items)))


def unpacked(answer: keyserver_pb2.SignResultBatch) -> Sequence[SignResult]:
    count, data = split_count(answer.packed)
    return read_results(data, count)


def packed_item(number: int, **changes: Any) -> SignItem:
    return SignItem(number, KeyId(KEY_ID), 0x0403, 1, 1_000, b"m", b"\x01" * 16 + bytes(9))._replace(**changes)


async def test_a_packed_batch_goes_on_as_it_came_and_is_answered_packed() -> None:
    rig = Rig()
    stream = rig.open()
    rig.sent.put_nowait(packed(packed_item(1), packed_item(2)))
    answer = asyncio.ensure_future(anext(stream))
    await rig.until_submitted(1)
    items, on_results = rig.engine.waiting.pop(0)
    assert isinstance(items, PackedItems)
    data = pack_results([Signed(1, b"one"), Signed(2, b"two")])
    on_results(scan_results(data, 2))
    assert (await answer).packed == with_count(2, data)
    await stream.aclose()  # type: ignore[attr-defined]


async def test_refusals_of_a_packed_batch_are_packed_and_leave_their_neighbours_alone() -> None:
    rig = Rig()
    stream = rig.open()
    rig.sent.put_nowait(packed(packed_item(1), packed_item(2, purpose=0), packed_item(3, purpose=99)))
    refused = unpacked(await anext(stream))
    assert [(result.id, result.error.code) for result in refused if isinstance(result, Refused)] == [
        (2, ErrorCode.PURPOSE_NOT_PERMITTED),
        (3, ErrorCode.PURPOSE_NOT_PERMITTED),
    ]
    rig.engine.answer()
    (signed,) = unpacked(await anext(stream))
    assert signed == Signed(1, b"s")
    await stream.aclose()  # type: ignore[attr-defined]


async def test_the_rate_lets_through_of_a_packed_batch_what_it_has_tokens_for() -> None:
    rig = Rig()
    rig.limit(burst=3)
    stream = rig.open()
    rig.sent.put_nowait(packed(packed_item(1), packed_item(2)))
    rig.sent.put_nowait(packed(packed_item(3), packed_item(4), packed_item(5)))
    refused = unpacked(await anext(stream))
    codes = [(result.id, result.error.code) for result in refused if isinstance(result, Refused)]
    assert codes == [(4, ErrorCode.RATE_LIMITED), (5, ErrorCode.RATE_LIMITED)]
    assert rig.watch.found == [(RateExceeded, False)] * 2
    assert [[item.id for item in items] for items, _ in rig.engine.waiting] == [[1, 2], [3]]
    await stream.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize("deadline_ms", [0, 3_600_000])
async def test_the_servers_own_bound_holds_for_packed_items_too(deadline_ms: int) -> None:
    rig = Rig()
    stream = rig.open()
    rig.sent.put_nowait(packed(packed_item(1, deadline_ms=deadline_ms)))
    answer = asyncio.ensure_future(anext(stream))
    await rig.until_submitted(1)
    bound = Limits().sign_timeout / timedelta(milliseconds=1)
    assert [item.deadline_ms for item in rig.engine.waiting[0][0]] == [bound]
    rig.engine.answer()
    await answer
    await stream.aclose()  # type: ignore[attr-defined]


async def test_an_id_that_is_outstanding_refuses_the_whole_packed_batch() -> None:
    rig = Rig()
    stream = rig.open()
    rig.sent.put_nowait(packed(packed_item(1)))
    rig.sent.put_nowait(packed(packed_item(1), packed_item(2)))
    refused = unpacked(await anext(stream))
    assert [result.id for result in refused] == [1, 2]
    assert all(isinstance(result, Refused) for result in refused)
    await stream.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "batch",
    [
        keyserver_pb2.SignBatch(packed=b"\x00\x01noise"),
        keyserver_pb2.SignBatch(packed=with_count(257, b"")),
        keyserver_pb2.SignBatch(items=[sign_item(1, KEY_ID)], packed=b"\x00\x01"),
    ],
)
async def test_what_is_no_packed_batch_ends_the_stream(batch: keyserver_pb2.SignBatch) -> None:
    rig = Rig()
    stream = rig.open()
    rig.sent.put_nowait(batch)
    with pytest.raises(InvalidRequest):
        await anext(stream)
    assert rig.engine.count == 0


async def test_the_stream_says_that_it_reads_packed_batches() -> None:
    rig, context = Rig(), Context()
    _current_peer.set(rig.peer)
    stream = rig.service.SignStream(rig._requests(), cast("Any", context))
    rig.sent.put_nowait(None)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert context.metadata == (("keyreeve-packed", "1"),)
