"""The way to the signer: one stream socket, many batches and control operations in flight on it.

Whoever waits is answered, always: by the signer, by its deadline, or with `unavailable` when the connection goes. Runs on the event loop.
Spec: docs/protocol/signer-frames.md.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from keyreeve_common.errors import DeadlineExceeded, KeyreeveError, MalformedFrame, Overloaded, Unavailable
from keyreeve_common.sign_batch import ids_of
from keyreeve_common.telemetry import log, log_error, log_warning

from keyreeve_keyserver import frames
from keyreeve_keyserver.frames import (
    Control,
    PackedItems,
    PackedResults,
    Refused,
    SignBatch,
    SignItem,
    SignResult,
)

RETRY_AFTER = timedelta(milliseconds=250)
_ITEM_OVERHEAD = 96
_MAX_BATCH_BYTES = frames.MAX_FRAME_BYTES - 4096
_RECONNECT_S = (0.05, 0.1, 0.2, 0.5, 1.0)
_CAPABILITIES_TIMEOUT_S = 60.0
_SLACK_S = 0.1
OnResults = Callable[[Sequence[SignResult]], None]


@dataclass(slots=True)
class _PendingBatch:
    waiting: set[int]
    size: int
    on_results: OnResults
    timer: asyncio.TimerHandle


@dataclass(slots=True)
class _Connection(asyncio.Protocol):
    link: SignerLink
    splitter: Any = field(default_factory=frames.splitter)
    transport: asyncio.Transport | None = None
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # asyncio's promise for streams; uvloop's transport has no base class
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self.splitter.feed(data):
                self.link._answered(frames.parse_answer_frame(frame))
        except MalformedFrame as error:
            log_error("signer_frame_malformed", detail=error.detail)
            if self.transport is not None:
                self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()
        self.link._lost(self)


class SignerLink:
    """`serve_descriptor` or `serve_path` keeps the connection; `submit` and `control` use it; `ready` is set while a signer serves."""

    def __init__(self, *, bytes_in_flight: int) -> None:
        self._limit = bytes_in_flight
        self._in_flight = 0
        self._numbers = itertools.count(1)
        self._batches: dict[int, _PendingBatch] = {}
        self._controls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._connection: _Connection | None = None
        self._capabilities: dict[str, Any] | None = None
        self.ready = asyncio.Event()
        self.on_spans: Callable[[Sequence[frames.Span]], None] = lambda _: None

    @property
    def requests_in_flight(self) -> int:
        return sum(len(batch.waiting) for batch in list(self._batches.values()))

    @property
    def capabilities(self) -> dict[str, Any]:
        """What the signer said when it was connected. Raises: Unavailable."""
        if self._capabilities is None:
            raise _not_connected()
        return self._capabilities

    async def serve_descriptor(self, descriptor: int) -> None:
        """Serves the inherited end of a socketpair until the signer is gone."""
        peer = socket.socket(fileno=descriptor)
        peer.setblocking(False)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_unix_connection(lambda: _Connection(self), sock=peer)
        await self._use(connection)

    async def serve_path(self, path: Path) -> None:
        """Connects to the signer's own socket, again and again."""
        loop = asyncio.get_running_loop()
        pauses: Iterator[float] = iter(())
        while True:
            try:
                _, connection = await loop.create_unix_connection(lambda: _Connection(self), str(path))
            except OSError as error:
                pause = next(pauses, None)
                if pause is None:
                    log_warning("signer_not_reachable", socket=str(path), detail=_advice(error))
                    pauses = iter(_RECONNECT_S)
                await asyncio.sleep(pause if pause is not None else _RECONNECT_S[-1])
                continue
            pauses = iter(())
            served = await self._use(connection)
            await asyncio.sleep(_RECONNECT_S[0] if served else _RECONNECT_S[-1])

    async def _use(self, connection: _Connection) -> bool:
        """Until the connection ends; whether the signer served it at all."""
        self._connection = connection
        served = False
        try:
            self._capabilities = await self.control("capabilities", timeout=_CAPABILITIES_TIMEOUT_S)
            log("signer_connected", backends=_names(self._capabilities))
            self.ready.set()
            served = True
            await connection.closed.wait()
        except KeyreeveError as error:
            log_warning("signer_not_ready", detail=error.detail)
        finally:
            if connection.transport is not None:
                connection.transport.abort()
            self._lost(connection)
        return served

    def close(self) -> None:
        if self._connection is not None and self._connection.transport is not None:
            self._connection.transport.close()

    async def control(self, operation: str, *, timeout: float, **arguments: Any) -> dict[str, Any]:  # noqa: ASYNC109
        """One control operation. Raises: Unavailable, DeadlineExceeded, and whatever the signer refuses with."""
        number = self._next_number()
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._controls[number] = answer
        try:
            self._write(Control(number, operation, arguments).to_bytes())
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError:
            raise DeadlineExceeded(f"the signer did not answer {operation} within {timeout:g} s") from None
        finally:
            self._controls.pop(number, None)

    def submit(self, caller: str, items: Sequence[SignItem], on_results: OnResults, *, timeout_s: float) -> None:
        """Sends the items; every item's result reaches `on_results` exactly once, in any order, in one call or several."""
        for part in _parts(items):
            self._submit_part(caller, part, on_results, timeout_s)

    def _submit_part(self, caller: str, items: Sequence[SignItem], on_results: OnResults, timeout_s: float) -> None:
        size = len(items.data) if isinstance(items, PackedItems) else sum([len(item.message) for item in items])
        if self._connection is None or self._in_flight + size > self._limit:
            error = _not_connected() if self._connection is None else _overloaded()
            on_results([Refused(item.id, error) for item in items])
            return
        number = self._next_number()
        loop = asyncio.get_running_loop()
        timer = loop.call_later(timeout_s + _SLACK_S, self._timed_out, number)
        self._batches[number] = _PendingBatch(set(ids_of(items)), size, on_results, timer)
        self._in_flight += size
        self._write(SignBatch(number, caller, items).to_bytes())

    def _next_number(self) -> int:
        return next(self._numbers) & 0xFFFFFFFF

    def _write(self, data: bytes) -> None:
        if self._connection is None or self._connection.transport is None:
            raise _not_connected()
        self._connection.transport.write(data)

    def _answered(self, answer: frames.AnswerFrame) -> None:
        match answer:
            case frames.SignResults(batch_id, results):
                self._results(batch_id, results)
            case frames.Spans(spans):
                self.on_spans(spans)
            case frames.ControlOk(request_id, value):
                self._settle(request_id, value=value)
            case frames.ControlRefused(request_id, error):
                self._settle(request_id, error=error)
            case frames.Malformed(error):
                raise MalformedFrame(f"the signer found our frame malformed: {error.detail}")

    def _results(self, number: int, results: Sequence[SignResult]) -> None:
        batch = self._batches.get(number)
        if batch is None:
            return
        wanted = results
        if not (isinstance(results, PackedResults) and batch.waiting.issuperset(results.ids)):
            wanted = [result for result in results if result.id in batch.waiting]
        batch.waiting.difference_update(ids_of(wanted))
        if not batch.waiting:
            self._finish(number)
        if wanted:
            batch.on_results(wanted)

    def _finish(self, number: int) -> None:
        batch = self._batches.pop(number)
        batch.timer.cancel()
        self._in_flight -= batch.size

    def _fail(self, number: int, error: KeyreeveError) -> None:
        batch = self._batches[number]
        self._finish(number)
        batch.on_results([Refused(item_id, error) for item_id in batch.waiting])

    def _timed_out(self, number: int) -> None:
        self._fail(number, DeadlineExceeded("the signer did not answer in time", retry_after=RETRY_AFTER))

    def _settle(self, number: int, *, value: dict[str, Any] | None = None, error: KeyreeveError | None = None) -> None:
        waiting = self._controls.pop(number, None)
        if waiting is None or waiting.done():
            return
        if error is not None:
            waiting.set_exception(error)
        else:
            waiting.set_result(value or {})

    def _lost(self, connection: _Connection) -> None:
        if self._connection is not connection:
            return
        self._connection = None
        self._capabilities = None
        self.ready.clear()
        log_warning("signer_lost", batches=len(self._batches), controls=len(self._controls))
        for number in list(self._batches):
            self._fail(number, Unavailable("the signer ended; it is being started anew", retry_after=RETRY_AFTER))
        for number in list(self._controls):
            self._settle(number, error=_not_connected())


def _parts(items: Sequence[SignItem]) -> Iterator[Sequence[SignItem]]:
    """`items` in pieces that each fit in one frame."""
    if len(items) <= frames.MAX_ITEMS // 4:  # 64 messages of 64 KiB and their heads fit always
        yield items
        return
    start = size = 0
    for index, item in enumerate(items):
        cost = len(item.message) + _ITEM_OVERHEAD
        if size + cost > _MAX_BATCH_BYTES:
            yield items[start:index]
            start, size = index, 0
        size += cost
    yield items[start:]


def _not_connected() -> Unavailable:
    return Unavailable("the signer is not connected; see the signer's log on the key host", retry_after=RETRY_AFTER)


def _overloaded() -> Overloaded:
    return Overloaded("too many messages are in flight here; retry, or use another replica", retry_after=RETRY_AFTER)


def _advice(error: OSError) -> str:
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        return "no signer listens there; start the signer unit, or correct signer_socket"
    if isinstance(error, PermissionError):
        return "no permission; add this service's user to the signer socket's group"
    return error.strerror or type(error).__name__


def _names(capabilities: dict[str, Any]) -> str:
    return ",".join(str(backend.get("name")) for backend in capabilities.get("backends", []))
