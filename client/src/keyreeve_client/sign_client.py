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
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import grpc
import grpc.aio
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from keyreeve_common.errors import (
    DeadlineExceeded,
    Internal,
    KeyreeveError,
    MessageTooLarge,
    Overloaded,
    Unavailable,
)
from keyreeve_common.grpc_edge import error_from_proto, error_from_rpc, error_from_trailers
from keyreeve_common.purposes import MAX_MESSAGE_BYTES, Purpose
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.sign_socket import MAX_SIGNATURE_BYTES
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


@dataclass(slots=True)
class _Waiting:
    item: keyserver_pb2.SignItem
    answer: asyncio.Future[bytes]
    ends_at: float  # of the loop's clock


@dataclass(slots=True, eq=False)
class _Batch:
    """One batch in flight; done when every item is answered or given up."""

    open_ids: set[int]
    sent_at: float


@dataclass(slots=True, eq=False)
class _Stream:
    """One SignStream call with what is outstanding on it."""

    channel: grpc.aio.Channel
    call: Any  # grpc.aio's StreamStreamCall: its typing does not tell write from read
    outstanding: dict[int, tuple[asyncio.Future[bytes], _Batch]] = field(default_factory=dict)
    batches: set[_Batch] = field(default_factory=set)
    reader: asyncio.Task[None] | None = None

    def settle(self, item_id: int) -> asyncio.Future[bytes] | None:
        """Takes the item off; None when nobody waits for it any more."""
        future, batch = self.outstanding.pop(item_id, (None, None))
        if batch is not None:
            batch.open_ids.discard(item_id)
            if not batch.open_ids:
                self.batches.discard(batch)
        return future

    def fail(self, error: KeyreeveError) -> None:
        waiting = [future for future, _ in self.outstanding.values()]
        self.outstanding.clear()
        self.batches.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(error)


class SignStreamClient:
    """Many asyncio callers, one stream. Belongs to one event loop.

    `channel` gives the channel to use now (`ReloadingChannel.current`); when it gives another one, for a renewed SVID, new batches go to a new
    stream over it, and the old stream ends when its answers are in.
    """

    def __init__(self, channel: Callable[[], Awaitable[grpc.aio.Channel]]) -> None:
        self._channel = channel
        self._waiting: OrderedDict[int, _Waiting] = OrderedDict()  # by id, in order of arrival
        self._wake = asyncio.Event()
        self._stream: _Stream | None = None
        self._old: set[_Stream] = set()  # those of channels before a renewal, until their answers are in
        self._tasks: set[asyncio.Task[None]] = set()
        self._sender: asyncio.Task[None] | None = None
        self._next_id = 0
        self._closed = False

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
        ends_at = asyncio.get_running_loop().time() + deadline.total_seconds()
        answer = self.begin(key_id, scheme, purpose, message=message, ends_at=ends_at)
        try:
            async with asyncio.timeout_at(ends_at):
                signature = await answer
        except TimeoutError:
            raise DeadlineExceeded("key server did not answer in time") from None
        if public_key is not None:
            verify_signature(public_key, scheme, message, signature=signature)
        return signature

    def begin(
        self, key_id: str, scheme: int, purpose: int, *, message: bytes, ends_at: float, trace: bytes = b""
    ) -> asyncio.Future[bytes]:
        """Sends a request off; its future gives the signature, or raises what `sign` raises but for DeadlineExceeded of our own.

        Who does not want the answer any more cancels the future. `ends_at` is a time of the loop's clock, for the key server to keep.
        Raises: MessageTooLarge, Unavailable when closed, Overloaded.
        """
        _check_message(message)
        if self._closed:
            raise Unavailable("sign client is closed")
        if len(self._waiting) >= MAX_WAITING:
            raise Overloaded("too many requests wait for the key server", retry_after=timedelta(milliseconds=100))
        item = keyserver_pb2.SignItem(
            id=self._new_id(),
            key_id=key_id,
            scheme=scheme,
            purpose=cast("Any", int(purpose)),
            message=message,
            trace=trace,
        )
        waiting = _Waiting(item, asyncio.get_running_loop().create_future(), ends_at)
        waiting.answer.add_done_callback(lambda _: self._give_up(item.id))
        self._waiting[item.id] = waiting
        self._start_sender()
        return waiting.answer

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

    def _new_id(self) -> int:
        self._next_id = (self._next_id + 1) & 0xFFFF_FFFF
        return self._next_id

    def _give_up(self, item_id: int) -> None:
        """Whatever became of the item, it holds no slot and no memory any more; an answer that comes later finds nobody."""
        self._waiting.pop(item_id, None)
        for stream in (self._stream, *self._old):
            if stream is not None and stream.settle(item_id) is not None:
                self._wake.set()
                return

    def _start_sender(self) -> None:
        self._wake.set()
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send_forever(), name="sign-stream-sender")

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

    def _take_batch(self) -> list[_Waiting]:
        """The next items in order of arrival, at most MAX_BATCH_ITEMS and about MAX_BATCH_BYTES."""
        taken: list[_Waiting] = []
        size, now = 0, asyncio.get_running_loop().time()
        while self._waiting and len(taken) < MAX_BATCH_ITEMS and size < MAX_BATCH_BYTES:
            _, waiting = self._waiting.popitem(last=False)
            if not waiting.answer.done():  # else its caller was told to give up in this very turn of the loop
                left_s = waiting.ends_at - now
                left_ms = int((left_s - min(_EDGE_MARGIN_S, left_s / 2)) * 1000)
                waiting.item.deadline_ms = max(1, min(left_ms, _MAX_DEADLINE_MS))
                taken.append(waiting)
                size += len(waiting.item.message)
        return taken

    async def _send_batch(self, stream: _Stream) -> None:
        taken = self._take_batch()
        if not taken:
            return
        batch = _Batch({waiting.item.id for waiting in taken}, asyncio.get_running_loop().time())
        stream.batches.add(batch)
        for waiting in taken:
            stream.outstanding[waiting.item.id] = (waiting.answer, batch)
        try:
            await stream.call.write(keyserver_pb2.SignBatch(items=[waiting.item for waiting in taken]))
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
                for result in answer.results:
                    _deliver(stream, result)
                self._wake.set()
        except grpc.RpcError as failure:
            error = _stream_error(failure)
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
        while self._waiting:
            _, waiting = self._waiting.popitem(last=False)
            if not waiting.answer.done():
                waiting.answer.set_exception(error)


def _deliver(stream: _Stream, result: keyserver_pb2.SignResult) -> None:
    future = stream.settle(result.id)
    if future is None or future.done():
        return
    if result.WhichOneof("result") != "signature":
        future.set_exception(error_from_proto(result.error))
    elif 0 < len(result.signature) <= MAX_SIGNATURE_BYTES:
        future.set_result(bytes(result.signature))
    else:  # no frame of the sign socket could carry it on
        size = len(result.signature)
        future.set_exception(Internal(f"key server gave {size} bytes for a signature: that server is faulty"))


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
