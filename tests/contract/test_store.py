"""The contract of the CA's store, over SQLite and PostgreSQL; then what each does when it is locked, full or away."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from keyreeve_ca.domain.attestation import JoinToken
from keyreeve_ca.domain.authority import Authority, AuthorityState
from keyreeve_ca.domain.entries import Delegate, Entry, KeyOwner, KeyScope, Selector
from keyreeve_ca.domain.grants import GrantState, NodeGrant
from keyreeve_ca.domain.records import Agent, KeyUse, ManagedKey, SvidRecord, SvidState
from keyreeve_ca.store import schema
from keyreeve_ca.store.sql_store import SqlStore
from keyreeve_common.errors import (
    ConfigInvalid,
    Conflict,
    FailedPrecondition,
    JoinTokenInvalid,
    NotFound,
    StorageBusy,
    StorageFull,
    Unavailable,
)
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.schemes import KeyType
from keyreeve_testing.pki import TestPki
from keyreeve_testing.postgres import PostgresServer, postgres_is_installed, running_postgres

TD = TrustDomain("example.org")
NOW = datetime(2026, 6, 1, 12, 0, 0, 123456, tzinfo=UTC)
AGENT = SpiffeId(TD, "/keyreeve/agent/n1")
OTHER = SpiffeId(TD, "/keyreeve/agent/n2")
WEB = SpiffeId(TD, "/web")


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    if not postgres_is_installed():
        pytest.skip("PostgreSQL is not installed")
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], SqlStore]]:
    """Opens the same database again and again, as several CA instances do."""
    url = f"sqlite:///{tmp_path / 'ca.sqlite3'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").make_database()
    opened: list[SqlStore] = []

    def open_one() -> SqlStore:
        store = SqlStore.open(url, busy_timeout=timedelta(milliseconds=300))
        opened.append(store)
        return store

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[[], SqlStore]) -> SqlStore:
    made = open_store()
    assert not made.has_schema()
    made.migrate()
    made.migrate()
    assert made.has_schema()
    return made


def entry(entry_id: str = "e1", **changes: Any) -> Entry:
    fields: dict[str, Any] = {
        "entry_id": entry_id,
        "spiffe_id": WEB,
        "parent_id": AGENT,
        "selectors": (Selector("unix", "uid:1"), Selector("unix", "path:/bin/x")),
        "created_at": NOW,
        **changes,
    }
    return Entry(**fields)


def agent(**changes: Any) -> Agent:
    fields: dict[str, Any] = {
        "spiffe_id": AGENT,
        "attestation_type": "join_token",
        "serials": ("aa", "bb"),
        "svid_not_after": NOW,
        "attested_at": NOW,
        "last_seen_at": NOW,
        **changes,
    }
    return Agent(**fields)


def svid(serial: str, **changes: Any) -> SvidRecord:
    fields: dict[str, Any] = {
        "serial": serial,
        "spiffe_id": WEB,
        "subject": "s",
        "authority_id": "a",
        "state": SvidState.INTENDED,
        "not_before": NOW,
        "not_after": NOW + timedelta(hours=1),
        "created_at": NOW,
        **changes,
    }
    return SvidRecord(**fields)


def key(owner: KeyOwner, **changes: Any) -> ManagedKey:
    return replace(ManagedKey(owner, 1, "k1", b"spki", "f"), **changes)


def test_migrations_and_models_agree(store: SqlStore) -> None:
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []


def test_trust_domain_is_claimed_once(store: SqlStore) -> None:
    store.claim_trust_domain(TD)
    store.claim_trust_domain(TD)
    with pytest.raises(Conflict, match=r"example\.org"):
        store.claim_trust_domain(TrustDomain("other.org"))


def test_entry_round_trips_whole(store: SqlStore) -> None:
    made = entry(
        delegates=(Delegate((Selector("unix", "uid:33"),)), Delegate(spiffe_id=SpiffeId(TD, "/proxy"))),
        x509_svid_ttl=timedelta(seconds=90, milliseconds=500),
        dns_names=("a.example.org", "*.b.example.org"),
        key_scope=KeyScope.NODE,
        key_type=KeyType.RSA_3072,
        key_backend="hsm",
        hint="püblic 漢",
        expires_at=NOW + timedelta(days=1),
    )
    store.create_entry(made)
    assert store.get_entry("e1") == made
    assert store.list_entries() == [made]


def test_id_16_longest_ids_round_trip(store: SqlStore) -> None:
    longest = SpiffeId(TD, "/" + "a" * (2048 - len("spiffe://example.org/")))
    parent = SpiffeId(TD, "/keyreeve/agent/" + "b" * (2048 - len("spiffe://example.org/keyreeve/agent/")))
    store.create_entry(entry(spiffe_id=longest, parent_id=parent))
    assert store.list_entries(spiffe_id=longest, parent_id=parent) == [entry(spiffe_id=longest, parent_id=parent)]
    store.save_agent(agent(spiffe_id=parent))
    assert store.get_agent(parent).spiffe_id == parent


def test_duplicate_entry_is_a_conflict_that_names_the_other(store: SqlStore) -> None:
    store.create_entry(entry())
    with pytest.raises(Conflict, match="e1"):
        store.create_entry(entry("e2", selectors=tuple(reversed(entry().selectors))))
    store.create_entry(entry("e3", selectors=entry().selectors[:1]))
    with pytest.raises(Conflict, match="e1"):
        store.update_entry(replace(entry("e3")), read_revision=1)


def test_stale_revision_is_a_conflict(store: SqlStore) -> None:
    store.create_entry(entry())
    assert store.update_entry(entry(hint="x"), read_revision=1).revision == 2
    with pytest.raises(Conflict, match="revision 2"):
        store.update_entry(entry(hint="y"), read_revision=1)
    assert store.get_entry("e1").hint == "x"


def test_unknown_things_are_not_found(store: SqlStore) -> None:
    for call in (
        lambda: store.get_entry("none"),
        lambda: store.delete_entry("none"),
        lambda: store.update_entry(entry("none"), read_revision=1),
        lambda: store.get_agent(AGENT),
        lambda: store.set_agent_standing(AGENT, banned=True, evicted=True),
        lambda: store.record_issued("none", []),
    ):
        with pytest.raises(NotFound):
            call()


def test_entries_page_in_a_stable_order(store: SqlStore) -> None:
    for number in range(7):
        store.create_entry(entry(f"e{number}", spiffe_id=SpiffeId(TD, f"/w{number}")))
    seen: list[str] = []
    while page := store.list_entries(limit=3, after=seen[-1] if seen else ""):
        seen += [each.entry_id for each in page]
    assert seen == [f"e{number}" for number in range(7)]


def test_changes_move_the_sequence(store: SqlStore) -> None:
    marks = [store.change_sequence()]
    store.create_entry(entry())
    marks.append(store.change_sequence())
    store.update_entry(entry(hint="x"), read_revision=1)
    marks.append(store.change_sequence())
    store.save_agent(agent())
    marks.append(store.change_sequence())
    store.set_agent_standing(AGENT, banned=True, evicted=True)
    marks.append(store.change_sequence())
    store.delete_entry("e1")
    marks.append(store.change_sequence())
    assert marks == sorted(set(marks))


def test_join_token_works_once_and_not_after_its_time(store: SqlStore) -> None:
    store.add_join_token(JoinToken(b"1" * 32, AGENT, NOW + timedelta(minutes=1)))
    store.add_join_token(JoinToken(b"2" * 32, AGENT, NOW))
    assert store.take_join_token(b"1" * 32, NOW).agent_id == AGENT
    refusals = []
    for token_hash in (b"1" * 32, b"2" * 32, b"3" * 32):
        with pytest.raises(JoinTokenInvalid) as refused:
            store.take_join_token(token_hash, NOW)
        refusals.append(str(refused.value))
    assert len(set(refusals)) == 1


def test_join_token_raced_by_many_is_won_by_one(store: SqlStore, open_store: Callable[[], SqlStore]) -> None:
    store.add_join_token(JoinToken(b"1" * 32, AGENT, NOW + timedelta(minutes=1)))
    stores = [open_store() for _ in range(8)]
    outcomes: list[str] = []
    start = threading.Barrier(len(stores))

    def take(own: SqlStore) -> None:
        start.wait()
        try:
            own.take_join_token(b"1" * 32, NOW)
            outcomes.append("won")
        except (JoinTokenInvalid, StorageBusy) as error:
            outcomes.append(type(error).__name__)

    threads = [threading.Thread(target=take, args=(own,)) for own in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("won") == 1
    assert len(outcomes) == len(stores)


def test_join_tokens_are_pruned(store: SqlStore) -> None:
    store.add_join_token(JoinToken(b"1" * 32, AGENT, NOW))
    store.add_join_token(JoinToken(b"2" * 32, AGENT, NOW + timedelta(seconds=1)))
    assert store.prune_join_tokens(NOW) == 1


def test_agents_round_trip_and_page(store: SqlStore) -> None:
    store.save_agent(agent())
    store.save_agent(agent(spiffe_id=OTHER, agent_version="0.1"))
    store.touch_agent(AGENT, seen_at=NOW + timedelta(seconds=1), version="9")
    assert store.get_agent(AGENT) == agent(last_seen_at=NOW + timedelta(seconds=1), agent_version="9")
    assert [each.spiffe_id for each in store.list_agents(limit=1, after=str(AGENT))] == [OTHER]


def test_grants_are_withdrawn_with_the_last_entry_and_with_the_agent(store: SqlStore) -> None:
    owner = entry().owner
    store.save_managed_key(key(owner))
    store.create_entry(entry())
    store.create_entry(entry("e2", selectors=(Selector("unix", "uid:2"),)))
    store.save_agent(agent())
    live = NodeGrant(owner, AGENT, "k1", GrantState.LIVE, NOW)
    for grant in (live, replace(live, agent=OTHER)):
        assert store.save_node_grant(grant)
    store.delete_entry("e1")
    assert store.withdrawing_grants() == []
    store.delete_entry("e2")
    assert store.withdrawing_grants() == [replace(live, state=GrantState.WITHDRAWING)]
    assert not store.save_node_grant(live, expected=GrantState.LIVE)
    assert store.save_node_grant(live, expected=GrantState.WITHDRAWING)
    store.set_agent_standing(AGENT, banned=None, evicted=True)
    assert store.withdrawing_grants() == [replace(live, state=GrantState.WITHDRAWING)]
    revoked = replace(live, state=GrantState.REVOKED, revoked_at=NOW)
    store.save_node_grant(revoked)
    store.set_agent_standing(AGENT, banned=True, evicted=True)
    assert store.get_node_grant(owner, AGENT) == revoked
    assert store.get_node_grant(owner, OTHER) == replace(live, agent=OTHER)


def test_grant_is_claimed_only_while_an_entry_needs_it_and_its_agent_may_act(store: SqlStore) -> None:
    owner = entry().owner
    store.save_managed_key(key(owner))
    live = NodeGrant(owner, AGENT, "k1", GrantState.LIVE, NOW)
    assert not store.claim_node_grant(live)
    store.create_entry(entry())
    store.save_agent(agent())
    assert store.claim_node_grant(live)
    assert not store.claim_node_grant(replace(live, agent=OTHER))
    store.set_agent_standing(AGENT, banned=None, evicted=True)
    assert not store.claim_node_grant(live)
    store.save_agent(agent())
    assert store.claim_node_grant(live)
    store.delete_entry("e1")
    assert not store.claim_node_grant(live)
    assert store.get_node_grant(owner, AGENT) == replace(live, state=GrantState.WITHDRAWING)


def test_keys_without_entries_are_unused(store: SqlStore) -> None:
    shared, own = entry().owner, KeyOwner(WEB, AGENT)
    store.save_managed_key(key(shared))
    store.save_managed_key(key(own, key_id="k2"))
    store.create_entry(entry())
    assert [each.key_id for each in store.list_managed_keys(unused=True)] == ["k2"]
    assert len(store.list_managed_keys()) == 2
    assert store.save_managed_key(key(own, key_id="k2", use=KeyUse.RETIRING), expected=KeyUse.IN_USE)
    assert [each.key_id for each in store.list_managed_keys(unused=True)] == ["k2"]
    store.save_managed_key(key(own, key_id="k2", use=KeyUse.RETIRED))
    assert store.list_managed_keys(unused=True) == []
    assert not store.save_managed_key(key(own, key_id="k2"), expected=KeyUse.IN_USE)
    assert store.get_managed_key(own) == key(own, key_id="k2", use=KeyUse.RETIRED)


def test_authorities_change_only_from_what_was_read(store: SqlStore) -> None:
    pki = TestPki()
    root = Authority("r", AuthorityState.ACTIVE, "kr", pki.root, root=True)
    issuing = Authority("i", AuthorityState.ACTIVE, "ki", pki.issuing)
    store.save_authorities([root], expected=[])
    assert store.bundle_sequence() == 1
    store.save_authorities([root, issuing], expected=[root])
    assert store.bundle_sequence() == 1
    with pytest.raises(Conflict):
        store.save_authorities([root], expected=[root])
    store.save_authorities([root, replace(issuing, state=AuthorityState.OLD)], expected=[root, issuing])
    assert store.list_authorities() == [root, replace(issuing, state=AuthorityState.OLD)]


def test_inventory_keeps_every_serial(store: SqlStore) -> None:
    for serial in ("1", "2", "3"):
        store.record_intent(svid(serial))
    with pytest.raises(Conflict):
        store.record_intent(svid("1"))
    assert store.current_svid("s") is None
    assert store.record_issued("1", [b"leaf", b"issuer"]).chain_der == (b"leaf", b"issuer")
    store.record_failed("2", "unavailable: away")
    store.record_issued("3", [b"leaf"])
    current = store.current_svid("s")
    assert current is not None
    assert (current.serial, current.state, current.current) == ("3", SvidState.ISSUED, True)
    assert [(each.serial, each.state) for each in store.list_svids()] == [
        ("3", SvidState.ISSUED),
        ("2", SvidState.FAILED),
        ("1", SvidState.ISSUED),
    ]
    assert [each.serial for each in store.list_svids(current_only=True)] == ["3"]
    assert [each.serial for each in store.list_svids(serial="2")] == ["2"]
    assert [each.serial for each in store.list_svids(limit=1, after="3")] == ["2"]
    assert store.list_svids(spiffe_id=AGENT) == []


def test_database_without_schema_says_what_to_do(open_store: Callable[[], SqlStore]) -> None:
    with pytest.raises(FailedPrecondition, match="keyreeve init"):
        open_store().change_sequence()


def test_another_writer_makes_it_busy(store: SqlStore, open_store: Callable[[], SqlStore]) -> None:
    from keyreeve_ca.store.engine import write_transaction

    other = open_store()
    with write_transaction(other.engine):
        with pytest.raises(StorageBusy) as refused:
            store.create_entry(entry())
        assert refused.value.retry_after is not None
        assert store.list_entries() == []  # reading goes on
    store.create_entry(entry())


def test_many_writers_take_turns(store: SqlStore, open_store: Callable[[], SqlStore]) -> None:
    stores = [open_store() for _ in range(4)]
    failures: list[Exception] = []

    def write(own: SqlStore, number: int) -> None:
        for step in range(5):
            try:
                own.create_entry(entry(f"e{number}-{step}", spiffe_id=SpiffeId(TD, f"/w{number}-{step}")))
            except StorageBusy as error:
                failures.append(error)

    threads = [threading.Thread(target=write, args=(own, number)) for number, own in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written = 20 - len(failures)
    assert len(store.list_entries()) == written
    assert store.change_sequence() == written


def test_sqlite_disk_that_is_full(tmp_path: Path) -> None:
    store = SqlStore.open(f"sqlite:///{tmp_path / 'ca.sqlite3'}")
    store.migrate()
    store.create_entry(entry())
    with store.engine.connect() as connection:
        raw: Any = connection.connection.driver_connection
        pages = raw.execute("PRAGMA page_count").fetchone()[0]
        raw.execute(f"PRAGMA max_page_count={pages}")

    def fill() -> None:
        for number in range(200):
            store.create_entry(entry(f"f{number}", spiffe_id=SpiffeId(TD, f"/{'x' * 1500}/{number}")))

    with pytest.raises(StorageFull, match="no space"):
        fill()
    assert store.list_entries(limit=1) == [entry()]  # what was there is there, and reading goes on
    store.close()


def test_sqlite_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "ca.sqlite3").write_text("this is not a database, and it is long enough to be looked at" * 10)
    store = SqlStore.open(f"sqlite:///{tmp_path / 'ca.sqlite3'}")
    with pytest.raises(Unavailable):
        store.change_sequence()
    store.close()


@pytest.mark.postgres
def test_postgresql_that_is_away_is_unavailable_and_comes_back(postgres: PostgresServer) -> None:
    store = SqlStore.open(postgres.make_database())
    store.migrate()
    store.create_entry(entry())
    postgres.stop()
    try:
        with pytest.raises(Unavailable):
            store.list_entries()
        with pytest.raises(Unavailable):
            store.create_entry(entry("e2", spiffe_id=SpiffeId(TD, "/b")))
    finally:
        postgres.start()
    assert store.list_entries() == [entry()]
    store.close()


@pytest.mark.parametrize("url", ["", "nonsense", "mysql://x/y", "sqlite"])
def test_odd_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigInvalid):
        SqlStore.open(url)


def test_sqlite_keeps_a_write_ahead_log(tmp_path: Path) -> None:
    store = SqlStore.open(f"sqlite:///{tmp_path / 'ca.sqlite3'}")
    store.migrate()
    store.close()
    connection = sqlite3.connect(tmp_path / "ca.sqlite3")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
