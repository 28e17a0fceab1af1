"""The signer's end of the frames: reads batches and controls from one connection, answers as they are done, closes on a broken rule."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path

from keyreeve_common.errors import ConfigInvalid, Internal, KeyreeveError, MalformedFrame
from keyreeve_common.telemetry import log, log_exception, log_warning

from keyreeve_keyserver import frames
from keyreeve_keyserver.signer.controls import ControlService
from keyreeve_keyserver.signer.service import SigningService

# What one connection may have under way. The front end bounds each class of keys, so that one that hangs does not fill these places; the bounds
# here are for a front end that does not keep to that.
MAX_IN_FLIGHT = 8_192
MAX_ITEMS_IN_FLIGHT = 131_072  # each takes about 4 kB until it is answered, however short it is
MAX_BYTES_IN_FLIGHT = 536_870_912
_READ_BYTES = 1_048_576
_CLOSE_SECONDS = 5
_CREDENTIALS = struct.Struct("3i")


class Server:
    """`allowed_uids` counts for `listen` only: the peer of an inherited descriptor was chosen by who started us."""

    def __init__(self, signing: SigningService, controls: ControlService, *, allowed_uids: frozenset[int]) -> None:
        self._signing = signing
        self._controls = controls
        self._allowed_uids = allowed_uids
        self._connections: set[asyncio.Task[None]] = set()

    async def serve_fd(self, fd: int) -> None:
        """Serves the peer at the other end of this descriptor until it closes. Raises: ConfigInvalid."""
        try:
            connection = socket.socket(fileno=fd)
            if connection.family != socket.AF_UNIX or connection.type != socket.SOCK_STREAM:
                raise ConfigInvalid(f"descriptor {fd} is not a Unix stream socket")
            connection.set_inheritable(False)
        except OSError as error:
            raise ConfigInvalid(f"descriptor {fd} is not a socket: {error.strerror}") from None
        reader, writer = await asyncio.open_connection(sock=connection)
        await _Connection(self._signing, self._controls, reader, writer).run()

    async def listen(self, path: Path, listening: Callable[[], None]) -> None:
        """Serves every connection to the socket file until cancelled; `listening` is called before any is read. Raises: ConfigInvalid."""
        opened = asyncio.Event()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await opened.wait()
            await self._accept(reader, writer)

        server = await asyncio.start_unix_server(accept, sock=_bind(path))
        try:
            listening()
            opened.set()
            # Not serve_forever: from Python 3.12 on its end waits for the peers to go, and a front end does not go by itself.
            await asyncio.get_running_loop().create_future()
        finally:
            server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            _unlink(path)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        uid = _peer_uid(writer)
        if uid not in self._allowed_uids:
            log_warning("peer_refused", uid=uid)
            writer.close()
            return
        log("peer_connected", uid=uid)
        task = asyncio.create_task(_Connection(self._signing, self._controls, reader, writer).run())
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)


class _Connection:
    def __init__(
        self,
        signing: SigningService,
        controls: ControlService,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._signing = signing
        self._controls = controls
        self._reader = reader
        self._writer = writer
        self._splitter = frames.splitter()
        self._frames = self._items = self._bytes = 0  # under way
        self._freed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Ends when the peer closes or breaks a rule; what was begun is answered first."""
        try:
            while data := await self._reader.read(_READ_BYTES):
                for frame in self._splitter.feed(data):
                    await self._begin(frame)
        except MalformedFrame as error:
            log_warning("malformed_frame", detail=error.detail)
            await self._drain()
            self._write(frames.Malformed(error).to_bytes())
        except OSError:
            pass
        finally:
            await self._drain()
            await self._close()

    async def _close(self) -> None:
        """A peer that does not read what it was answered is not waited for long."""
        self._writer.close()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._writer.wait_closed()

    async def _begin(self, frame: bytes) -> None:
        """Begins the work of one frame; waits while too many are under way, which holds the peer back."""
        request = frames.parse_request_frame(frame)
        items = len(request.items) if isinstance(request, frames.SignBatch) else 1
        while self._frames and (
            self._frames >= MAX_IN_FLIGHT
            or self._items + items > MAX_ITEMS_IN_FLIGHT
            or self._bytes + len(frame) > MAX_BYTES_IN_FLIGHT
        ):
            self._freed.clear()
            await self._freed.wait()
        self._frames += 1
        self._items += items
        self._bytes += len(frame)
        work = self._sign(request) if isinstance(request, frames.SignBatch) else self._control(request)
        task = asyncio.create_task(self._guard(work, items, len(frame)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guard(self, work: Coroutine[None, None, None], items: int, size: int) -> None:
        try:
            await work
        except OSError:
            return
        except Exception:
            log_exception("frame_failed")
        finally:
            self._frames -= 1
            self._items -= items
            self._bytes -= size
            self._freed.set()

    async def _sign(self, batch: frames.SignBatch) -> None:
        async for results in self._signing.sign(batch):
            self._write(results.to_bytes())
            await self._writer.drain()

    async def _control(self, control: frames.Control) -> None:
        try:
            answer = frames.ControlOk(control.request_id, await self._controls.run(control)).to_bytes()
        except KeyreeveError as error:
            log_warning("control_refused", op=control.op, error=error.code.value, detail=error.detail)
            answer = frames.ControlRefused(control.request_id, error).to_bytes()
        except Exception:
            log_exception("control_failed", op=control.op)
            answer = frames.ControlRefused(control.request_id, Internal("the signer failed")).to_bytes()
        self._write(answer)
        await self._writer.drain()

    def _write(self, data: bytes) -> None:
        if not self._writer.is_closing():
            self._writer.write(data)

    async def _drain(self) -> None:
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)


def _bind(path: Path) -> socket.socket:
    """Raises: ConfigInvalid."""
    if path.exists() and not path.is_socket():
        raise ConfigInvalid(f"{path} exists and is not a socket")
    _unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(str(path))
        path.chmod(0o660)
    except OSError as error:
        listener.close()
        raise ConfigInvalid(f"{path} cannot be listened on: {error.strerror or error}") from None
    return listener


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _peer_uid(writer: asyncio.StreamWriter) -> int:
    connection = writer.get_extra_info("socket")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(credentials)[1]
    return uid
