"""Scheduled destruction: never early, whatever the clocks do; cancellable until it begins; gone on with after a crash."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import ApprovalRequired, FailedPrecondition, InvalidRequest, Unavailable
from keyreeve_common.grpc_edge import Peer, _current_peer
from keyreeve_common.identity import TrustDomain
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType
from keyreeve_keyserver.catalog.catalog import Catalog
from keyreeve_keyserver.catalog.records import NewKey
from keyreeve_keyserver.config import KeysConfig, KeyServerConfig
from keyreeve_keyserver.domain.keys import KeyState
from keyreeve_keyserver.frontend.access import Access, CatalogThreads
from keyreeve_keyserver.frontend.admission import Admission
from keyreeve_keyserver.frontend.engine import SigningEngine
from keyreeve_keyserver.frontend.key_life import KeyLifeService, SteadyClock
from keyreeve_keyserver.frontend.metrics import FrontEndMetrics
from keyreeve_keyserver.frontend.signer_link import SignerLink
from sqlalchemy import URL

OPEN_ADMISSION = Admission(lambda _: "", max_items=1000, max_wait_s=60.0)
START = datetime(2026, 1, 1, tzinfo=UTC)
DAY, SECOND = timedelta(days=1), timedelta(seconds=1)


class PlayedSigner:
    def __init__(self) -> None:
        self.destroyed: list[bytes] = []
        self.waits: list[int] = []
        self.away = False

    async def control(self, operation: str, *, timeout: float, **arguments: Any) -> dict[str, Any]:
        if self.away:
            raise Unavailable("gone")
        if operation == "permit_destruction":
            self.waits.append(arguments["wait_s"])
            return {"permit": base64.b64encode(b"permit").decode()}
        assert operation in ("destroy_key", "forget_key")
        if operation == "destroy_key":
            assert arguments["permit"] == base64.b64encode(b"permit").decode()
            self.destroyed.append(base64.b64decode(arguments["record"]))
        return {}


class Rig:
    """`now` is the wall clock, `passed_s` the monotonic one."""

    def __init__(self, path: Path) -> None:
        url = URL.create("sqlite", database=str(path / "catalog.sqlite3"))
        self.threads = CatalogThreads(Catalog.open(url, busy_timeout=SECOND))
        self.signer = PlayedSigner()
        self.now, self.passed_s = START, 0.0
        link = cast("SignerLink", self.signer)
        self.service = KeyLifeService(
            threads=self.threads,
            access=Access(self.threads, max_staleness=SECOND),
            link=link,
            engine=SigningEngine(
                link, self.threads, control_timeout=SECOND, metrics=FrontEndMetrics(), admission=OPEN_ADMISSION
            ),
            config=KeyServerConfig(TrustDomain("example.org"), path, path / "a", keys=KeysConfig()),
            clock=lambda: self.now,
        )
        self.service._steady = SteadyClock(lambda: self.passed_s)
        purposes = frozenset({Purpose.TLS13_SERVER_VERIFY})
        new = NewKey("r", KeyType.EC_P256, KeyRole.HANDSHAKE, purposes, "", "")
        self.key_id = KeyId(self.catalog.begin_key(new, now=START).key_id)
        self.catalog.complete_key(self.key_id, backend="b", sealed_record=b"s", spki_der=b"p", attributes={})

    @property
    def catalog(self) -> Catalog:
        return self.threads.catalog

    def disable(self) -> None:
        self.catalog.change_state(self.key_id, to=KeyState.DISABLED, from_states=(KeyState.ENABLED,))

    def wait(self, time: timedelta) -> None:
        self.now += time
        self.passed_s += time.total_seconds()

    async def state(self) -> KeyState | None:
        await self.service._reap_due()
        return self.catalog.key(self.key_id).state


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    _current_peer.set(Peer(local=True))
    rig = Rig(tmp_path)
    yield rig
    rig.threads.close()


async def test_key_is_destroyed_when_its_time_has_come(rig: Rig) -> None:
    with pytest.raises(FailedPrecondition, match="must be disabled"):
        await rig.service.schedule_destruction(rig.key_id, after=None)
    rig.disable()
    with pytest.raises(InvalidRequest, match="604800 s"):
        await rig.service.schedule_destruction(rig.key_id, after=DAY)
    pending = await rig.service.schedule_destruction(rig.key_id, after=None)
    assert (pending.state, pending.life.destroy_at) == (KeyState.PENDING_DESTRUCTION, START + 7 * DAY)
    assert rig.signer.waits == [7 * 86_400]
    rig.wait(7 * DAY - SECOND)
    assert await rig.state() is KeyState.PENDING_DESTRUCTION
    rig.wait(SECOND)
    assert await rig.state() is KeyState.DESTROYED
    assert rig.signer.destroyed == [b"s"]
    assert rig.catalog.sealed_record(rig.key_id) is None


async def test_schedule_and_cancellation_are_each_on_record_once(rig: Rig) -> None:
    noted: list[str] = []
    rig.service._engine.trail.note = lambda event, **_: noted.append(str(event))  # type: ignore[method-assign]
    rig.disable()
    await rig.service.schedule_destruction(rig.key_id, after=None)
    await rig.service.cancel_destruction(rig.key_id)
    assert noted == ["key_destruction_scheduled", "key_destruction_cancelled"]


async def test_second_call_shortens_and_lengthens_nothing(rig: Rig) -> None:
    rig.disable()
    first = await rig.service.schedule_destruction(rig.key_id, after=30 * DAY)
    assert await rig.service.schedule_destruction(rig.key_id, after=8 * DAY) == first


async def test_cancelled_key_stays(rig: Rig) -> None:
    rig.disable()
    await rig.service.schedule_destruction(rig.key_id, after=None)
    assert (await rig.service.cancel_destruction(rig.key_id)).state is KeyState.DISABLED
    rig.wait(99 * DAY)
    assert await rig.state() is KeyState.DISABLED
    assert rig.signer.destroyed == []
    await rig.service.schedule_destruction(rig.key_id, after=None)
    rig.wait(99 * DAY)
    await rig.state()
    with pytest.raises(FailedPrecondition, match="destroyed"):
        await rig.service.cancel_destruction(rig.key_id)


async def test_what_a_lost_signer_left_is_gone_on_with(rig: Rig) -> None:
    rig.disable()
    await rig.service.schedule_destruction(rig.key_id, after=None)
    rig.wait(8 * DAY)
    rig.signer.away = True
    assert await rig.state() is KeyState.DESTROYED
    assert rig.catalog.sealed_record(rig.key_id) == b"s"
    rig.signer.away = False
    await rig.state()
    assert rig.signer.destroyed == [b"s"]
    assert rig.catalog.unfinished_destructions() == []


async def test_clock_stepped_forward_destroys_nothing_early(rig: Rig) -> None:
    rig.disable()
    await rig.service.schedule_destruction(rig.key_id, after=None)
    await rig.state()
    rig.now += 400 * DAY
    assert await rig.state() is KeyState.PENDING_DESTRUCTION
    rig.wait(7 * DAY)
    assert await rig.state() is KeyState.DESTROYED


async def test_clock_stepped_back_and_mended_shortens_no_waiting_time(rig: Rig) -> None:
    await rig.state()
    rig.wait(DAY)
    rig.now -= 300 * DAY
    rig.disable()
    await rig.service.schedule_destruction(rig.key_id, after=None)
    rig.now += 300 * DAY
    assert await rig.state() is KeyState.PENDING_DESTRUCTION
    rig.wait(7 * DAY - 600 * SECOND)
    assert await rig.state() is KeyState.PENDING_DESTRUCTION


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(-(10**8), 10**8)), max_size=20))
def test_steady_clock_is_never_ahead_of_time_that_passed(steps: list[tuple[int, int]]) -> None:
    passed = [0.0]
    steady, now = SteadyClock(lambda: passed[0]), START
    steady(now)
    for waited, stepped in steps:
        passed[0] += waited
        now += timedelta(seconds=waited + stepped)
        told = steady(now)
        assert told <= now
        assert told <= START + timedelta(seconds=passed[0]) * 1.001 + SECOND


async def test_retired_keys_that_need_approvals_cost_one_question_a_round(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else thousands of them would hold up the destructions that are due, in every round of every replica."""
    monkeypatch.setattr(rig.service, "_destroys_retired", True)
    asked: list[str] = []

    async def refuse(operation: str, *, timeout: float, **_: Any) -> dict[str, Any]:
        asked.append(operation)
        raise ApprovalRequired("2 of 3")

    purposes = frozenset({Purpose.TLS13_SERVER_VERIFY})
    for number in range(5):
        new = NewKey(f"r{number}", KeyType.EC_P256, KeyRole.HANDSHAKE, purposes, "", "")
        key_id = KeyId(rig.catalog.begin_key(new, now=START).key_id)
        rig.catalog.complete_key(key_id, backend="b", sealed_record=b"s", spki_der=b"p", attributes={})
        rig.catalog.set_retirement(key_id, at=START)
    monkeypatch.setattr(rig.signer, "control", refuse)
    await rig.service._reap_due()
    assert asked.count("permit_destruction") == 1


async def test_destructions_that_fail_starve_no_other(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a token that is gone for good there may be any number."""
    purposes, destroyed = frozenset({Purpose.TLS13_SERVER_VERIFY}), 0

    async def only_last(operation: str, *, timeout: float, **arguments: Any) -> dict[str, Any]:
        nonlocal destroyed
        if operation == "destroy_key":
            if base64.b64decode(arguments["record"]) == b"gone":
                raise Unavailable("this token is away")
            destroyed += 1
        return {"permit": base64.b64encode(b"permit").decode()}

    monkeypatch.setattr(rig.signer, "control", only_last)
    ids = sorted(
        rig.catalog.begin_key(NewKey(f"r{n}", KeyType.EC_P256, KeyRole.HANDSHAKE, purposes, "", ""), now=START).key_id
        for n in range(103)
    )
    for key_id in ids:
        record = b"good" if key_id == ids[-1] else b"gone"
        rig.catalog.complete_key(key_id, backend="b", sealed_record=record, spki_der=b"p", attributes={})
        rig.catalog.change_state(key_id, to=KeyState.DISABLED, from_states=(KeyState.ENABLED,))
        rig.catalog.schedule_destruction(key_id, at=START, permit=b"p")
    await rig.service._reap_due()
    assert destroyed == 1
