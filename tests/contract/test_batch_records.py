"""The contract of what the store does many of at once, over SQLite and PostgreSQL. Statements are counted, never timed.

So an N+1 cannot come back: where a count grows with the number of entries, these tests fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from keyreeve_ca.domain.authority import Authority, AuthorityState
from keyreeve_ca.domain.entries import Entry, KeyScope, Selector
from keyreeve_ca.domain.grants import GrantState, NodeGrant
from keyreeve_ca.domain.records import (
    Agent,
    Changes,
    KeyUse,
    ManagedKey,
    SvidRecord,
    SvidState,
    digest_of,
    renewal_time,
)
from keyreeve_ca.domain.views import SvidWish
from keyreeve_ca.store.change_log import KEPT_STEPS, MAX_NAMED
from keyreeve_ca.store.sql_store import SqlStore
from keyreeve_common.errors import Conflict, NotFound
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_testing.pki import TestPki
from keyreeve_testing.postgres import PostgresServer, postgres_is_installed, running_postgres
from sqlalchemy import event, update

TD = TrustDomain("example.org")
NOW = datetime(2026, 6, 1, 12, 0, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
N1, N2 = (SpiffeId(TD, f"/keyreeve/agent/{name}") for name in ("n1", "n2"))


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    if not postgres_is_installed():
        pytest.skip("PostgreSQL is not installed")
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlStore]:
    url = f"sqlite:///{tmp_path / 'ca.sqlite3'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").make_database()
    made = SqlStore.open(url)
    made.migrate()
    yield made
    made.close()


@contextmanager
def counted(store: SqlStore) -> Iterator[list[str]]:
    """The statements that leave for the database meanwhile. One that is executed for many rows leaves once."""
    seen: list[str] = []

    def note(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(store.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(store.engine, "before_cursor_execute", note)


def entry(number: int, agent: SpiffeId = N1, **changes: Any) -> Entry:
    fields: dict[str, Any] = {
        "entry_id": f"e{number}-{agent.path[-2:]}",
        "spiffe_id": SpiffeId(TD, f"/w/{number}"),
        "parent_id": agent,
        "selectors": (Selector("unix", f"uid:{number + 1}"),),
        "created_at": NOW,
        **changes,
    }
    return Entry(**fields)


def intent(serial: str, subject: str = "s", **changes: Any) -> SvidRecord:
    fields: dict[str, Any] = {
        "serial": serial,
        "spiffe_id": SpiffeId(TD, "/w"),
        "subject": subject,
        "authority_id": "a",
        "state": SvidState.INTENDED,
        "not_before": NOW,
        "not_after": NOW + HOUR,
        "created_at": NOW,
        **changes,
    }
    return SvidRecord(**fields)


def issued(record: SvidRecord) -> SvidRecord:
    return replace(record, state=SvidState.ISSUED, chain_der=(b"leaf" + record.serial.encode(), b"ca"), current=True)


def key_of(each: Entry) -> ManagedKey:
    return ManagedKey(each.owner, 1, f"key-{each.owner.digest[:8]}", b"spki", "f")


def serve(store: SqlStore, entries: list[Entry]) -> None:
    """Entries with key, current SVID and grant, as after a sync."""
    records = []
    for each in entries:
        store.create_entry(each)
        key = key_of(each)
        store.save_managed_key(key)
        store.save_node_grant(NodeGrant(each.owner, each.parent_id, key.key_id, GrantState.LIVE, NOW + HOUR))
        records.append(intent(digest_of(each.entry_id)[:32], each.owner.digest, key_id=key.key_id))
    store.record_intents(records)
    store.record_results([issued(each) for each in records], {})


def save_agent(store: SqlStore, agent: SpiffeId) -> None:
    store.save_agent(Agent(agent, "join_token", ("1",), NOW + HOUR, NOW, NOW))


def test_intents_of_a_batch_are_on_record_in_order(store: SqlStore) -> None:
    store.record_intent(intent("1"))
    store.record_intents([intent(serial, subject=f"s{serial}") for serial in ("2", "3", "4")])
    assert [each.serial for each in store.list_svids()] == ["4", "3", "2", "1"]
    assert {each.state for each in store.list_svids()} == {SvidState.INTENDED}


@pytest.mark.parametrize("serials", [("2", "1", "3"), ("2", "2")])
def test_serial_that_was_used_refuses_the_batch_whole(store: SqlStore, serials: tuple[str, ...]) -> None:
    store.record_intent(intent("1"))
    with pytest.raises(Conflict):
        store.record_intents([intent(each) for each in serials])
    assert [each.serial for each in store.list_svids()] == ["1"]
    store.record_intents([intent("5")])  # and no number is lost or used twice
    assert [each.serial for each in store.list_svids()] == ["5", "1"]


def test_results_of_a_batch(store: SqlStore) -> None:
    before, good, bad = intent("1"), intent("2"), intent("3", subject="t")
    store.record_intents([before])
    store.record_results([issued(before)], {})
    store.record_intents([good, bad])
    store.record_results([issued(good)], {"3": "unavailable: away"})
    assert store.current_svid("s") == issued(good)
    assert store.current_svid("t") is None
    by_serial = {each.serial: each for each in store.list_svids()}
    assert (by_serial["1"].state, by_serial["1"].current) == (SvidState.ISSUED, False)
    assert (by_serial["3"].state, by_serial["3"].failure) == (SvidState.FAILED, "unavailable: away")


def test_of_two_results_for_one_subject_the_later_is_current(store: SqlStore) -> None:
    first, second = intent("1"), intent("2")
    store.record_intents([first, second])
    store.record_results([issued(first), issued(second)], {})
    assert [each.serial for each in store.list_svids(current_only=True)] == ["2"]
    assert {each.state for each in store.list_svids()} == {SvidState.ISSUED}


def test_result_without_intent_changes_nothing(store: SqlStore) -> None:
    before, after = intent("1"), intent("2")
    store.record_intents([before, after])
    store.record_results([issued(before)], {})
    with pytest.raises(NotFound):
        store.record_results([issued(after), issued(intent("9"))], {})
    current = store.current_svid("s")
    assert current is not None
    assert current.serial == "1"


def test_batches_take_as_many_statements_for_many_as_for_one(store: SqlStore) -> None:
    store.record_intent(intent("f" * 30))  # the first one of all also makes the counter
    counts = []
    for start, size in ((0, 1), (100, 100)):
        records = [intent(f"{number:x}", subject=f"s{number}") for number in range(start, start + size)]
        with counted(store) as statements:
            store.record_intents(records)
            store.record_results([issued(each) for each in records[1:] or records], {records[0].serial: "x"})
        counts.append(len(statements))
    assert counts[0] == counts[1]


def test_view_of_an_agent(store: SqlStore) -> None:
    mine, gone, other = entry(1, dns_names=("a.test",)), entry(2, expires_at=NOW + HOUR), entry(1, N2)
    serve(store, [mine, gone])
    serve(store, [replace(other, dns_names=("b.test", "a.test"), x509_svid_ttl=timedelta(minutes=5))])
    view = store.read_agent_view(N1, NOW + HOUR)
    assert view.entries == (mine,)
    digest = mine.owner.digest
    assert set(view.grants) == {digest}
    assert (view.grants[digest].agent, view.grants[digest].owner) == (N1, mine.owner)
    assert view.owners.keys[digest] == key_of(mine)
    assert view.owners.svids[digest] == store.current_svid(digest)
    assert view.owners.wishes[digest] == SvidWish(("a.test", "b.test"), timedelta(minutes=5), undecided=True)
    alone = store.read_owners_view([mine.owner], NOW)
    assert (alone.keys[digest], alone.wishes[digest]) == (view.owners.keys[digest], view.owners.wishes[digest])
    nothing = store.read_agent_view(SpiffeId(TD, "/keyreeve/agent/nobody"), NOW)
    assert (nothing.entries, dict(nothing.grants)) == ((), {})


def test_view_knows_former_keys_and_expired_wishes_do_not_count(store: SqlStore) -> None:
    short = entry(1, x509_svid_ttl=timedelta(minutes=1), expires_at=NOW + HOUR)
    lasting = replace(
        short, entry_id="other", selectors=(Selector("unix", "uid:9"),), x509_svid_ttl=2 * HOUR, expires_at=None
    )
    serve(store, [short])
    store.create_entry(lasting)
    former = key_of(short)
    assert store.replace_managed_key(replace(former, generation=2, key_id="key-2"), former=former)
    digest = short.owner.digest
    assert store.read_agent_view(N1, NOW).owners.wishes[digest].life(HOUR) == timedelta(minutes=1)
    later = store.read_agent_view(N1, NOW + HOUR).owners
    assert later.wishes[digest].life(HOUR) == 2 * HOUR
    assert later.former_key_ids == {digest: (former.key_id,)}


def test_view_takes_as_many_statements_for_many_entries_as_for_one(store: SqlStore) -> None:
    serve(store, [entry(0)])
    serve(store, [entry(number, N2) for number in range(1, 60)])
    counts = []
    for agent in (N1, N2):
        with counted(store) as statements:
            view = store.read_agent_view(agent, NOW)
        counts.append(len(statements))
        assert len(view.owners.svids) == len(view.entries)
    assert counts[0] == counts[1] <= 8


def test_agents_are_due_for_what_is_missing_or_old(store: SqlStore) -> None:
    for agent in (N1, N2):
        save_agent(store, agent)
    assert store.agents_due(NOW) == []
    served, bare = entry(1), entry(2, N2)
    serve(store, [served])
    assert store.agents_due(NOW) == []
    store.create_entry(bare)
    assert store.agents_due(NOW) == [N2]
    store.set_agent_standing(N2, banned=None, evicted=True)
    assert store.agents_due(NOW) == []
    assert store.agents_due(NOW + 0.44 * HOUR) == []
    record = store.current_svid(served.owner.digest)
    assert record is not None
    due = renewal_time(record.serial, record.created_at, record.not_after)
    assert store.agents_due(due - timedelta(seconds=1)) == []  # else a sync would look in vain, round after round
    assert store.agents_due(due + timedelta(seconds=1)) == [N1]
    grant = store.get_node_grant(served.owner, N1)
    assert grant is not None
    for state, found in ((GrantState.INTENDED, [N1]), (GrantState.REVOKED, []), (GrantState.LIVE, [])):
        store.save_node_grant(replace(grant, state=state))
        assert store.agents_due(NOW) == found, state
    assert store.get_managed_key(served.owner) == replace(key_of(served), use=KeyUse.IN_USE)


def test_expired_entries_are_found(store: SqlStore) -> None:
    lasting, ending = entry(1), entry(2, expires_at=NOW + HOUR)
    for each in (lasting, ending):
        store.create_entry(each)
    assert store.expired_entries(NOW) == []
    assert store.expired_entries(NOW + HOUR) == [ending]


def changes(store: SqlStore, since: int) -> frozenset[str] | None:
    return store.changes_since(since).agents


def test_changes_name_the_agents_that_they_concern(store: SqlStore) -> None:
    start = store.change_sequence()
    assert store.changes_since(start) == Changes(start, frozenset())
    shared = entry(1)
    store.create_entry(shared)
    store.create_entry(entry(2, N2))
    assert changes(store, start) == {digest_of(N1), digest_of(N2)}
    mark = store.change_sequence()
    store.create_entry(entry(1, N2))  # shares its key with n1's, so n1's certificate may be another one now
    assert changes(store, mark) == {digest_of(N1), digest_of(N2)}
    mark = store.change_sequence()
    store.delete_entry("e2-n2")
    save_agent(store, N2)
    assert changes(store, mark) == {digest_of(N2)}
    mark = store.change_sequence()
    store.record_intents([intent("1", shared.owner.digest), intent("2", "agent-x")])
    assert changes(store, mark) == frozenset()
    store.record_results([issued(intent("2", "agent-x"))], {})
    assert changes(store, mark) == frozenset()
    store.record_results([issued(intent("1", shared.owner.digest))], {})
    assert changes(store, mark) == {digest_of(N1), digest_of(N2)}


def test_changes_of_everyone(store: SqlStore) -> None:
    start = store.change_sequence()
    certificate = TestPki().root
    authority = Authority("a", AuthorityState.ACTIVE, "k", certificate, root=True)
    store.save_authorities([authority], expected=[])
    assert store.changes_since(start) == Changes(start + 1, None)
    assert changes(store, -1) is None
    assert changes(store, start + 5) is None  # a store from a backup: behind what was seen


def test_step_that_a_ca_of_an_earlier_version_made_concerns_everyone(store: SqlStore) -> None:
    from keyreeve_ca.store import schema

    start = store.change_sequence()
    store.create_entry(entry(1))
    with store.engine.begin() as connection:
        connection.execute(update(schema.counters).where(schema.counters.c.name == "changes").values(value=start + 2))
    assert changes(store, start) is None
    assert changes(store, start + 2) == frozenset()


def test_change_of_an_identity_that_is_everywhere_concerns_everyone(store: SqlStore) -> None:
    for number in range(MAX_NAMED):
        store.create_entry(entry(1, SpiffeId(TD, f"/keyreeve/agent/x{number:03}"), entry_id=f"x{number}"))
    mark = store.change_sequence()
    with counted(store) as statements:
        store.create_entry(entry(1))
    assert changes(store, mark) is None
    assert len(statements) < 10


def test_change_log_is_pruned_and_what_was_pruned_concerns_everyone(store: SqlStore) -> None:
    from keyreeve_ca.store import schema

    store.create_entry(entry(1))
    assert store.prune_change_log() == 0
    newest = KEPT_STEPS + store.change_sequence()
    with store.engine.begin() as connection:
        connection.execute(update(schema.counters).where(schema.counters.c.name == "changes").values(value=newest))
    assert store.prune_change_log() == 1
    assert changes(store, newest - 1) is None


def test_one_agents_entries_of_two_scopes_do_not_mix(store: SqlStore) -> None:
    shared, own = entry(1), entry(1, key_scope=KeyScope.NODE, entry_id="own", selectors=(Selector("unix", "uid:7"),))
    serve(store, [shared, own])
    view = store.read_agent_view(N1, NOW)
    assert len(view.owners.keys) == len(view.grants) == 2
