"""The sign client: whole messages with a purpose go to the key cluster, signatures come back.

`SignClient` blocks and makes one call per signature. `SignStreamClient` serves many asyncio callers over one stream with natural batching:
a request that finds the pipe free leaves at once; those that arrive while batches are in flight leave together. A batch that has an item which
is slow (a token that hangs, a queue of large keys) does not hold the pipe for long: after STALE_SECONDS others pass it.
Nothing is sent twice here: when the stream breaks, what was in flight fails with StreamLost. A signature may have been made then; since a second
one of the same message tells nobody more than the first, callers may ask another key server.

Spec: design section 5; common/proto/keyreeve_common/v1/keyserver.proto.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, cast

import grpc
import grpc.aio
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from keyreeve_common.errors import (
    DeadlineExceeded,
    Internal,
    KeyreeveError,
    MalformedFrame,
    MessageTooLarge,
    Overloaded,
    Unavailable,
)
from keyreeve_common.grpc_edge import error_from_proto, error_from_rpc, error_from_trailers
from keyreeve_common.purposes import MAX_MESSAGE_BYTES, Purpose
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.sign_batch import (
    PACKED_METADATA,
    Signed,
    SignItem,
    SignResult,
    new_item,
    open_results,
    pack_items,
    read_key_id,
    with_count,
)
from keyreeve_common.sign_socket import MAX_SIGNATURE_BYTES
from keyreeve_common.telemetry import log_exception
from keyreeve_common.trace import checked_trace
from keyreeve_common.v1 import keyserver_pb2, keyserver_pb2_grpc
from keyreeve_common.verification import verify_signature

DEFAULT_DEADLINE = timedelta(seconds=5)
MAX_BATCH_ITEMS = 64
MAX_BATCH_BYTES = 1_048_576  # well under gRPC's bound of 4 MiB a message
MAX_BATCHES_IN_FLIGHT = 2
STALE_SECONDS = 0.025
MAX_WAITING = 8_192
_EDGE_MARGIN_S = 0.05  # lets the server's own deadline answer win over ours
_MAX_DEADLINE_MS = 0xFFFF_FFFF


def _check_message(message: bytes) -> None:
    if len(message) > MAX_MESSAGE_BYTES:
        raise MessageTooLarge(f"message has {len(message)} bytes, at most {MAX_MESSAGE_BYTES} can be signed")


class SignClient:
    """Blocking: one call per signature. Safe to share among threads."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = keyserver_pb2_grpc.SigningStub(channel)

    def sign(
        self,
        key_id: str,
        scheme: SignatureScheme,
        purpose: Purpose,
        *,
        message: bytes,
        deadline: timedelta = DEFAULT_DEADLINE,
        public_key: PublicKeyTypes | None = None,
    ) -> bytes:
        """The signature of the whole `message`, verified if `public_key` is given.

        Raises: KeyreeveError as the key server said it; Unavailable, DeadlineExceeded; Internal for a wrong signature.
        """
        _check_message(message)
        request = keyserver_pb2.SignRequest(
            key_id=key_id, scheme=scheme, purpose=cast("Any", int(purpose)), message=message
        )
        try:
            signature = bytes(self._stub.Sign(request, timeout=deadline.total_seconds()).signature)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        if public_key is not None:
            verify_signature(public_key, scheme, message, signature=signature)
        return signature


class StreamLost(Unavailable):
    """The stream to one key server broke, ended, or could not be opened: it says nothing of the request, and all of that server."""


Outcome = bytes | KeyreeveError
Answered = Callable[[Outcome], None]


class Pending:
    """One request between `begin` and its outcome. `answered` is called once, on the event loop, unless `cancel` came before."""

    __slots__ = (
        "_answered",
        "_client",
        "batch",
        "ends_at",
        "item_id",
        "key_id",
        "message",
        "purpose",
        "scheme",
        "trace",
    )

    def __init__(
        self,
        client: SignStreamClient,
        answered: Answered,
        *,
        item_id: int,
        key_id: str,
        scheme: int,
        purpose: int,
        message: bytes,
        trace: bytes,
        ends_at: float,
    ) -> None:
        self._client = client
        self._answered: Answered | None = answered
        self.item_id = item_id
        self.key_id = key_id
        self.scheme = scheme
        self.purpose = purpose
        self.message = message
        self.trace = trace
        self.ends_at = ends_at  # of the loop's clock
        self.batch: _Batch | None = None

    def cancel(self) -> None:
        """Nobody wants the answer any more: it holds no slot and no memory from here on."""
        if self._answered is not None:
            self._answered = None
            self._client._forget(self)

    def settle(self, outcome: Outcome) -> None:
        answered, self._answered = self._answered, None
        if answered is not None:
            try:
                answered(outcome)
            except Exception:  # of one caller; the others on this stream wait for theirs
                log_exception("sign_callback_failed")


def build_batch(pending: Sequence[Pending], now: float, *, packed: bool) -> keyserver_pb2.SignBatch:
    """The message that carries these requests, each with the time that is left of its deadline. `packed`: the key server reads that."""
    if packed:
        # What has no packed form is for the server to refuse, alone: a packed batch stands or falls as a whole.
        with contextlib.suppress(KeyreeveError, struct.error, UnicodeEncodeError):
            return keyserver_pb2.SignBatch(
                packed=with_count(len(pending), pack_items([_packed_item(each, now) for each in pending]))
            )
    batch = keyserver_pb2.SignBatch()
    add = batch.items.add
    for each in pending:
        add(
            id=each.item_id,
            key_id=each.key_id,
            scheme=each.scheme,
            purpose=cast("Any", each.purpose),
            message=each.message,
            deadline_ms=_left_ms(each, now),
            trace=each.trace,
        )
    return batch


def _packed_item(pending: Pending, now: float) -> SignItem:
    """Raises: InvalidRequest, MalformedFrame, UnicodeEncodeError for what no packed item may be."""
    key_id, trace = read_key_id(pending.key_id.encode("ascii")), checked_trace(pending.trace)
    return new_item(
        (pending.item_id, key_id, pending.scheme, pending.purpose, _left_ms(pending, now), pending.message, trace)
    )


def _left_ms(pending: Pending, now: float) -> int:
    left_s = pending.ends_at - now
    left_ms = int((left_s - min(_EDGE_MARGIN_S, left_s / 2)) * 1000)
    return max(1, min(left_ms, _MAX_DEADLINE_MS))


@dataclass(slots=True, eq=False)
class _Batch:
    """One batch in flight; done when every item is answered or given up."""

    stream: _Stream
    open_items: int
    sent_at: float


@dataclass(slots=True, eq=False)
class _Stream:
    """One SignStream call with what is outstanding on it."""

    channel: grpc.aio.Channel
    call: Any  # grpc.aio's StreamStreamCall: its typing does not tell write from read
    outstanding: dict[int, Pending] = field(default_factory=dict)
    batches: set[_Batch] = field(default_factory=set)
    reader: asyncio.Task[None] | None = None
    packed: bool | None = None  # whether the server reads packed batches; nobody knows before its first answer

    def take_off(self, item_id: int) -> Pending | None:
        """None when nobody waits for it any more."""
        pending = self.outstanding.pop(item_id, None)
        if pending is not None and (batch := pending.batch) is not None:
            batch.open_items -= 1
            if not batch.open_items:
                self.batches.discard(batch)
        return pending

    def fail(self, error: KeyreeveError) -> None:
        waiting = list(self.outstanding.values())
        self.outstanding.clear()
        self.batches.clear()
        for pending in waiting:
            pending.settle(error)


class SignStreamClient:
    """Many asyncio callers, one stream. Belongs to one event loop.

    `channel` gives the channel to use now (`ReloadingChannel.current`); when it gives another one, for a renewed SVID, new batches go to a new
    stream over it, and the old stream ends when its answers are in.
    """

    def __init__(self, channel: Callable[[], Awaitable[grpc.aio.Channel]]) -> None:
        self._channel = channel
        self._waiting: dict[int, Pending] = {}  # by id, in order of arrival
        self._wake = asyncio.Event()
        self._stream: _Stream | None = None
        self._old: set[_Stream] = set()  # those of channels before a renewal, until their answers are in
        self._tasks: set[asyncio.Task[None]] = set()
        self._sender: asyncio.Task[None] | None = None
        self._next_id = 0
        self._closed = False
        self.batches_sent = 0
        self.items_sent = 0

    async def sign(
        self,
        key_id: str,
        scheme: SignatureScheme,
        purpose: Purpose,
        *,
        message: bytes,
        deadline: timedelta = DEFAULT_DEADLINE,
        public_key: PublicKeyTypes | None = None,
    ) -> bytes:
        """The signature of the whole `message`, verified if `public_key` is given.

        Raises: KeyreeveError as the key server said it for this item; Unavailable when the stream cannot be opened or breaks,
        DeadlineExceeded, RateLimited when too much waits here; Internal for a wrong signature.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + deadline.total_seconds()
        future: asyncio.Future[bytes] = loop.create_future()
        pending = self.begin(
            key_id, scheme, purpose, message=message, ends_at=ends_at, answered=partial(settle_future, future)
        )
        try:
            async with asyncio.timeout_at(ends_at):
                signature = await future
        except TimeoutError:
            raise DeadlineExceeded("key server did not answer in time") from None
        finally:
            pending.cancel()
        if public_key is not None:
            verify_signature(public_key, scheme, message, signature=signature)
        return signature

    def begin(
        self,
        key_id: str,
        scheme: int,
        purpose: int,
        *,
        message: bytes,
        ends_at: float,
        answered: Answered,
        trace: bytes = b"",
    ) -> Pending:
        """Sends a request off. `answered` gets, after this returned, the signature or what `sign` raises but for DeadlineExceeded of our own.

        Who does not want the answer any more cancels. `ends_at` is a time of the loop's clock, for the key server to keep.
        Raises: MessageTooLarge, Unavailable when closed, Overloaded.
        """
        _check_message(message)
        if self._closed:
            raise Unavailable("sign client is closed")
        if len(self._waiting) >= MAX_WAITING:
            raise Overloaded("too many requests wait for the key server", retry_after=timedelta(milliseconds=100))
        self._next_id = item_id = (self._next_id + 1) & 0xFFFF_FFFF
        pending = Pending(
            self,
            answered,
            item_id=item_id,
            key_id=key_id,
            scheme=scheme,
            purpose=purpose,
            message=message,
            trace=trace,
            ends_at=ends_at,
        )
        self._waiting[item_id] = pending
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send_forever(), name="sign-stream-sender")
        self._wake.set()
        return pending

    def abandon(self, error: KeyreeveError) -> None:
        """Fails all that waits or is in flight, and ends the stream (those before a renewal too); the next request opens another."""
        streams = [stream for stream in (self._stream, *self._old) if stream is not None]
        self._stream = None
        self._fail_waiting(error)
        for stream in streams:
            stream.fail(error)
            if stream.reader is not None:
                stream.reader.cancel()
        self._wake.set()

    async def close(self) -> None:
        """Fails what waits with Unavailable and ends the stream."""
        self._closed = True
        tasks = [task for task in (self._sender, *self._tasks) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fail_waiting(Unavailable("sign client was closed"))

    def _forget(self, pending: Pending) -> None:
        """An answer that comes later finds nobody."""
        if pending.batch is None:
            self._waiting.pop(pending.item_id, None)
        elif pending.batch.stream.take_off(pending.item_id) is not None:
            self._wake.set()

    async def _send_forever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                try:
                    stream = await self._ready_stream()
                    if (pause_s := self._full_for(stream)) > 0:
                        asyncio.get_running_loop().call_later(pause_s, self._wake.set)
                        break
                    await self._send_batch(stream)
                except KeyreeveError as error:
                    self._fail_waiting(error)
                except grpc.aio.UsageError:
                    self._fail_waiting(StreamLost("channel to the key server was closed"))

    @property
    def load(self) -> int:
        """Requests that wait or are in flight."""
        return len(self._waiting) + (len(self._stream.outstanding) if self._stream is not None else 0)

    @staticmethod
    def _full_for(stream: _Stream) -> float:
        """How long the pipe is full at most: until the batches in flight are answered or stale; 0 when it is not."""
        if len(stream.batches) < MAX_BATCHES_IN_FLIGHT:
            return 0.0
        now = asyncio.get_running_loop().time()
        fresh = sorted(batch.sent_at for batch in stream.batches if now - batch.sent_at < STALE_SECONDS)
        if len(fresh) < MAX_BATCHES_IN_FLIGHT:
            return 0.0
        return max(fresh[-MAX_BATCHES_IN_FLIGHT] + STALE_SECONDS - now, 0.001)

    async def _ready_stream(self) -> _Stream:
        channel = await self._channel()
        if self._stream is not None and self._stream.channel is not channel:
            self._retire(self._stream)
        if self._stream is None:
            call = keyserver_pb2_grpc.SigningStub(cast("Any", channel)).SignStream()
            self._stream = _Stream(channel, call)
            reader = asyncio.create_task(self._read(self._stream), name="sign-stream-reader")
            self._stream.reader = reader
            self._track(reader)
        return self._stream

    def _track(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _retire(self, stream: _Stream) -> None:
        """Ends the stream once its answers are in; a server that hangs keeps nobody from the new one."""
        self._stream = None
        self._old.add(stream)
        self._track(asyncio.create_task(_end_writing(stream.call), name="sign-stream-end"))

    def _take_batch(self) -> list[Pending]:
        """The next requests in order of arrival, at most MAX_BATCH_ITEMS and about MAX_BATCH_BYTES."""
        taken: list[Pending] = []
        size = 0
        for pending in self._waiting.values():
            taken.append(pending)
            size += len(pending.message)
            if len(taken) == MAX_BATCH_ITEMS or size >= MAX_BATCH_BYTES:
                break
        for pending in taken:
            del self._waiting[pending.item_id]
        return taken

    async def _send_batch(self, stream: _Stream) -> None:
        taken, now = self._take_batch(), asyncio.get_running_loop().time()
        if not taken:
            return  # their callers gave up while the channel was made
        batch = _Batch(stream, len(taken), now)
        stream.batches.add(batch)
        for pending in taken:
            pending.batch = batch
            stream.outstanding[pending.item_id] = pending
        self.batches_sent += 1
        self.items_sent += len(taken)
        try:
            await stream.call.write(build_batch(taken, now, packed=stream.packed is True))
        except (grpc.RpcError, asyncio.InvalidStateError):
            # The reader learns the cause and fails what is outstanding; until it has, no new stream must take its place unseen.
            if stream.reader is not None:
                await asyncio.wait((stream.reader,))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # The stream was abandoned, and gRPC cancelled the write with it: who waits now goes to another stream.

    async def _read(self, stream: _Stream) -> None:
        error: KeyreeveError = StreamLost("sign stream was given up")
        try:
            while True:
                answer = await stream.call.read()
                if answer is grpc.aio.EOF:
                    error = await _end_of(stream.call)
                    return
                if stream.packed is None:
                    stream.packed = await _reads_packed(stream.call)
                for result in open_results(answer.packed) if answer.packed else ():
                    _deliver_packed(stream, result)
                for result in answer.results:
                    _deliver(stream, result)
                self._wake.set()
        except grpc.RpcError as failure:
            error = _stream_error(failure)
        except MalformedFrame as failure:
            stream.call.cancel()
            error = StreamLost(f"key server answered what is no packed batch: {failure.detail}; that server is faulty")
        except asyncio.CancelledError:
            stream.call.cancel()  # only here: cancelling a call also cancels the task that writes to it
            raise
        finally:
            if self._stream is stream:
                self._stream = None
            self._old.discard(stream)
            stream.fail(error)
            self._wake.set()

    def _fail_waiting(self, error: KeyreeveError) -> None:
        waiting = list(self._waiting.values())
        self._waiting.clear()
        for pending in waiting:
            pending.settle(error)


def settle_future(future: asyncio.Future[bytes], outcome: Outcome) -> None:
    """For callers that await."""
    if future.done():
        return
    if isinstance(outcome, KeyreeveError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _deliver(stream: _Stream, result: keyserver_pb2.SignResult) -> None:
    pending = stream.take_off(result.id)
    if pending is None:
        return
    signature = result.signature
    if 0 < len(signature) <= MAX_SIGNATURE_BYTES:
        pending.settle(signature)
    elif result.WhichOneof("result") != "signature":
        pending.settle(error_from_proto(result.error))
    else:  # no frame of the sign socket could carry it on
        pending.settle(Internal(f"key server gave {len(signature)} bytes for a signature: that server is faulty"))


def _deliver_packed(stream: _Stream, result: SignResult) -> None:
    pending = stream.take_off(result.id)
    if pending is not None:
        pending.settle(result.signature if isinstance(result, Signed) else result.error)


async def _reads_packed(call: Any) -> bool:
    """As the server said when the stream began; what it said is there, since it has answered."""
    return any(name == PACKED_METADATA for name, _ in await call.initial_metadata() or ())


async def _end_writing(call: Any) -> None:
    with contextlib.suppress(
        grpc.RpcError, asyncio.InvalidStateError
    ):  # it broke; its reader says so to those who wait
        await call.done_writing()


async def _end_of(call: Any) -> KeyreeveError:
    """Why the server ended the stream."""
    code = await call.code()
    if code is grpc.StatusCode.OK:
        return StreamLost("key server ended the sign stream")
    return _named_error(await call.trailing_metadata(), str(await call.details() or code.name))


def _stream_error(failure: grpc.RpcError) -> KeyreeveError:
    """A refusal by name stays what it is; whatever else breaks a stream is StreamLost, whichever status the transport chose."""
    call = cast("Any", failure)
    return _named_error(call.trailing_metadata(), str(call.details() or "sign stream broke"))


def _named_error(metadata: Any, detail: str) -> KeyreeveError:
    named = error_from_trailers(metadata, detail)
    if named is None:
        return StreamLost(f"sign stream to the key server broke: {detail}")
    if type(named) is Unavailable:  # a key server that is stopping says so
        return StreamLost(named.detail, retry_after=named.retry_after)
    return named
