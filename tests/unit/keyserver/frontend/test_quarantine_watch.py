"""Who is put in quarantine, and who never is: by example, and as a state machine over two replicas of one catalog."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from keyreeve_common.errors import (
    InvalidRequest,
    KeyDisabled,
    KeyNotFound,
    KeyreeveError,
    MessageTooLarge,
    PurposeMismatch,
    PurposeNotPermitted,
    Quarantined,
    RateLimited,
    SchemeNotSupported,
    StorageBusy,
    Unavailable,
)
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import Purpose
from keyreeve_keyserver.catalog.catalog import Catalog
from keyreeve_keyserver.catalog.records import GrantEntry, QuarantineEntry
from keyreeve_keyserver.config import QuarantineConfig
from keyreeve_keyserver.domain.policy import Grant
from keyreeve_keyserver.domain.quarantine import Cause, Quarantine
from keyreeve_keyserver.frontend.access import Access, CatalogThreads
from keyreeve_keyserver.frontend.quarantine_watch import QuarantineWatch, Refusal
from keyreeve_keyserver.frontend.rates import RateExceeded
from sqlalchemy import URL

START = datetime(2026, 1, 1, tzinfo=UTC)
SECOND = 1_000_000_000
NODES = [f"spiffe://example.org/agent/{name}" for name in "abcdefgh"]
NODE, CA = NODES[0], "spiffe://example.org/keyreeve/ca"
SERVER = frozenset({Purpose.TLS13_SERVER_VERIFY})


class Replica:
    """A watch with its own memory over `catalog`, and the clock of the test."""

    def __init__(self, catalog: Catalog, **config: Any) -> None:
        self.now_ns = 0
        self.threads = CatalogThreads(catalog, threads=1)
        self.access = Access(self.threads, max_staleness=timedelta(seconds=60))
        settings = QuarantineConfig(**{"refusals": 10, **config})
        self.watch = QuarantineWatch(
            settings,
            self.access,
            self.threads,
            exempt=frozenset({CA}),
            clock=lambda: self.now,
            clock_ns=lambda: self.now_ns,
        )

    @property
    def now(self) -> datetime:
        return START + timedelta(microseconds=self.now_ns // 1000)

    def refuse(self, error: KeyreeveError, *, times: int = 1, key: str = "k-{}", **options: Any) -> None:
        holder = options.pop("holder", NODE)
        refusals: list[Refusal] = [(key.format(number), 1, error) for number in range(times)]
        self.watch.refused(holder, refusals, **options)

    def is_stopped(self, holder: str = NODE) -> bool:
        try:
            self.access.authorize(holder, "k-1", 1, self.now)
        except Quarantined:
            return True
        except KeyreeveError:
            pass
        return False

    async def settle(self) -> None:
        await asyncio.gather(*self.watch._tasks)
        await self.access.refresh()


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    url = URL.create("sqlite", database=str(tmp_path / "catalog.sqlite3"))
    return Catalog.open(url, busy_timeout=timedelta(milliseconds=200))


@pytest.fixture
async def replica(catalog: Catalog) -> AsyncIterator[Replica]:
    replica = Replica(catalog)
    await replica.access.refresh()
    yield replica
    await replica.settle()
    replica.threads.close()


async def test_strangers_use_up_no_quarantine_of_holders(replica: Replica) -> None:
    """Whoever owns some workloads has SVIDs to spend: they may call, and have no grants."""
    grant = Grant(KeyId("k-own"), NODE, SERVER, START)
    replica.access.apply_grant(GrantEntry(grant, 1))
    for stranger in NODES[1:6]:
        replica.refuse(KeyNotFound(), times=10, holder=stranger)
    assert [replica.is_stopped(stranger) for stranger in NODES[1:6]] == [True] * 3 + [False] * 2
    replica.refuse(KeyNotFound(), times=10)
    assert replica.is_stopped()


async def test_probing_for_keys_is_stopped_everywhere_and_for_a_while(replica: Replica, catalog: Catalog) -> None:
    replica.refuse(KeyNotFound(), times=9)
    assert not replica.is_stopped()
    replica.refuse(KeyNotFound(), times=10)  # nine of them are known already
    assert replica.is_stopped()
    await replica.settle()
    other = Replica(catalog)
    await other.access.refresh()
    assert other.is_stopped()
    assert not other.is_stopped(NODES[1])
    (entry,) = catalog.list_quarantines(limit=9, holding_at=replica.now)
    assert (entry.quarantine.cause, entry.quarantine.until) == (Cause.REFUSALS, START + timedelta(hours=1))
    other.now_ns = 3600 * SECOND
    assert not other.is_stopped()
    other.threads._pool.shutdown()


@pytest.mark.parametrize("error", [InvalidRequest("key id is malformed"), MessageTooLarge("65537")])
async def test_what_no_agent_sends_counts(replica: Replica, error: KeyreeveError) -> None:
    replica.refuse(error, times=9)
    assert not replica.is_stopped()
    replica.refuse(error)
    assert replica.is_stopped()


@pytest.mark.parametrize(
    "error",
    [
        PurposeMismatch("not a CertificateVerify"),
        PurposeNotPermitted("not covered"),
        SchemeNotSupported("odd"),
        RateExceeded("too much"),
        RateLimited("busy"),
        KeyDisabled("disabled"),
        Unavailable("starting"),
        Quarantined("stopped"),
    ],
)
async def test_what_a_workload_or_an_operator_brings_about_stops_no_node(
    replica: Replica, error: KeyreeveError
) -> None:
    for by_signer in (False, True):
        replica.refuse(error, times=5000, by_signer=by_signer)
    assert not replica.is_stopped()


async def test_signers_refusals_are_of_messages_and_no_agents_fault(replica: Replica) -> None:
    replica.refuse(KeyNotFound(), times=100, by_signer=True)
    replica.refuse(InvalidRequest("x"), times=100, by_signer=True)
    assert not replica.is_stopped()


async def test_ended_grants_are_no_probing(replica: Replica) -> None:
    for number in range(100):
        grant = Grant(KeyId(f"k-{number}"), NODE, SERVER, START, revoked_at=START)
        replica.access.apply_grant(GrantEntry(grant, 1))
    replica.refuse(KeyNotFound(), times=100)
    assert not replica.is_stopped()


async def test_a_grant_on_its_way_is_no_probing(replica: Replica) -> None:
    for _ in range(1000):
        replica.refuse(KeyNotFound(), key="k-new")
    assert not replica.is_stopped()
    replica.access._read_at -= 3  # and while the catalog is away, no unknown grant says anything
    replica.refuse(KeyNotFound(), times=1000)
    assert not replica.is_stopped()


async def test_key_administrators_are_never_stopped_by_themselves(
    replica: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    replica.refuse(InvalidRequest("x"), times=1000, holder=CA)
    assert not replica.is_stopped(CA)
    assert "quarantine_withheld" in caplog.text


async def test_many_holders_at_once_are_rather_our_fault(replica: Replica, caplog: pytest.LogCaptureFixture) -> None:
    for node in NODES:
        replica.refuse(InvalidRequest("x"), times=10, holder=node)
    assert [replica.is_stopped(node) for node in NODES] == [True] * 3 + [False] * 5
    assert "too many holders at once" in caplog.records[-1].__dict__["keyreeve_fields"]["detail"]
    replica.now_ns = 61 * SECOND
    replica.refuse(InvalidRequest("x"), times=10, holder=NODES[7])
    assert replica.is_stopped(NODES[7])


async def test_slow_refusals_are_forgotten(replica: Replica) -> None:
    for _ in range(100):
        replica.refuse(InvalidRequest("x"))
        replica.now_ns += 7 * SECOND
    assert not replica.is_stopped()


@pytest.mark.parametrize(
    ("config", "error", "stopped"),
    [
        ({"rate_refusals": 5}, RateExceeded("too much"), True),
        ({"rate_refusals": 5}, RateLimited("the server is busy"), False),
        ({"workload_refusals": 5}, PurposeMismatch("no"), True),
        ({"refusals": 0}, InvalidRequest("x"), False),
        ({"enabled": False}, InvalidRequest("x"), False),
    ],
)
async def test_configured(catalog: Catalog, config: dict[str, Any], error: KeyreeveError, stopped: bool) -> None:
    replica = Replica(catalog, **config)
    await replica.access.refresh()
    replica.refuse(error, times=50)
    assert replica.is_stopped() is stopped
    await replica.settle()
    replica.threads.close()


async def test_it_holds_here_while_the_catalog_is_busy_and_is_kept_later(
    replica: Replica, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, calls = catalog.put_quarantine, 0

    def busy_once(new: Quarantine) -> QuarantineEntry:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise StorageBusy("locked")
        return put(new)

    monkeypatch.setattr(catalog, "put_quarantine", busy_once)
    replica.refuse(InvalidRequest("x"), times=10)
    assert replica.is_stopped()
    await replica.settle()
    assert len(catalog.list_quarantines(limit=9)) == 1


async def test_lifted_by_an_operator_and_stopped_again_only_for_new_refusals(
    replica: Replica, catalog: Catalog
) -> None:
    replica.refuse(InvalidRequest("x"), times=15)
    await replica.settle()
    catalog.lift_quarantine(NODE, now=replica.now)
    await replica.settle()
    assert not replica.is_stopped()
    replica.refuse(InvalidRequest("x"), times=9)
    assert not replica.is_stopped()
    replica.refuse(InvalidRequest("x"))
    assert replica.is_stopped()


async def test_quarantine_outlives_a_catalog_restored_from_before_it(replica: Replica, catalog: Catalog) -> None:
    for number in range(3):
        catalog.put_grant(Grant(KeyId(f"k-{number}"), NODE, SERVER, START))
    replica.refuse(InvalidRequest("x"), times=10)
    await replica.settle()
    with catalog._engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM keyreeve_quarantines")
        connection.exec_driver_sql("UPDATE keyreeve_changes SET counter = 1")
    await replica.settle()
    assert replica.is_stopped()


class TwoReplicas(RuleBasedStateMachine):
    """Whatever operators and holders do at either replica: once both have read the catalog they agree with it, and the CA signs."""

    @initialize()
    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.directory = tempfile.TemporaryDirectory()
        url = URL.create("sqlite", database=f"{self.directory.name}/catalog.sqlite3")
        self.catalog = Catalog.open(url, busy_timeout=timedelta(seconds=5))
        self.replicas = [Replica(self.catalog, refusals=5, max_holders=100) for _ in range(2)]
        self.by_hand: set[str] = set()
        self.settle()

    def settle(self) -> None:
        async def all_of_them() -> None:
            for replica in self.replicas:
                await asyncio.gather(*replica.watch._tasks)
            for replica in self.replicas:
                await replica.access.refresh()

        self.loop.run_until_complete(all_of_them())

    @rule(which=st.integers(0, 1), holder=st.sampled_from([*NODES[:2], CA]), times=st.integers(1, 6))
    def refuse(self, which: int, holder: str, times: int) -> None:
        async def now() -> None:
            self.replicas[which].refuse(InvalidRequest("x"), times=times, holder=holder)

        self.loop.run_until_complete(now())
        if times >= 5 and holder != CA:
            assert self.replicas[which].is_stopped(holder)

    @rule(holder=st.sampled_from([*NODES[:2], CA]), seconds=st.none() | st.integers(1, 1000))
    def add(self, holder: str, seconds: int | None) -> None:
        now = self.replicas[0].now
        until = None if seconds is None else now + timedelta(seconds=seconds)
        self.catalog.put_quarantine(Quarantine(holder, Cause.OPERATOR, "r", "local", now, until))
        self.by_hand.add(holder)

    @rule(holder=st.sampled_from(NODES[:2]))
    def lift(self, holder: str) -> None:
        self.settle()
        if any(entry.quarantine.holder == holder for entry in self.catalog.list_quarantines(limit=9)):
            self.catalog.lift_quarantine(holder, now=self.replicas[0].now)
            self.settle()
            assert not any(replica.is_stopped(holder) for replica in self.replicas)

    @rule(seconds=st.integers(1, 5000))
    def pass_time(self, seconds: int) -> None:
        self.settle()
        for replica in self.replicas:
            replica.now_ns += seconds * SECOND

    @invariant()
    def replicas_agree_with_the_catalog(self) -> None:
        self.settle()
        holding = {
            entry.quarantine.holder for entry in self.catalog.list_quarantines(limit=9, holding_at=self.replicas[0].now)
        }
        for replica in self.replicas:
            assert {holder for holder in (*NODES, CA) if replica.is_stopped(holder)} == holding
        assert CA not in holding or CA in self.by_hand

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        for replica in self.replicas:
            replica.threads._pool.shutdown()
        self.catalog.close()
        self.loop.close()
        self.directory.cleanup()


TestTwoReplicas = TwoReplicas.TestCase
TestTwoReplicas.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
