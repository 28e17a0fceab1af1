"""Hearing of other processes' writes to a PostgreSQL catalog at once, by LISTEN. What is heard says only: look at the change counter.

Always true: nothing depends on it. A notification that is lost, or a connection that is away, costs the time until the next poll; so does a
pooler between us and PostgreSQL that does not carry LISTEN, and a replica of a release that does not NOTIFY.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from keyreeve_common.telemetry import log, log_exception, log_warning
from sqlalchemy import URL

from keyreeve_keyserver.catalog.database import TCP_BOUNDS

if TYPE_CHECKING:
    from psycopg import AsyncConnection

CHANNEL = "keyreeve_changes"
APPLICATION = "keyreeve-listen"  # how pg_stat_activity shows the connection
_CONNECT_S = 5
_HEARTBEAT_S = 5.0
_PAUSES_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class ChangeListener:
    """`run` keeps one connection for ever; `on_change` is called on the event loop for each notification and after each connect."""

    def __init__(self, url: URL, on_change: Callable[[], None]) -> None:
        self._url = url
        self._on_change = on_change
        self.listening = False

    async def run(self) -> None:
        import psycopg  # noqa: PLC0415 - the extra `postgres`, which a catalog in SQLite does without

        failures = 0
        while True:
            try:
                async with await self._connect() as connection:
                    failures = 0
                    await self._listen(connection)
            except (psycopg.Error, OSError, TimeoutError) as error:
                if self.listening or not failures:
                    log_warning(
                        "catalog_not_listening",
                        kind=type(error).__name__,
                        detail="changes of other replicas are found by polling until the connection is back",
                    )
            except Exception:
                log_exception("catalog_listener_failed")
            finally:
                self.listening = False
            await asyncio.sleep(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
            failures += 1

    async def _connect(self) -> AsyncConnection[Any]:
        from psycopg import AsyncConnection  # noqa: PLC0415 - as above

        _, options = self._url.get_dialect()().create_connect_args(self._url)
        own: dict[str, Any] = {"application_name": APPLICATION, "connect_timeout": _CONNECT_S, "autocommit": True}
        return await AsyncConnection.connect(**{**options, **TCP_BOUNDS, **own})

    async def _listen(self, connection: AsyncConnection[Any]) -> None:
        async with asyncio.timeout(_CONNECT_S):
            await connection.execute(f"LISTEN {CHANNEL}")
        self.listening = True
        log("catalog_listening")
        self._on_change()  # what was written while nobody listened
        while True:
            async for _ in connection.notifies(timeout=_HEARTBEAT_S):
                self._on_change()
            async with asyncio.timeout(_HEARTBEAT_S):  # a server that is gone without a word is found out here
                await connection.execute("SELECT 1")
