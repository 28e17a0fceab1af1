"""Hearing of writes by LISTEN on a real PostgreSQL: after each commit, after each connect, and across a broken connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from keyreeve_common.errors import NotFound
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import Purpose
from keyreeve_keyserver.catalog.catalog import Catalog
from keyreeve_keyserver.catalog.listen import APPLICATION, ChangeListener
from keyreeve_keyserver.domain.policy import Grant
from keyreeve_testing.postgres import PostgresServer, postgres_is_installed, running_postgres
from sqlalchemy import make_url, text

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(not postgres_is_installed(), reason="PostgreSQL is not installed"),
]
NOW = datetime(2026, 1, 1, tzinfo=UTC)
GRANT = Grant(KeyId("k-1"), "spiffe://example.org/agent/a", frozenset({Purpose.TLS13_SERVER_VERIFY}), NOW)
KILL = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = :name")


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with running_postgres() as server:
        yield server


class Rig:
    def __init__(self, url: str) -> None:
        self.catalog = Catalog.open(make_url(url), busy_timeout=timedelta(seconds=5))
        self.heard = 0
        self._changed = asyncio.Event()
        self.listener = ChangeListener(self.catalog.url, self._hear)

    def _hear(self) -> None:
        self.heard += 1
        self._changed.set()

    async def wait_heard(self, count: int) -> None:
        async with asyncio.timeout(20):
            while self.heard < count:
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
async def rig(postgres: PostgresServer) -> AsyncIterator[Rig]:
    rig = Rig(postgres.make_database())
    running = asyncio.create_task(rig.listener.run())
    await rig.wait_heard(1)
    yield rig
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    rig.catalog.close()


async def test_each_write_is_heard_and_a_failed_one_is_not(rig: Rig) -> None:
    assert rig.listener.listening
    with pytest.raises(NotFound):
        await asyncio.to_thread(rig.catalog.revoke_grant, GRANT.key_id, GRANT.holder, now=NOW)
    for expected in (2, 3):  # had the failed one been heard, the second wait would end early and the count be 4
        await asyncio.to_thread(rig.catalog.put_grant, GRANT)
        await rig.wait_heard(expected)
    assert rig.heard == 3


async def test_broken_connection_is_made_again_and_looks_for_what_was_missed(rig: Rig) -> None:
    for expected in (2, 3):
        with rig.catalog._engine.begin() as connection:
            assert connection.execute(KILL, {"name": APPLICATION}).all() == [(True,)]
        await rig.wait_heard(expected)
    assert rig.listener.listening


async def test_away_for_a_while(rig: Rig, postgres: PostgresServer) -> None:
    await asyncio.to_thread(postgres.stop)
    async with asyncio.timeout(20):
        while rig.listener.listening:
            await asyncio.sleep(0.01)
    heard = rig.heard
    await asyncio.to_thread(postgres.start)
    await rig.wait_heard(heard + 1)
    await asyncio.to_thread(rig.catalog.put_grant, GRANT)
    await rig.wait_heard(heard + 2)
