"""What signatures are judged by: following, staleness, and rows that arrive in the wrong order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from time import monotonic

import pytest
from keyreeve_common.errors import KeyNotFound, StorageBusy, Unavailable
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType
from keyreeve_keyserver.catalog.catalog import Catalog
from keyreeve_keyserver.catalog.records import GrantEntry, KeyEntry, NewKey
from keyreeve_keyserver.domain.keys import KeyState
from keyreeve_keyserver.domain.policy import Grant
from keyreeve_keyserver.frontend.access import Access, CatalogThreads
from keyreeve_keyserver.frontend.freshness import FreshnessWatch
from sqlalchemy import URL, text

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOLDER = "spiffe://example.org/agent/a"
SERVER = frozenset({Purpose.TLS13_SERVER_VERIFY})


@pytest.fixture
async def threads(tmp_path: Path) -> AsyncIterator[CatalogThreads]:
    url = URL.create("sqlite", database=str(tmp_path / "catalog.sqlite3"))
    threads = CatalogThreads(Catalog.open(url, busy_timeout=timedelta(milliseconds=200)))
    yield threads
    threads.close()


def make_key(catalog: Catalog) -> KeyEntry:
    new = NewKey("r", KeyType.EC_P256, KeyRole.HANDSHAKE, SERVER, "", "")
    entry = catalog.begin_key(new, now=NOW)
    done = catalog.complete_key(entry.key_id, backend="b", sealed_record=b"s", spki_der=b"p", attributes={})
    assert done is not None
    return done


def grant(key_id: KeyId) -> Grant:
    return Grant(key_id, HOLDER, SERVER, NOW)


def allowed(access: Access, key_id: str) -> bool:
    try:
        access.authorize(HOLDER, key_id, Purpose.TLS13_SERVER_VERIFY, NOW)
    except KeyNotFound:
        return False
    return True


async def test_other_processes_writes_are_followed(threads: CatalogThreads) -> None:
    access = Access(threads, max_staleness=timedelta(seconds=60))
    await access.refresh()
    key = make_key(threads.catalog)
    threads.catalog.put_grant(grant(key.key_id))
    assert not allowed(access, key.key_id)
    await access.refresh()
    assert allowed(access, key.key_id)
    threads.catalog.revoke_grant(key.key_id, HOLDER, now=NOW)
    await access.refresh()
    assert not allowed(access, key.key_id)


async def test_an_older_row_does_not_undo_a_newer_one(threads: CatalogThreads) -> None:
    access = Access(threads, max_staleness=timedelta(seconds=60))
    key = make_key(threads.catalog)
    made = threads.catalog.put_grant(grant(key.key_id))
    revoked = threads.catalog.revoke_grant(key.key_id, HOLDER, now=NOW)
    access.apply_key(key)
    access.apply_grant(revoked)
    access.apply_grant(made)
    assert not allowed(access, key.key_id)


async def test_disabling_elsewhere_is_told_once(threads: CatalogThreads) -> None:
    access = Access(threads, max_staleness=timedelta(seconds=60))
    told: list[KeyId] = []
    access.on_disabled = told.append
    key = make_key(threads.catalog)
    await access.refresh()
    threads.catalog.change_state(key.key_id, to=KeyState.DISABLED, from_states=(KeyState.ENABLED,))
    await access.refresh()
    await access.refresh()
    assert told == [key.key_id]


async def test_a_catalog_restored_from_a_backup_is_read_anew(threads: CatalogThreads) -> None:
    access = Access(threads, max_staleness=timedelta(seconds=60))
    key = make_key(threads.catalog)
    threads.catalog.put_grant(grant(key.key_id))
    await access.refresh()
    engine = threads.catalog._engine
    with engine.begin() as connection:  # a backup from before the grant
        connection.execute(text("DELETE FROM keyreeve_grants"))
        connection.execute(text("UPDATE keyreeve_changes SET counter = 1"))
    await access.refresh()
    assert not allowed(access, key.key_id)


def lose_last_writes(catalog: Catalog, count: int) -> None:
    """A standby took over that had not heard of them."""
    with catalog._engine.begin() as connection:
        connection.execute(text("UPDATE keyreeve_changes SET counter = counter - :count"), {"count": count})


async def fail_to_read(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_: int) -> None:
        raise Unavailable("the database cannot be reached")

    with monkeypatch.context() as patched:
        patched.setattr(access._threads.catalog, "changes_since", away)
        with pytest.raises(Unavailable):
            await access.refresh()


async def test_revocation_that_takes_the_number_of_a_write_lost_in_a_failover_is_seen(
    threads: CatalogThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = Access(threads, max_staleness=timedelta(seconds=60))
    catalog, key = threads.catalog, make_key(threads.catalog)
    told: list[KeyId] = []
    access.on_disabled = told.append
    catalog.put_grant(grant(key.key_id))
    for number in range(3):
        catalog.put_grant(replace(grant(key.key_id), holder=f"{HOLDER}-{number}"))
    await access.refresh()
    lose_last_writes(catalog, 3)
    await fail_to_read(access, monkeypatch)
    before = access.generation
    catalog.revoke_grant(key.key_id, HOLDER, now=NOW)
    for number in range(5):  # so the counter does not give it away
        catalog.put_grant(replace(grant(key.key_id), holder=f"{HOLDER}-x{number}"))
    await access.refresh()
    assert not allowed(access, key.key_id)
    assert access.generation > before
    assert told == []
    assert not access.may_have_had(HOLDER, "k-foreign")  # nothing says that it was restored


async def test_key_disabled_while_the_database_was_away_is_forgotten(
    threads: CatalogThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = Access(threads, max_staleness=timedelta(seconds=60))
    told: list[KeyId] = []
    access.on_disabled = told.append
    key = make_key(threads.catalog)
    await access.refresh()
    await fail_to_read(access, monkeypatch)
    threads.catalog.change_state(key.key_id, to=KeyState.DISABLED, from_states=(KeyState.ENABLED,))
    await access.refresh()
    assert told == [key.key_id]


async def test_own_revocation_during_a_whole_read_stays(
    threads: CatalogThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = Access(threads, max_staleness=timedelta(seconds=60))
    key = make_key(threads.catalog)
    threads.catalog.put_grant(grant(key.key_id))
    await access.refresh()
    await fail_to_read(access, monkeypatch)
    read, has_read, may_end = threads.catalog.changes_since, Event(), Event()

    def slow(seq: int) -> object:
        found = read(seq)
        has_read.set()
        may_end.wait(10)
        return found

    monkeypatch.setattr(threads.catalog, "changes_since", slow)
    reading = asyncio.create_task(access.refresh())
    await asyncio.to_thread(has_read.wait, 10)
    access.apply_grant(threads.catalog.revoke_grant(key.key_id, HOLDER, now=NOW))
    may_end.set()
    await reading
    assert not allowed(access, key.key_id)


async def test_two_reads_at_once_are_no_restored_catalog(
    threads: CatalogThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rotation reads beside the following; whose read began first may end last, and knows less."""
    access = Access(threads, max_staleness=timedelta(seconds=60))
    key = make_key(threads.catalog)
    threads.catalog.put_grant(grant(key.key_id))
    await access.refresh()
    read, may_end, began = threads.catalog.changes_since, Event(), Event()

    def slow_once(seq: int) -> object:
        found = read(seq)
        if not began.is_set():
            began.set()
            may_end.wait(10)
        return found

    monkeypatch.setattr(threads.catalog, "changes_since", slow_once)
    threads.catalog.put_grant(grant(key.key_id))
    first = asyncio.create_task(access.refresh())
    await asyncio.to_thread(began.wait, 10)
    threads.catalog.put_grant(grant(key.key_id))
    second = asyncio.create_task(access.refresh())
    await asyncio.wait([second], timeout=0.2)  # it may wait for the first
    may_end.set()
    await asyncio.gather(first, second)
    assert not access.may_have_had(HOLDER, "k-foreign")  # probing for keys still counts
    assert allowed(access, key.key_id)


async def test_without_fresh_reads_nothing_is_authorised(threads: CatalogThreads) -> None:
    access = Access(threads, max_staleness=timedelta(0))
    await access.refresh()
    with pytest.raises(Unavailable, match="revocations may be missed"):
        access.require_fresh()
    fresh = Access(threads, max_staleness=timedelta(seconds=60))
    with pytest.raises(Unavailable):
        fresh.require_fresh()  # never read at all
    await fresh.refresh()
    fresh.require_fresh()


async def test_failing_reads_are_said(threads: CatalogThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(_: int) -> None:
        raise StorageBusy("locked")

    access = Access(threads, max_staleness=timedelta(seconds=60))
    monkeypatch.setattr(threads.catalog, "changes_since", busy)
    with pytest.raises(StorageBusy):
        await access.refresh()


async def test_a_row_that_cannot_be_read_does_not_end_the_following(
    threads: CatalogThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = Access(threads, max_staleness=timedelta(seconds=60))
    read, calls = threads.catalog.changes_since, 0

    def once_odd(seq: int) -> object:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ValueError("'quantum' is not a valid KeyRole")
        return read(seq)

    monkeypatch.setattr(threads.catalog, "changes_since", once_odd)
    following = asyncio.create_task(access.follow(timedelta(milliseconds=1)))
    async with asyncio.timeout(5):
        while calls < 3:
            await asyncio.sleep(0.001)
    assert not following.done()
    following.cancel()


def test_entries_are_values() -> None:
    entry = GrantEntry(grant(KeyId("k-1")), 3)
    assert entry == GrantEntry(grant(KeyId("k-1")), 3)


async def test_who_is_woken_looks_at_once(threads: CatalogThreads) -> None:
    access = Access(threads, max_staleness=timedelta(seconds=60))
    await access.refresh()
    following = asyncio.create_task(access.follow(timedelta(hours=1)))
    key = make_key(threads.catalog)
    threads.catalog.put_grant(grant(key.key_id))
    access.wake()
    async with asyncio.timeout(10):
        while not allowed(access, key.key_id):
            await asyncio.sleep(0.001)
    following.cancel()


async def test_generation_changes_with_what_was_known(threads: CatalogThreads) -> None:
    access = Access(threads, max_staleness=timedelta(seconds=60))
    key = make_key(threads.catalog)
    made = threads.catalog.put_grant(grant(key.key_id))
    access.apply_key(key)
    access.apply_grant(made)
    access.apply_grant(made)
    assert access.generation == 0
    access.apply_grant(threads.catalog.revoke_grant(key.key_id, HOLDER, now=NOW))
    assert access.generation == 1
    disabled = threads.catalog.change_state(key.key_id, to=KeyState.DISABLED, from_states=(KeyState.ENABLED,))
    assert disabled is not None
    access.apply_key(disabled)
    assert access.generation == 2


async def test_each_turn_of_freshness_is_said_once(threads: CatalogThreads, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    access = Access(threads, max_staleness=timedelta(seconds=10))
    watch = FreshnessWatch(access)
    await access.refresh()
    for age_s in (0, 1, 3, 4, 11, 12, 0, 0, 11, 0):
        access._read_at = monotonic() - age_s
        watch.look()
    assert [record.message for record in caplog.records] == [
        "serving_from_cache",
        "refusing_without_catalog",
        "catalog_current_again",
        "refusing_without_catalog",
        "catalog_current_again",
    ]
    assert caplog.records[2].__dict__["keyreeve_fields"]["away_s"] == 12
