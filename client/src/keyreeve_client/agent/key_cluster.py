"""The way to the key cluster: one stream per key server, the last one that worked first, the others when it is unavailable.

A key server that takes requests and answers nothing costs those that it holds, for their time is up; later ones go to the next.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import cast

from keyreeve_common.errors import DeadlineExceeded, KeyreeveError, Unavailable
from keyreeve_common.identity import SpiffeId
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.sign_socket import SignFrame
from keyreeve_common.telemetry import log, log_warning

from keyreeve_client.agent.assignments import Clock, utc_now
from keyreeve_client.channel import ReloadingChannel, SvidFiles
from keyreeve_client.sign_client import SignStreamClient

_SILENCE_SECONDS = 0.25  # shorter deadlines say little about the key server, and any local process may choose them


@dataclass(eq=False)
class KeyServer:
    """One key server, and how it did last."""

    address: str
    channel: ReloadingChannel
    stream: SignStreamClient
    last_success: datetime | None = None
    last_error: KeyreeveError | None = None
    answered_at: float = 0.0  # of the loop's clock


class KeyCluster:
    """Belongs to one event loop."""

    def __init__(
        self, addresses: tuple[str, ...], files: SvidFiles, *, server_id: SpiffeId, clock: Clock = utc_now
    ) -> None:
        self._clock = clock
        self.servers = [self._server(address, files, server_id) for address in addresses]
        self._preferred = 0

    async def sign(self, request: SignFrame) -> bytes:
        """The signature, from the first key server that is there. Scheme and purpose go on as the client sent them.

        Raises: KeyreeveError as the key server said it; Unavailable when none is there; DeadlineExceeded.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + request.deadline_ms / 1000
        error: KeyreeveError = Unavailable("no key server is configured")
        for offset in range(len(self.servers)):
            index = (self._preferred + offset) % len(self.servers)
            server = self.servers[index]
            asked_at = loop.time()
            try:
                signature = await server.stream.sign(
                    request.key_id,
                    cast("SignatureScheme", request.scheme),
                    cast("Purpose", request.purpose),
                    message=request.message,
                    deadline=timedelta(seconds=max(0.001, ends_at - loop.time())),
                )
            except DeadlineExceeded:
                self._note(server, Unavailable("key server did not answer in time"))
                if index == self._preferred and loop.time() - max(asked_at, server.answered_at) >= _SILENCE_SECONDS:
                    self._preferred = (index + 1) % len(self.servers)
                raise
            except Unavailable as failure:
                self._note(server, failure)
                error = failure
                continue
            except KeyreeveError:
                self._note(server, None)
                raise
            self._note(server, None)
            self._preferred = index
            return signature
        raise error

    async def close(self) -> None:
        for server in self.servers:
            await server.stream.close()
            await server.channel.close()

    def _server(self, address: str, files: SvidFiles, server_id: SpiffeId) -> KeyServer:
        channel = ReloadingChannel(address, files, server_id=server_id)
        return KeyServer(address, channel, SignStreamClient(channel.current))

    def _note(self, server: KeyServer, error: KeyreeveError | None) -> None:
        if error is None:
            server.last_success = self._clock()
            server.answered_at = asyncio.get_running_loop().time()
            if server.last_error is not None:
                log("key_server_back", address=server.address)
        elif server.last_error is None:
            log_warning("key_server_lost", address=server.address, code=error.code.value, detail=error.detail)
        server.last_error = error
