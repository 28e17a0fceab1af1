"""What a sync asks of the database, counted: an agent to which nothing happened costs the same with one entry and with many."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from keyreeve_ca.assignment_service import sync_agent
from keyreeve_ca.domain.entries import Selector
from keyreeve_ca.entry_service import create_entry
from keyreeve_ca.grpc_api.feed import ChangeFeed
from keyreeve_common.errors import Unavailable
from keyreeve_common.identity import SpiffeId, TrustDomain
from sqlalchemy import event

TD = TrustDomain("example.org")
N1, N2, N3 = (SpiffeId(TD, f"/keyreeve/agent/{name}") for name in ("n1", "n2", "n3"))
LONG = timedelta(seconds=20)


@contextmanager
def counted(rig: Any) -> Iterator[list[str]]:
    seen: list[str] = []

    def note(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith("BEGIN"):
            seen.append(statement)

    event.listen(rig.store.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(rig.store.engine, "before_cursor_execute", note)


def fill(rig: Any, agent: str, count: int, prefix: str) -> None:
    for number in range(count):
        create_entry(rig.ca, rig.entry(f"/{prefix}/{number}", agent, selectors=(Selector("unix", f"uid:{number}"),)))


def test_settled_sync_takes_as_many_statements_for_many_entries(rig: Any) -> None:
    fill(rig, "n1", 1, "a")
    fill(rig, "n2", 40, "b")
    counts = []
    for agent, size in ((N1, 1), (N2, 40)):
        assert [each.is_ready for each in sync_agent(rig.ca, agent)] == [True] * size
        with counted(rig) as statements:
            assert len(sync_agent(rig.ca, agent)) == size
        counts.append(len(statements))
    assert counts[0] == counts[1] <= 6


def test_sync_while_the_key_cluster_is_away_takes_as_many_statements_for_many_entries(rig: Any) -> None:
    fill(rig, "n1", 1, "a")
    fill(rig, "n2", 40, "b")
    counts = []
    for agent in (N1, N2):
        rig.cluster.failure = None
        sync_agent(rig.ca, agent)
        rig.cluster.failure = Unavailable("away")
        with counted(rig) as statements:
            assert all(each.is_ready for each in sync_agent(rig.ca, agent))
        counts.append(len(statements))
    assert counts[0] == counts[1] <= 6


def test_renewal_of_many_svids_is_one_batch(rig: Any) -> None:
    """Grants are another matter: each is extended by itself."""
    fill(rig, "n1", 1, "a")
    fill(rig, "n2", 40, "b")
    counts = []
    for agent in (N1, N2):
        before = {each.svid.serial for each in sync_agent(rig.ca, agent) if each.svid}
        rig.clock.advance(timedelta(minutes=40))
        with counted(rig) as statements:
            after = {each.svid.serial for each in sync_agent(rig.ca, agent) if each.svid}
        assert not before & after
        counts.append(sum(" svids" in each for each in statements))
    assert counts[0] == counts[1]


def test_locks_are_forgotten(rig: Any) -> None:
    fill(rig, "n1", 5, "a")
    sync_agent(rig.ca, N1)
    assert len(rig.ca.locks) == 0


def test_stream_wakes_for_its_own_changes_and_for_everyones(rig: Any) -> None:
    async def scenario() -> None:
        feed = ChangeFeed(rig.store)
        await feed.start()
        with feed.watch(N1) as mine, feed.watch(N3) as other:
            follower = asyncio.create_task(feed.follow(timedelta(minutes=10)))
            try:
                create_entry(rig.ca, rig.entry("/x", "n1"))
                feed.nudge()
                await mine.wait(at_most=LONG)
                assert mine.changed
                assert not other.changed
                mine.begin_look()
                feed.wake_everyone()
                assert mine.changed
                assert other.changed
            finally:
                follower.cancel()
                await asyncio.gather(follower, return_exceptions=True)
        assert not feed.watched

    asyncio.run(scenario())
