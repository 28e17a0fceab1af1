"""Several streams to one key server, each over a connection of its own, used as one.

Where several processes of a key server share one port, the kernel gives each connection to one of them: one stream would use one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from keyreeve_common.errors import KeyreeveError

from keyreeve_client.sign_client import Answered, Pending, SignStreamClient


class Stream(Protocol):
    """What the key cluster needs of a way to one key server. Spec: SignStreamClient."""

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
    ) -> Pending: ...

    def abandon(self, error: KeyreeveError) -> None: ...

    async def close(self) -> None: ...

    @property
    def batches_sent(self) -> int: ...

    @property
    def items_sent(self) -> int: ...


class StreamGroup:
    """A request goes over the stream with the least that waits or is in flight."""

    def __init__(self, streams: Sequence[SignStreamClient]) -> None:
        self._streams = streams

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
        """Raises: what SignStreamClient.begin raises."""
        stream = min(self._streams, key=_load)
        return stream.begin(key_id, scheme, purpose, message=message, ends_at=ends_at, answered=answered, trace=trace)

    def abandon(self, error: KeyreeveError) -> None:
        for stream in self._streams:
            stream.abandon(error)

    async def close(self) -> None:
        for stream in self._streams:
            await stream.close()

    @property
    def batches_sent(self) -> int:
        return sum(stream.batches_sent for stream in self._streams)

    @property
    def items_sent(self) -> int:
        return sum(stream.items_sent for stream in self._streams)


def _load(stream: SignStreamClient) -> int:
    return stream.load
