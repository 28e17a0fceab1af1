"""One suite for the catalog, run over SQLite and PostgreSQL."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from keyreeve_common.errors import (
    ConfigInvalid,
    Conflict,
    FailedPrecondition,
    KeyNotFound,
    KeyreeveError,
    NotFound,
    StorageBusy,
    Unavailable,
)
from keyreeve_common.identity import TrustDomain
from keyreeve_common.key_id import KeyId, parse_key_id
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType
from keyreeve_keyserver.catalog.catalog import Catalog
from keyreeve_keyserver.catalog.records import KeyEntry, NewKey
from keyreeve_keyserver.catalog.steps import STEPS, new_column
from keyreeve_keyserver.domain.keys import JwtProfile, KeyState
from keyreeve_keyserver.domain.policy import Grant
from keyreeve_keyserver.domain.quarantine import Cause, Quarantine
from keyreeve_keyserver.domain.rates import Rate
from keyreeve_testing.postgres import PostgresServer, postgres_is_installed, running_postgres
from sqlalchemy import URL, Column, Connection, Integer, MetaData, Table, Text, create_engine, make_url, text

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
HOUR = timedelta(hours=1)
HOLDER = "spiffe://example.org/agent/a"
BOTH = frozenset({Purpose.TLS13_SERVER_VERIFY, Purpose.TLS13_CLIENT_VERIFY})
SERVER = frozenset({Purpose.TLS13_SERVER_VERIFY})
Opener = Callable[[], Catalog]


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    if not postgres_is_installed():
        pytest.skip("PostgreSQL is not installed")
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> URL:
    if request.param == "sqlite":
        return URL.create("sqlite", database=str(tmp_path / "catalog.sqlite3"))
    server: PostgresServer = request.getfixturevalue("postgres")
    return make_url(server.make_database())


@pytest.fixture
def open_catalog(url: URL) -> Iterator[Opener]:
    """Opens as many as are asked for: each stands for one process."""
    opened: list[Catalog] = []

    def open_one() -> Catalog:
        opened.append(Catalog.open(url, busy_timeout=timedelta(milliseconds=300)))
        return opened[-1]

    yield open_one
    for catalog in opened:
        catalog.close()


@pytest.fixture
def catalog(open_catalog: Opener) -> Catalog:
    return open_catalog()


def new_key(request_id: str = "r1", *, label: str = "spiffe://example.org/web") -> NewKey:
    return NewKey(request_id, KeyType.EC_P256, KeyRole.HANDSHAKE, BOTH, "", label)


def make_key(catalog: Catalog, request_id: str = "r1", *, label: str = "spiffe://example.org/web") -> KeyEntry:
    entry = catalog.begin_key(new_key(request_id, label=label), now=NOW)
    done = catalog.complete_key(
        entry.key_id, backend="soft", sealed_record=b"sealed", spki_der=b"spki", attributes={"token": "t"}
    )
    assert done is not None
    return done


def grant(key_id: KeyId, *, holder: str = HOLDER, expires_at: datetime | None = NOW + HOUR) -> Grant:
    return Grant(key_id, holder, SERVER, NOW, expires_at)


def test_key_is_what_was_written(catalog: Catalog) -> None:
    made = make_key(catalog)
    found = catalog.key(made.key_id)
    assert found == made
    assert (found.key_type, found.role, found.purposes) == (KeyType.EC_P256, KeyRole.HANDSHAKE, BOTH)
    assert (found.state, found.backend, found.spki_der) == (KeyState.ENABLED, "soft", b"spki")
    assert (found.attributes, found.created_at) == ({"token": "t"}, NOW)
    assert catalog.sealed_record(made.key_id) == b"sealed"


def test_key_ids_are_of_the_published_form(catalog: Catalog) -> None:
    ids = {make_key(catalog, f"r{number}").key_id for number in range(20)}
    assert len(ids) == 20
    assert all(parse_key_id(key_id) and key_id.startswith("k-") and len(key_id) == 28 for key_id in ids)


def test_intent_is_no_key_yet(catalog: Catalog) -> None:
    intent = catalog.begin_key(new_key(), now=NOW)
    assert intent.state is None
    assert catalog.list_keys(limit=10) == []
    assert catalog.sealed_record(intent.key_id) is None
    with pytest.raises(KeyNotFound):
        catalog.key(intent.key_id)
    changes = catalog.changes_since(0)
    assert changes is not None
    assert changes.keys == ()


def test_same_request_id_finds_the_intent_and_then_the_key(catalog: Catalog, open_catalog: Opener) -> None:
    intent = catalog.begin_key(new_key(), now=NOW)
    again = open_catalog().begin_key(new_key(), now=NOW + HOUR)
    assert (again.key_id, again.state) == (intent.key_id, None)
    made = make_key(catalog)
    assert catalog.begin_key(new_key(), now=NOW) == made


def test_request_id_for_another_key_is_a_conflict(catalog: Catalog) -> None:
    make_key(catalog)
    with pytest.raises(Conflict):
        catalog.begin_key(new_key(label="other"), now=NOW)


def test_only_one_process_completes(catalog: Catalog) -> None:
    made = make_key(catalog)
    second = catalog.complete_key(made.key_id, backend="soft", sealed_record=b"x", spki_der=b"y", attributes={})
    assert second is None
    assert catalog.sealed_record(made.key_id) == b"sealed"


def test_abandoned_request_id_can_be_used_again(catalog: Catalog) -> None:
    intent = catalog.begin_key(new_key(), now=NOW)
    catalog.abandon_key(intent.key_id)
    assert catalog.begin_key(new_key(label="other"), now=NOW).key_id != intent.key_id


def test_a_finished_key_cannot_be_abandoned(catalog: Catalog) -> None:
    made = make_key(catalog)
    catalog.abandon_key(made.key_id)
    assert catalog.key(made.key_id) == made


def test_pages_cover_every_key_once(catalog: Catalog) -> None:
    made = {make_key(catalog, f"r{number}").key_id for number in range(7)}
    seen: list[str] = []
    while page := catalog.list_keys(limit=3, after=seen[-1] if seen else ""):
        seen += [entry.key_id for entry in page]
    assert len(seen) == 7
    assert set(seen) == made


def test_keys_by_label(catalog: Catalog) -> None:
    wanted = make_key(catalog, "a", label="x")
    make_key(catalog, "b", label="y")
    assert catalog.list_keys(limit=5, label="x") == [wanted]


def test_states(catalog: Catalog) -> None:
    key_id = make_key(catalog).key_id
    assert catalog.change_state(key_id, to=KeyState.DESTROYED, from_states=(KeyState.DISABLED,)) is None
    disabled = catalog.change_state(key_id, to=KeyState.DISABLED, from_states=(KeyState.ENABLED,))
    assert disabled is not None
    assert disabled.state is KeyState.DISABLED
    assert catalog.change_state(key_id, to=KeyState.DESTROYED, from_states=(KeyState.DISABLED,)) is not None
    assert catalog.sealed_record(key_id) == b"sealed"
    catalog.wipe_record(key_id)
    assert catalog.sealed_record(key_id) is None
    with pytest.raises(KeyNotFound):
        catalog.change_state(KeyId("k-none"), to=KeyState.DISABLED, from_states=(KeyState.ENABLED,))


def test_grant_life(catalog: Catalog) -> None:
    key_id = make_key(catalog).key_id
    made = catalog.put_grant(grant(key_id))
    assert made.grant == grant(key_id)
    longer = catalog.extend_grant(key_id, HOLDER, expires_at=NOW + 2 * HOUR, now=NOW)
    assert longer.grant.expires_at == NOW + 2 * HOUR
    revoked = catalog.revoke_grant(key_id, HOLDER, now=NOW + HOUR)
    assert revoked.grant.revoked_at == NOW + HOUR
    assert catalog.revoke_grant(key_id, HOLDER, now=NOW + 2 * HOUR) == revoked
    with pytest.raises(FailedPrecondition):
        catalog.extend_grant(key_id, HOLDER, expires_at=NOW + 9 * HOUR, now=NOW)
    assert catalog.put_grant(grant(key_id, expires_at=None)).grant.is_live(NOW + 99 * HOUR)


def test_expired_grant_is_not_extended(catalog: Catalog) -> None:
    key_id = make_key(catalog).key_id
    catalog.put_grant(grant(key_id))
    with pytest.raises(FailedPrecondition, match="expired"):
        catalog.extend_grant(key_id, HOLDER, expires_at=NOW + 9 * HOUR, now=NOW + HOUR)


def test_no_such_grant(catalog: Catalog) -> None:
    with pytest.raises(NotFound):
        catalog.revoke_grant(KeyId("k-none"), HOLDER, now=NOW)
    with pytest.raises(NotFound):
        catalog.extend_grant(KeyId("k-none"), HOLDER, expires_at=NOW + HOUR, now=NOW)


def test_grants_are_listed_in_pages_and_by_holder(catalog: Catalog) -> None:
    ids = [make_key(catalog, f"r{number}").key_id for number in range(3)]
    made = {
        (key_id, holder): catalog.put_grant(grant(key_id, holder=holder)) for key_id in ids for holder in ("a", "b")
    }
    seen: list[tuple[str, str]] = []
    while page := catalog.list_grants(limit=4, after=seen[-1] if seen else ("", "")):
        seen += [(entry.grant.key_id, entry.grant.holder) for entry in page]
    assert seen == sorted(made)
    assert len(catalog.list_grants(limit=9, holder="a")) == 3
    assert catalog.list_grants(limit=9, holder="a", key_id=ids[0]) == [made[ids[0], "a"]]


def test_another_process_sees_only_what_changed(catalog: Catalog, open_catalog: Opener) -> None:
    key_id = make_key(catalog).key_id
    reader = open_catalog()
    first = reader.changes_since(0)
    assert first is not None
    assert [facts.key_id for facts, _ in first.keys] == [key_id]
    assert reader.changes_since(first.seq) is None
    made = catalog.put_grant(grant(key_id))
    second = reader.changes_since(first.seq)
    assert second is not None
    assert (second.keys, second.grants) == ((), (made,))


def test_concurrent_writers_lose_nothing(open_catalog: Opener) -> None:
    catalogs = [open_catalog() for _ in range(4)]
    key_id = make_key(catalogs[0]).key_id

    def write(number: int) -> str:
        holder = f"{HOLDER}/{number}"
        while True:
            try:
                catalogs[number % 4].put_grant(grant(key_id, holder=holder))
            except StorageBusy:
                continue
            return holder

    with ThreadPoolExecutor(4) as threads:
        holders = set(threads.map(write, range(24)))
    changes = catalogs[0].changes_since(0)
    assert changes is not None
    assert {entry.grant.holder for entry in changes.grants} == holders
    assert len({entry.seq for entry in changes.grants}) == 24


def test_concurrent_retries_make_one_key(open_catalog: Opener) -> None:
    catalogs = [open_catalog() for _ in range(4)]

    def begin(number: int) -> KeyId:
        while True:
            try:
                return catalogs[number % 4].begin_key(new_key(), now=NOW).key_id
            except StorageBusy:
                continue

    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(begin, range(12)))) == 1


def test_locked_by_another_process_is_storage_busy(catalog: Catalog, url: URL) -> None:
    key_id = make_key(catalog).key_id
    if url.get_backend_name() == "sqlite":
        holder = sqlite3.connect(str(url.database), isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        try:
            _check_busy(catalog, key_id)
        finally:
            holder.close()
    else:
        engine = create_engine(url)
        with engine.connect() as connection:
            connection.execute(text("LOCK TABLE keyreeve_changes IN EXCLUSIVE MODE"))
            _check_busy(catalog, key_id)
        engine.dispose()
    catalog.put_grant(grant(key_id))


def _check_busy(catalog: Catalog, key_id: KeyId) -> None:
    with pytest.raises(StorageBusy, match="locked by another process") as refused:
        catalog.put_grant(grant(key_id))
    assert refused.value.retry_after
    assert catalog.key(key_id).key_id == key_id  # readers go on
    assert catalog.list_grants(limit=5) == []


def test_reopening_keeps_everything(open_catalog: Opener) -> None:
    made = make_key(open_catalog())
    assert open_catalog().key(made.key_id) == made


def test_schema_of_a_later_release_is_refused(catalog: Catalog, url: URL) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE keyreeve_schema_version SET version = 99"))
    engine.dispose()
    with pytest.raises(ConfigInvalid, match="schema version 99"):
        Catalog.open(url, busy_timeout=timedelta(milliseconds=300))


@pytest.mark.postgres
def test_postgres_outage_is_unavailable_and_passes(postgres: PostgresServer) -> None:
    catalog = Catalog.open(make_url(postgres.make_database()), busy_timeout=timedelta(seconds=1))
    key_id = make_key(catalog).key_id
    postgres.stop()
    try:
        with pytest.raises(Unavailable, match="cannot be reached"):
            catalog.key(key_id)
    finally:
        postgres.start()
    assert catalog.key(key_id).key_id == key_id
    catalog.close()


@pytest.mark.postgres
def test_postgres_refusing_the_login_says_so(postgres: PostgresServer) -> None:
    url = make_url(postgres.make_database()).set(username="nobody_knows")
    with pytest.raises(KeyreeveError, match=r"catalog\.url"):
        Catalog.open(url, busy_timeout=timedelta(seconds=1))


def test_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite3"
    path.write_bytes(b"this is not a database, " * 100)
    with pytest.raises(FailedPrecondition, match="damaged or not ours"):
        Catalog.open(URL.create("sqlite", database=str(path)), busy_timeout=timedelta(seconds=1))


def test_directory_that_is_missing(tmp_path: Path) -> None:
    url = URL.create("sqlite", database=str(tmp_path / "none" / "catalog.sqlite3"))
    with pytest.raises(ConfigInvalid, match="no such directory"):
        Catalog.open(url, busy_timeout=timedelta(seconds=1))


def test_intent_takes_a_fresh_key_id_until_it_is_completed(catalog: Catalog) -> None:
    intent = catalog.begin_key(new_key(), now=NOW)
    renamed = catalog.rename_intent(intent.key_id)
    assert renamed is not None
    assert renamed.key_id != intent.key_id
    made = make_key(catalog)
    assert made.key_id == renamed.key_id
    assert catalog.rename_intent(made.key_id) is None


def test_missing_step_is_done_once_and_the_catalog_serves_meanwhile(
    open_catalog: Opener, url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later release adds a column while a replica of this one goes on."""
    before = open_catalog()
    done: list[str] = []

    def add_note(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE keyreeve_grants ADD COLUMN test_note TEXT"))
        done.append("note")

    monkeypatch.setitem(STEPS, "test_note", add_note)
    after = open_catalog()
    open_catalog()
    assert done == ["note"]
    key = make_key(before)
    before.put_grant(Grant(key.key_id, HOLDER, SERVER, created_at=NOW))
    (found,) = after.list_grants(limit=10)
    assert found.grant.key_id == key.key_id


def test_column_is_added_once(url: URL) -> None:
    later = Table("keyreeve_test", MetaData(), Column("id", Integer), Column("note", Text, nullable=True))
    engine = create_engine(url.set(drivername="postgresql+psycopg") if url.get_backend_name() != "sqlite" else url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE keyreeve_test (id INTEGER)"))
        new_column(later, "note")(connection)
        new_column(later, "note")(connection)
        connection.execute(text("INSERT INTO keyreeve_test (id, note) VALUES (1, 'n')"))
    engine.dispose()


def test_rate_of_a_grant_is_kept_replaced_and_followed(catalog: Catalog, open_catalog: Opener) -> None:
    key_id = make_key(catalog).key_id
    limited = replace(grant(key_id), rate=Rate(1 / 3, 7))
    assert catalog.put_grant(limited).grant == limited
    longer = catalog.extend_grant(key_id, HOLDER, expires_at=NOW + 2 * HOUR, now=NOW)
    assert longer.grant.rate == Rate(1 / 3, 7)
    changes = open_catalog().changes_since(0)
    assert changes is not None
    assert changes.grants == (longer,)
    assert catalog.put_grant(grant(key_id), keep_rate=True).grant.rate == Rate(1 / 3, 7)
    assert catalog.put_grant(replace(limited, rate=Rate(2, 3)), keep_rate=True).grant.rate == Rate(2, 3)
    assert catalog.put_grant(grant(key_id)).grant.rate is None
    assert catalog.put_grant(grant(key_id), keep_rate=True).grant.rate is None


def test_catalog_of_the_release_before_gets_its_rates(open_catalog: Opener, url: URL) -> None:
    before = open_catalog()
    key_id = make_key(before).key_id
    before.put_grant(grant(key_id))
    with before._engine.begin() as connection:
        connection.execute(text("DELETE FROM keyreeve_schema_steps WHERE name LIKE 'grants_rate%'"))
        connection.execute(text("ALTER TABLE keyreeve_grants DROP COLUMN rate_per_second"))
        connection.execute(text("ALTER TABLE keyreeve_grants DROP COLUMN rate_burst"))
    after = open_catalog()
    (found,) = after.list_grants(limit=10)
    assert found.grant == grant(key_id)
    limited = replace(grant(key_id), rate=Rate(5, 9))
    assert after.put_grant(limited).grant == limited


def test_jwt_profile_is_kept_in_a_catalog_of_the_release_before(open_catalog: Opener, url: URL) -> None:
    before = open_catalog()
    key_id = make_key(before).key_id
    with before._engine.begin() as connection:
        connection.execute(text("DELETE FROM keyreeve_schema_steps WHERE name = 'keys_jwt_profile'"))
        connection.execute(text("ALTER TABLE keyreeve_keys DROP COLUMN jwt_profile"))
    after = open_catalog()
    assert after.begin_key(new_key(), now=NOW).key_id == key_id
    assert after.key(key_id).jwt_profile is None
    profile = JwtProfile(TrustDomain("example.org"), timedelta(minutes=5))
    tokens = NewKey(
        "r2", KeyType.EC_P256, KeyRole.JWT_AUTHORITY, frozenset({Purpose.JWT_SVID}), "", "tokens", jwt_profile=profile
    )
    assert after.begin_key(tokens, now=NOW).jwt_profile == profile
    assert after.begin_key(tokens, now=NOW).jwt_profile == profile
    with pytest.raises(Conflict):
        after.begin_key(replace(tokens, jwt_profile=replace(profile, max_ttl=timedelta(minutes=6))), now=NOW)


def disabled_key(catalog: Catalog, request_id: str = "r1") -> KeyId:
    key_id = make_key(catalog, request_id).key_id
    assert catalog.change_state(key_id, to=KeyState.DISABLED, from_states=(KeyState.ENABLED,)) is not None
    return key_id


def test_destruction_is_scheduled_cancelled_and_begun_when_due(catalog: Catalog) -> None:
    enabled = make_key(catalog, "enabled").key_id
    assert catalog.schedule_destruction(enabled, at=NOW, permit=b"p") is None
    key_id = disabled_key(catalog)
    pending = catalog.schedule_destruction(key_id, at=NOW + HOUR, permit=b"permit")
    assert pending is not None
    assert (pending.state, pending.life.destroy_at) == (KeyState.PENDING_DESTRUCTION, NOW + HOUR)
    assert catalog.schedule_destruction(key_id, at=NOW, permit=b"sooner") is None
    assert catalog.change_state(key_id, to=KeyState.ENABLED, from_states=(KeyState.DISABLED,)) is None
    cancelled = catalog.cancel_destruction(key_id)
    assert cancelled is not None
    assert (cancelled.state, cancelled.life.destroy_at) == (KeyState.DISABLED, None)
    assert catalog.cancel_destruction(key_id) is None
    catalog.schedule_destruction(key_id, at=NOW + HOUR, permit=b"permit")
    assert catalog.begin_destructions(now=NOW + HOUR - timedelta(microseconds=1)) == []
    assert catalog.unfinished_destructions() == []
    assert [entry.state for entry in catalog.begin_destructions(now=NOW + HOUR)] == [KeyState.DESTROYED]
    assert catalog.cancel_destruction(key_id) is None
    (doomed,) = catalog.unfinished_destructions()
    assert (doomed.key_id, doomed.sealed_record, doomed.permit) == (key_id, b"sealed", b"permit")
    assert "sealed" not in repr(doomed).replace("sealed_record", "")
    catalog.wipe_record(key_id)
    assert catalog.unfinished_destructions() == []


def test_replicas_do_not_fight_over_a_destruction(open_catalog: Opener) -> None:
    catalogs = [open_catalog() for _ in range(3)]
    key_ids = {disabled_key(catalogs[0], f"r{number}") for number in range(4)}
    for key_id in key_ids:
        catalogs[0].schedule_destruction(key_id, at=NOW, permit=b"p")
    with ThreadPoolExecutor(3) as pool:
        begun = [entry.key_id for entries in pool.map(begin_patiently, catalogs) for entry in entries]
    assert sorted(begun) == sorted(key_ids)


def begin_patiently(catalog: Catalog) -> list[KeyEntry]:
    for _ in range(20):
        try:
            return catalog.begin_destructions(now=NOW)
        except StorageBusy:
            continue
    raise AssertionError("the catalog stayed locked")


def test_round_with_nothing_due_writes_nothing(catalog: Catalog) -> None:
    key_id = disabled_key(catalog)
    catalog.schedule_destruction(key_id, at=NOW + HOUR, permit=b"p")
    changes = catalog.changes_since(-1)
    assert changes is not None
    catalog.begin_destructions(now=NOW)
    assert catalog.changes_since(changes.seq) is None


def test_key_that_waits_is_a_disabled_one_to_the_release_before(catalog: Catalog, url: URL) -> None:
    key_id = disabled_key(catalog)
    catalog.schedule_destruction(key_id, at=NOW, permit=b"p")
    engine = create_engine(url.set(drivername="postgresql+psycopg") if url.drivername.startswith("postgres") else url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT state FROM keyreeve_keys")).scalar_one() == "disabled"
    engine.dispose()


@pytest.mark.parametrize("then", ["faulty", "retired", "disabled"])
def test_key_that_an_earlier_release_enabled_again_is_not_destroyed_when_it_is_disabled_later(
    catalog: Catalog, url: URL, then: str
) -> None:
    """The earlier release knows nothing of `destroy_at` and leaves it: by then its time has long passed."""
    key_id = disabled_key(catalog)
    catalog.schedule_destruction(key_id, at=NOW + HOUR, permit=b"p")
    _by_earlier_release(url, "UPDATE keyreeve_keys SET state = 'enabled'")
    assert catalog.set_retirement(key_id, at=NOW) is not None
    if then == "faulty":
        assert catalog.disable_faulty(key_id, reason="r") is not None
    elif then == "retired":
        assert len(catalog.retire_due(now=NOW + HOUR)) == 1
    else:
        assert catalog.begin_destructions(now=NOW) == []
        _by_earlier_release(url, "UPDATE keyreeve_keys SET state = 'disabled'")
    assert catalog.begin_destructions(now=NOW + 9 * HOUR) == []
    assert catalog.key(key_id).state is KeyState.DISABLED


def _by_earlier_release(url: URL, statement: str) -> None:
    engine = create_engine(url.set(drivername="postgresql+psycopg") if url.drivername.startswith("postgres") else url)
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


def test_time_is_the_databases_own_where_it_has_a_clock(catalog: Catalog, url: URL) -> None:
    told = catalog.database_time(NOW)
    if url.drivername.startswith("sqlite"):
        assert told == NOW
    else:
        assert abs(told - datetime.now(UTC)) < HOUR  # one machine here; what counts is that it is not NOW


def test_faulty_key_is_disabled_once_with_its_reason(catalog: Catalog) -> None:
    key_id = make_key(catalog).key_id
    faulty = catalog.disable_faulty(key_id, reason="it signs with another key")
    assert faulty is not None
    assert (faulty.state, faulty.life.state_reason) == (KeyState.DISABLED, "it signs with another key")
    assert catalog.disable_faulty(key_id, reason="again") is None
    enabled = catalog.change_state(key_id, to=KeyState.ENABLED, from_states=(KeyState.DISABLED,))
    assert enabled is not None
    assert enabled.life.state_reason == ""


def test_quarantine_is_kept_listed_lifted_and_followed(catalog: Catalog, open_catalog: Opener) -> None:
    first = Quarantine(HOLDER, Cause.REFUSALS, "10 refusals", "replica x", NOW, NOW + HOUR)
    made = catalog.put_quarantine(first)
    assert made.quarantine == first
    again = catalog.put_quarantine(replace(first, cause=Cause.RATE, since=NOW + HOUR / 2))
    assert again == made  # another replica counted too: the first one stands
    changes = open_catalog().changes_since(0)
    assert changes is not None
    assert changes.quarantines == (made,)
    by_hand = Quarantine(HOLDER, Cause.OPERATOR, "broken into", "local", NOW)
    assert catalog.put_quarantine(by_hand).quarantine == by_hand  # an operator's word replaces it
    assert catalog.put_quarantine(first).quarantine == by_hand
    lifted = catalog.lift_quarantine(HOLDER, now=NOW + HOUR)
    assert lifted.quarantine.lifted_at == NOW + HOUR
    assert catalog.lift_quarantine(HOLDER, now=NOW + 2 * HOUR) == lifted
    assert catalog.list_quarantines(limit=9, holding_at=NOW + 2 * HOUR) == []
    assert catalog.list_quarantines(limit=9) == [lifted]
    later = replace(first, since=NOW + 3 * HOUR, until=NOW + 4 * HOUR)
    assert catalog.put_quarantine(later).quarantine == later
    with pytest.raises(NotFound):
        catalog.lift_quarantine("spiffe://example.org/agent/other", now=NOW)


def test_quarantines_are_listed_in_pages_and_ended_ones_are_told_apart(catalog: Catalog) -> None:
    for number in range(7):
        until = NOW + HOUR if number % 2 else None
        catalog.put_quarantine(Quarantine(f"spiffe://example.org/{number}", Cause.OPERATOR, "r", "local", NOW, until))
    seen: list[str] = []
    while page := catalog.list_quarantines(limit=3, after=seen[-1] if seen else ""):
        seen += [entry.quarantine.holder for entry in page]
    assert seen == [f"spiffe://example.org/{number}" for number in range(7)]
    holding = catalog.list_quarantines(limit=9, holding_at=NOW + HOUR)
    assert [entry.quarantine.holder[-1] for entry in holding] == ["0", "2", "4", "6"]


def rotation(of: KeyEntry, request_id: str = "next") -> NewKey:
    return replace(new_key(request_id), predecessor=of.key_id)


def finish(catalog: Catalog, entry: KeyEntry) -> KeyEntry:
    done = catalog.complete_key(entry.key_id, backend="soft", sealed_record=b"s", spki_der=b"q", attributes={})
    assert done is not None
    return done


def test_next_generation_has_the_grants_of_the_one_before_revoked_ones_too(catalog: Catalog) -> None:
    first, stranger = make_key(catalog), make_key(catalog, "stranger")
    other = "spiffe://example.org/agent/b"
    for holder in (HOLDER, other):
        catalog.put_grant(grant(first.key_id, holder=holder))
    catalog.put_grant(grant(stranger.key_id))
    catalog.revoke_grant(first.key_id, other, now=NOW)
    begun = catalog.begin_key(rotation(first), now=NOW)
    assert catalog.list_grants(limit=9, key_id=begun.key_id) == []
    mark = catalog.changes_since(-1)
    assert mark is not None
    second = finish(catalog, begun)
    assert (second.life.generation, second.life.predecessor) == (2, first.key_id)
    assert catalog.key(first.key_id).life.successor == second.key_id
    copies = {entry.grant for entry in catalog.list_grants(limit=9, key_id=second.key_id)}
    assert copies == {replace(e.grant, key_id=second.key_id) for e in catalog.list_grants(limit=9, key_id=first.key_id)}
    assert {copy.holder for copy in copies if copy.revoked_at is not None} == {other}
    followed = catalog.changes_since(mark.seq)
    assert followed is not None
    assert {entry.grant for entry in followed.grants} == copies


def test_key_has_one_successor_and_a_retry_finds_it(catalog: Catalog) -> None:
    first = make_key(catalog)
    begun = catalog.begin_key(rotation(first), now=NOW)
    assert catalog.begin_key(rotation(first), now=NOW) == begun
    with pytest.raises(Conflict, match="by request next"):
        catalog.begin_key(rotation(first, "rival"), now=NOW)
    second = finish(catalog, begun)
    assert catalog.begin_key(rotation(first), now=NOW).key_id == second.key_id
    with pytest.raises(Conflict, match="by request next"):
        catalog.begin_key(rotation(first, "rival"), now=NOW)
    third = finish(catalog, catalog.begin_key(rotation(second, "third"), now=NOW))
    assert third.life.generation == 3
    with pytest.raises(FailedPrecondition):
        catalog.begin_key(rotation(catalog.key(disabled_key(catalog, "off")), "x"), now=NOW)
    with pytest.raises(KeyNotFound):
        catalog.begin_key(replace(new_key("y"), predecessor="k-none"), now=NOW)


def test_retired_key_is_disabled_when_due_and_once(open_catalog: Opener) -> None:
    one, other = open_catalog(), open_catalog()
    key_id = make_key(one).key_id
    assert one.set_retirement(key_id, at=NOW + 2 * HOUR) is not None
    moved = one.set_retirement(key_id, at=NOW + HOUR)
    assert moved is not None
    assert moved.life.retire_at == NOW + HOUR
    assert one.retire_due(now=NOW) == []
    assert [entry.state for entry in one.retire_due(now=NOW + HOUR)] == [KeyState.DISABLED]
    assert other.retire_due(now=NOW + HOUR) == []
    assert [entry.key_id for entry in one.retired_keys()] == [key_id]
    assert one.set_retirement(key_id, at=NOW) is None
    enabled = one.change_state(key_id, to=KeyState.ENABLED, from_states=(KeyState.DISABLED,))
    assert enabled is not None
    assert one.retire_due(now=NOW + 9 * HOUR) == []  # what an operator enables stays so
