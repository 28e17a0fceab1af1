from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import grpc.aio
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from keyreeve_client.channel import open_local_channel, open_sync_local_channel
from keyreeve_client.sign_client import (
    MAX_BATCH_ITEMS,
    MAX_BATCHES_IN_FLIGHT,
    Outcome,
    Pending,
    SignClient,
    SignStreamClient,
    StreamLost,
    _Batch,
    _deliver,
    _Stream,
)
from keyreeve_common.errors import (
    DeadlineExceeded,
    Internal,
    KeyNotFound,
    KeyreeveError,
    MessageTooLarge,
    RateLimited,
    SchemeNotSupported,
    SvidExpired,
    Unavailable,
)
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.sign_socket import RefusedFrame, parse_agent_frame
from keyreeve_common.v1 import keyserver_pb2
from keyreeve_common.verification import verify_signature

SCHEME = SignatureScheme.ECDSA_SECP256R1_SHA256
PURPOSE = Purpose.TLS13_SERVER_VERIFY
LONG = timedelta(seconds=30)


@asynccontextmanager
async def stream_client(signing: Any) -> AsyncIterator[SignStreamClient]:
    channel = open_local_channel(signing.socket)

    async def current() -> grpc.aio.Channel:
        return channel

    client = SignStreamClient(current)
    try:
        yield client
    finally:
        await client.close()
        await channel.close()


async def call(client: SignStreamClient, message: bytes, key_id: str = "key-1", deadline: timedelta = LONG) -> bytes:
    return await client.sign(key_id, SCHEME, PURPOSE, message=message, deadline=deadline)


def start(client: SignStreamClient, count: int, first: int = 0) -> list[asyncio.Task[bytes]]:
    return [asyncio.create_task(call(client, b"message %d" % number)) for number in range(first, first + count)]


async def test_many_callers_get_their_own_signature(signing: Any) -> None:
    signing.service.gate.set()
    async with stream_client(signing) as client:
        tasks = start(client, 300)
        for number, signature in enumerate(await asyncio.gather(*tasks)):
            # the fixture's key is in the conftest: read it off the service's own answer
            assert signature[:1] == b"\x30", number
    assert signing.service.streams == 1
    assert all(len(batch) <= MAX_BATCH_ITEMS for batch in signing.service.batches)


async def test_batches_are_packed_once_the_server_said_that_it_reads_them(signing: Any) -> None:
    signing.service.gate.set()
    signing.service.packed = True
    async with stream_client(signing) as client:
        await call(client, b"first")
        assert signing.service.packed_batches == 0  # nobody waits for what the server says of itself
        signatures = await asyncio.gather(*start(client, 200))
        assert signing.service.packed_batches > 0
        for number, signature in enumerate(signatures):
            verify_signature(signing.public_key, SCHEME, b"message %d" % number, signature=signature)
        with pytest.raises(KeyNotFound):
            await call(client, b"message", key_id="key-2")
    assert [len(batch) for batch in signing.service.batches] == [1]


async def test_a_server_of_the_release_before_is_sent_no_packed_batch(signing: Any) -> None:
    signing.service.gate.set()
    async with stream_client(signing) as client:
        await call(client, b"first")
        await asyncio.gather(*start(client, 100))
    assert signing.service.packed_batches == 0


async def test_a_request_that_has_no_packed_form_is_refused_alone(signing: Any) -> None:
    signing.service.gate.set()
    signing.service.packed = True
    async with stream_client(signing) as client:
        await call(client, b"first")
        tasks = [*start(client, 3), asyncio.create_task(call(client, b"message", key_id="No Key"))]
        *signatures, refused = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(signature, bytes) for signature in signatures)
    assert isinstance(refused, KeyNotFound)
    assert signing.service.packed_batches == 0


async def test_an_answer_that_is_no_packed_batch_loses_the_stream_and_the_next_request_opens_another(
    signing: Any,
) -> None:
    signing.service.gate.set()
    signing.service.packed = signing.service.garbled = True
    async with stream_client(signing) as client:
        await call(client, b"first")
        with pytest.raises(StreamLost, match="faulty"):
            await call(client, b"second")
        await call(client, b"third")
    assert signing.service.streams == 2


@pytest.mark.parametrize("signature", [b"", b"s" * 1025, b"s" * 70_000], ids=len)
async def test_a_signature_that_no_frame_carries_is_a_fault_of_that_server(signature: bytes) -> None:
    error = await _delivered(keyserver_pb2.SignResult(id=1, signature=signature))
    assert isinstance(error, Internal)


@pytest.mark.parametrize("seconds", [-5, 10**12, -(10**12), 315_576_000_000, 0])
async def test_what_is_no_time_to_wait_is_none(seconds: int) -> None:
    result = keyserver_pb2.SignResult(id=1)
    result.error.code, result.error.detail = "overloaded", "full"
    result.error.retry_after.seconds = seconds
    error = await _delivered(result)
    assert isinstance(error, KeyreeveError)
    assert error.retry_after is None or error.retry_after > timedelta(0)
    frame = parse_agent_frame(RefusedFrame(1, error).to_bytes()[4:])  # the client hears it, whatever it is
    assert isinstance(frame, RefusedFrame)


async def _delivered(result: Any) -> Outcome:
    no: Any = None
    stream, outcomes = _Stream(no, no), list[Outcome]()
    pending = Pending(
        no, outcomes.append, item_id=1, key_id="k", scheme=SCHEME, purpose=PURPOSE, message=b"", trace=b"", ends_at=0.0
    )
    stream.outstanding[1] = pending
    pending.batch = _Batch(stream, 1, 0.0)
    _deliver(stream, result)
    (outcome,) = outcomes
    return outcome


async def test_first_leaves_at_once_and_those_that_arrive_meanwhile_leave_together(signing: Any) -> None:
    async with stream_client(signing) as client:
        tasks = start(client, 1)
        await signing.service.until(lambda: len(signing.service.batches) == 1)
        tasks += start(client, 5, 1)
        tasks += start(client, 70, 6)
        signing.service.gate.set()
        await asyncio.gather(*tasks)
        sizes = [len(batch) for batch in signing.service.batches]
    assert sizes[0] == 1
    assert sizes[1] == MAX_BATCH_ITEMS
    assert sum(sizes) == 76


async def test_at_most_two_batches_are_in_flight(signing: Any) -> None:
    async with stream_client(signing) as client:
        tasks = start(client, MAX_BATCH_ITEMS * 5)
        # The service reads one batch and stops: a second lies in its buffer; the rest must wait here.
        await signing.service.until(lambda: len(signing.service.batches) == 1)
        stream = client._stream
        assert stream is not None
        while len(stream.batches) < MAX_BATCHES_IN_FLIGHT:
            await asyncio.sleep(0)
        for batch in stream.batches:
            batch.sent_at += 3600  # not stale, however slow this test runs
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(stream.batches) == MAX_BATCHES_IN_FLIGHT
        assert len(client._waiting) == MAX_BATCH_ITEMS * 3
        signing.service.gate.set()
        await asyncio.gather(*tasks)


async def test_batches_that_are_slow_do_not_hold_the_pipe(signing: Any) -> None:
    async with stream_client(signing) as client:
        slow = start(client, MAX_BATCHES_IN_FLIGHT)
        await signing.service.until(lambda: len(signing.service.batches) == 1)
        stream = client._stream
        assert stream is not None
        # The service answers nothing: yet what comes later is sent, once those batches are stale.
        later = start(client, 1, 7)
        async with asyncio.timeout(20):
            while sum(batch.open_items for batch in stream.batches) < MAX_BATCHES_IN_FLIGHT + 1:
                await asyncio.sleep(0.005)
        assert not client._waiting
        signing.service.gate.set()
        await asyncio.gather(*slow, *later)


async def test_an_abandoned_stream_fails_what_it_holds_and_the_next_request_opens_another(signing: Any) -> None:
    async with stream_client(signing) as client:
        held = start(client, 3)
        await signing.service.until(lambda: len(signing.service.batches) == 1)
        client.abandon(StreamLost("silent"))
        again = start(client, 1, 9)  # before the old stream's tasks had their turn
        assert [type(result) for result in await asyncio.gather(*held, return_exceptions=True)] == [StreamLost] * 3
        signing.service.gate.set()
        assert await asyncio.gather(*again)
    assert signing.service.streams == 2


async def test_what_the_stream_before_a_renewal_holds_is_abandoned_too(signing: Any) -> None:
    """The key server hangs, and the SVID is renewed: two streams hold requests that go nowhere."""
    channels = [open_local_channel(signing.socket), open_local_channel(signing.socket)]
    at = 0

    async def current() -> grpc.aio.Channel:
        return channels[at]

    client = SignStreamClient(current)
    before = start(client, 3)
    await signing.service.until(lambda: len(signing.service.batches) == 1)
    at = 1
    after = start(client, 3, 3)
    await signing.service.until(lambda: len(signing.service.batches) == 2)
    client.abandon(StreamLost("silent"))
    results = await asyncio.wait_for(asyncio.gather(*before, *after, return_exceptions=True), 10)
    assert [type(result) for result in results] == [StreamLost] * 6
    await client.close()
    for channel in channels:
        await channel.close()


async def test_a_stopping_server_is_a_lost_stream(signing: Any) -> None:
    signing.service.refusal = Unavailable("stopping", retry_after=timedelta(seconds=1))
    async with stream_client(signing) as client:
        with pytest.raises(StreamLost) as caught:
            await call(client, b"x")
    assert caught.value.retry_after == timedelta(seconds=1)


async def test_the_deadline_sent_is_what_is_left(signing: Any) -> None:
    async with stream_client(signing) as client:
        first = start(client, 1)
        await signing.service.until(lambda: len(signing.service.batches) == 1)
        assert 29_000 <= signing.service.batches[0][0].deadline_ms <= 29_950
        signing.service.gate.set()
        await asyncio.gather(*first)


async def test_one_refused_item_does_not_fail_its_batch(signing: Any) -> None:
    signing.service.gate.set()
    async with stream_client(signing) as client:
        good, bad = await asyncio.gather(call(client, b"a"), call(client, b"b", "key-2"), return_exceptions=True)
    assert isinstance(good, bytes)
    assert isinstance(bad, KeyNotFound)


async def test_broken_stream_fails_what_is_in_flight_and_the_next_call_reconnects(signing: Any) -> None:
    async with stream_client(signing) as client:
        tasks = start(client, 3)
        await signing.service.until(lambda: len(signing.service.batches) == 1)
        signing.service.cut.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [StreamLost] * 3
        signing.service.cut.clear()
        signing.service.gate.set()
        assert await call(client, b"again")
    assert signing.service.streams == 2


async def test_server_that_goes_away_is_unavailable(signing: Any) -> None:
    async with stream_client(signing) as client:
        tasks = start(client, 2)
        await signing.service.until(lambda: len(signing.service.batches) == 1)
        await signing.server.stop(0)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [StreamLost] * 2
        with pytest.raises(Unavailable):
            await call(client, b"nobody there")


async def test_refused_stream_keeps_its_error(signing: Any) -> None:
    signing.service.refusal = SvidExpired("SVID expired")
    async with stream_client(signing) as client:
        with pytest.raises(SvidExpired):
            await call(client, b"x")


async def test_refused_stream_says_when_to_come_back(signing: Any) -> None:
    signing.service.refusal = RateLimited("too many streams", retry_after=timedelta(seconds=2))
    async with stream_client(signing) as client:
        with pytest.raises(RateLimited) as caught:
            await call(client, b"x")
    assert caught.value.retry_after == timedelta(seconds=2)


async def test_deadline_frees_its_slot(signing: Any) -> None:
    async with stream_client(signing) as client:
        with pytest.raises(DeadlineExceeded):
            await call(client, b"slow", deadline=timedelta(milliseconds=60))
        stream = client._stream
        assert stream is not None
        assert not stream.batches
        assert not stream.outstanding
        signing.service.gate.set()
        assert await call(client, b"next")


async def test_a_request_that_was_given_up_while_it_waited_is_forgotten(signing: Any) -> None:
    async with stream_client(signing) as client:
        held = start(client, MAX_BATCH_ITEMS * MAX_BATCHES_IN_FLIGHT)
        while client._stream is None or len(client._stream.batches) < MAX_BATCHES_IN_FLIGHT:
            await asyncio.sleep(0)
        late = [asyncio.create_task(call(client, b"late", deadline=timedelta(milliseconds=60))) for _ in range(5)]
        results = await asyncio.gather(*late, return_exceptions=True)
        assert [type(result) for result in results] == [DeadlineExceeded] * 5
        assert not client._waiting
        signing.service.gate.set()
        assert len(await asyncio.gather(*held)) == len(held)


async def test_no_batch_leaves_when_all_gave_up_while_the_channel_was_made(signing: Any) -> None:
    signing.service.gate.set()
    channel, made = open_local_channel(signing.socket), asyncio.Event()

    async def current() -> grpc.aio.Channel:
        await made.wait()
        return channel

    client = SignStreamClient(current)
    ends_at = asyncio.get_running_loop().time() + 30
    outcomes: list[Outcome] = []
    pending = [
        client.begin("key-1", SCHEME, PURPOSE, message=b"m", ends_at=ends_at, answered=outcomes.append)
        for _ in range(3)
    ]
    await asyncio.sleep(0)
    for each in pending:
        each.cancel()
    made.set()
    for _ in range(10):  # the sender has its turn, with nothing to send
        await asyncio.sleep(0)
    assert await call(client, b"the one that stays")
    assert outcomes == []
    assert [len(batch) for batch in signing.service.batches] == [1]
    assert (client.batches_sent, client.items_sent) == (1, 1)
    await client.close()
    await channel.close()


async def test_a_callback_that_fails_harms_no_other_request(signing: Any, caplog: pytest.LogCaptureFixture) -> None:
    signing.service.gate.set()

    def fail(_outcome: Outcome) -> None:
        raise RuntimeError("a fault of this caller")

    async with stream_client(signing) as client:
        ends_at = asyncio.get_running_loop().time() + 30
        client.begin("key-1", SCHEME, PURPOSE, message=b"m", ends_at=ends_at, answered=fail)
        assert await call(client, b"another")
        assert await call(client, b"a third")
    assert signing.service.streams == 1
    assert "sign_callback_failed" in caplog.text


async def test_cancelled_caller_leaves_nothing_behind(signing: Any) -> None:
    async with stream_client(signing) as client:
        task = start(client, 1)[0]
        await signing.service.until(lambda: len(signing.service.batches) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client._stream is not None
        assert not client._stream.outstanding


async def test_new_channel_gets_a_new_stream_and_the_old_one_finishes(signing: Any) -> None:
    channels = [open_local_channel(signing.socket), open_local_channel(signing.socket)]
    at = 0

    async def current() -> grpc.aio.Channel:
        return channels[at]

    client = SignStreamClient(current)
    first = start(client, 1)
    await signing.service.until(lambda: len(signing.service.batches) == 1)
    at = 1
    second = start(client, 1, 1)
    await signing.service.until(lambda: len(signing.service.batches) == 2)
    signing.service.gate.set()
    assert len(await asyncio.gather(*first, *second)) == 2
    assert signing.service.streams == 2
    await client.close()
    for channel in channels:
        await channel.close()


async def test_an_old_stream_that_does_not_end_keeps_nobody_from_the_new_one(
    signing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    signing.service.gate.set()
    channels = [open_local_channel(signing.socket), open_local_channel(signing.socket)]
    at = 0

    async def current() -> grpc.aio.Channel:
        return channels[at]

    async def never() -> None:
        await asyncio.Event().wait()

    client = SignStreamClient(current)
    assert await call(client, b"first")
    assert client._stream is not None
    monkeypatch.setattr(client._stream.call, "done_writing", never)
    at = 1
    assert await call(client, b"second", deadline=timedelta(seconds=2))
    await client.close()
    for channel in channels:
        await channel.close()


async def test_wrong_signature_is_an_internal_error(signing: Any) -> None:
    signing.service.gate.set()
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    async with stream_client(signing) as client:
        with pytest.raises(Internal, match="does not verify"):
            await client.sign("key-1", SCHEME, PURPOSE, message=b"lie", public_key=key)


async def test_too_long_message_is_refused_here(signing: Any) -> None:
    async with stream_client(signing) as client:
        with pytest.raises(MessageTooLarge):
            await call(client, b"x" * 65_537)


async def test_closed_client_is_unavailable(signing: Any) -> None:
    async with stream_client(signing) as client:
        tasks = start(client, 2)
        await signing.service.until(lambda: len(signing.service.batches) == 1)
        await client.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [StreamLost] * 2
        with pytest.raises(Unavailable):
            await call(client, b"x")


async def test_blocking_client(signing: Any) -> None:
    def run() -> None:
        with open_sync_local_channel(signing.socket) as channel:
            client = SignClient(channel)
            assert client.sign("key-1", SCHEME, PURPOSE, message=b"x")
            with pytest.raises(KeyNotFound):
                client.sign("key-2", SCHEME, PURPOSE, message=b"x")
            with pytest.raises(MessageTooLarge):
                client.sign("key-1", SCHEME, PURPOSE, message=b"x" * 65_537)

    await asyncio.to_thread(run)


async def test_blocking_client_without_a_server(tmp_path: Any) -> None:
    def run() -> None:
        with open_sync_local_channel(tmp_path / "none.sock") as channel, pytest.raises(Unavailable):
            SignClient(channel).sign("key-1", SCHEME, PURPOSE, message=b"x")

    await asyncio.to_thread(run)


RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP384R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()
SIGNERS: list[tuple[SignatureScheme, Any, Callable[[bytes], bytes]]] = [
    (
        SignatureScheme.ECDSA_SECP384R1_SHA384,
        EC_KEY.public_key(),
        lambda message: EC_KEY.sign(message, ec.ECDSA(hashes.SHA384())),
    ),
    (SignatureScheme.ED25519, ED_KEY.public_key(), ED_KEY.sign),
    (
        SignatureScheme.RSA_PSS_RSAE_SHA256,
        RSA_KEY.public_key(),
        lambda message: RSA_KEY.sign(message, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256()),
    ),
    (
        SignatureScheme.RSA_PKCS1_SHA512,
        RSA_KEY.public_key(),
        lambda message: RSA_KEY.sign(message, padding.PKCS1v15(), hashes.SHA512()),
    ),
]


@pytest.mark.parametrize(("scheme", "public_key", "sign"), SIGNERS, ids=lambda value: getattr(value, "name", ""))
def test_verify_signature(scheme: SignatureScheme, public_key: Any, sign: Callable[[bytes], bytes]) -> None:
    verify_signature(public_key, scheme, b"m", signature=sign(b"m"))
    with pytest.raises(Internal):
        verify_signature(public_key, scheme, b"other", signature=sign(b"m"))


def test_verify_signature_refuses_a_scheme_of_another_key_type() -> None:
    with pytest.raises(SchemeNotSupported):
        verify_signature(EC_KEY.public_key(), SignatureScheme.ED25519, b"m", signature=b"s")
