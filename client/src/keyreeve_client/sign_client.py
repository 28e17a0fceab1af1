"""The sign client: whole messages with a purpose go to the key cluster, signatures come back.

`SignClient` blocks and makes one call per signature. `SignStreamClient` serves many asyncio callers over one stream with natural batching:
a request that finds the pipe free leaves at once; those that arrive while batches are in flight leave together. There is no timer. Nothing is
sent twice: when the stream breaks, what was in flight fails with Unavailable and the caller decides (a signature may have been made).

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
    KeyreeveError,
    MessageTooLarge,
    RateLimited,
    Unavailable,
)
from keyreeve_common.grpc_edge import error_from_proto, error_from_rpc, error_from_trailers
from keyreeve_common.purposes import MAX_MESSAGE_BYTES, Purpose
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.v1 import keyserver_pb2, keyserver_pb2_grpc
from keyreeve_common.verification import verify_signature

DEFAULT_DEADLINE = timedelta(seconds=5)
MAX_BATCH_ITEMS = 64
MAX_BATCH_BYTES = 1_048_576  # well under gRPC's bound of 4 MiB a message
MAX_BATCHES_IN_FLIGHT = 2
MAX_WAITING = 8_192
_EDGE_MARGIN = timedelta(milliseconds=50)  # lets the server's own deadline answer win over ours


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


@dataclass(slots=True)
class _Waiting:
    item: keyserver_pb2.SignItem
    answer: asyncio.Future[bytes]


@dataclass(slots=True, eq=False)
class _Batch:
    """One batch in flight; done when every item is answered or given up."""

    open_ids: set[int]


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
        _check_message(message)
        if self._closed:
            raise Unavailable("sign client is closed")
        if len(self._waiting) >= MAX_WAITING:
            raise RateLimited("too many requests wait for the key server", retry_after=timedelta(milliseconds=100))
        item = keyserver_pb2.SignItem(
            id=self._new_id(),
            key_id=key_id,
            scheme=scheme,
            purpose=cast("Any", int(purpose)),
            message=message,
            deadline_ms=max(1, int((deadline - _EDGE_MARGIN) / timedelta(milliseconds=1))),
        )
        waiting = _Waiting(item, asyncio.get_running_loop().create_future())
        self._waiting[item.id] = waiting
        self._start_sender()
        try:
            async with asyncio.timeout(deadline.total_seconds()):
                signature = await waiting.answer
        except TimeoutError:
            raise DeadlineExceeded("key server did not answer in time") from None
        finally:
            self._give_up(waiting)
        if public_key is not None:
            verify_signature(public_key, scheme, message, signature=signature)
        return signature

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

    def _give_up(self, waiting: _Waiting) -> None:
        """Whatever became of the item, it holds no slot and no memory any more; an answer that comes later finds nobody."""
        self._waiting.pop(waiting.item.id, None)
        if self._stream is not None and self._stream.settle(waiting.item.id) is not None:
            self._wake.set()

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
                    if len(stream.batches) >= MAX_BATCHES_IN_FLIGHT:
                        break
                    await self._send_batch(stream)
                except KeyreeveError as error:
                    self._fail_waiting(error)
                except grpc.aio.UsageError:
                    self._fail_waiting(Unavailable("channel to the key server was closed"))

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
        self._track(asyncio.create_task(_end_writing(stream.call), name="sign-stream-end"))

    def _take_batch(self) -> list[_Waiting]:
        """The next items in order of arrival, at most MAX_BATCH_ITEMS and about MAX_BATCH_BYTES."""
        taken: list[_Waiting] = []
        size = 0
        while self._waiting and len(taken) < MAX_BATCH_ITEMS and size < MAX_BATCH_BYTES:
            _, waiting = self._waiting.popitem(last=False)
            if not waiting.answer.done():  # else its caller was told to give up in this very turn of the loop
                taken.append(waiting)
                size += len(waiting.item.message)
        return taken

    async def _send_batch(self, stream: _Stream) -> None:
        taken = self._take_batch()
        if not taken:
            return
        batch = _Batch({waiting.item.id for waiting in taken})
        stream.batches.add(batch)
        for waiting in taken:
            stream.outstanding[waiting.item.id] = (waiting.answer, batch)
        try:
            await stream.call.write(keyserver_pb2.SignBatch(items=[waiting.item for waiting in taken]))
        except (grpc.RpcError, asyncio.InvalidStateError):
            # The reader learns the cause and fails what is outstanding; until it has, no new stream must take its place unseen.
            if stream.reader is not None:
                await asyncio.wait((stream.reader,))

    async def _read(self, stream: _Stream) -> None:
        error: KeyreeveError = Unavailable("sign client was closed")
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
    if result.WhichOneof("result") == "signature":
        future.set_result(bytes(result.signature))
    else:
        future.set_exception(error_from_proto(result.error))


async def _end_writing(call: Any) -> None:
    with contextlib.suppress(
        grpc.RpcError, asyncio.InvalidStateError
    ):  # it broke; its reader says so to those who wait
        await call.done_writing()


async def _end_of(call: Any) -> KeyreeveError:
    """Why the server ended the stream."""
    code = await call.code()
    if code is grpc.StatusCode.OK:
        return Unavailable("key server ended the sign stream")
    return _named_error(await call.trailing_metadata(), str(await call.details() or code.name))


def _stream_error(failure: grpc.RpcError) -> KeyreeveError:
    """A refusal by name stays what it is; whatever else breaks a stream is Unavailable, whichever status the transport chose."""
    call = cast("Any", failure)
    return _named_error(call.trailing_metadata(), str(call.details() or "sign stream broke"))


def _named_error(metadata: Any, detail: str) -> KeyreeveError:
    return error_from_trailers(metadata, detail) or Unavailable(f"sign stream to the key server broke: {detail}")
