"""What the front end sees reaches the signer's log; what gives power waits for it, what takes power away does not."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from keyreeve_common.errors import (
    AuditUnavailable,
    FailedPrecondition,
    InvalidRequest,
    KeyNotFound,
    KeyreeveError,
    Unavailable,
)
from keyreeve_common.transparency.records import Event
from keyreeve_keyserver.audit.events import front_end_records
from keyreeve_keyserver.frames import Control
from keyreeve_keyserver.frontend import audit_trail
from keyreeve_keyserver.frontend.audit_trail import MAX_REFUSALS_PER_S, AuditTrail
from keyreeve_keyserver.frontend.signer_link import SignerLink

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CALLER = "spiffe://example.org/agent/a"


class FakeLink:
    """Takes `record` as the signer does, or refuses."""

    def __init__(self) -> None:
        self.capabilities: dict[str, Any] = {"audit": True}
        self.error: KeyreeveError | None = None
        self.events: list[dict[str, Any]] = []
        self.calls = 0

    async def control(self, operation: str, *, timeout: float, events: list[dict[str, Any]]) -> dict[str, Any]:
        assert operation == "record"
        self.calls += 1
        if self.error is not None:
            raise self.error
        front_end_records(events, time_us=0)
        self.events += events
        return {"recorded": len(events)}


@pytest.fixture
def link() -> FakeLink:
    return FakeLink()


@pytest.fixture
def trail(link: FakeLink) -> AuditTrail:
    return AuditTrail(cast("SignerLink", link), lambda: NOW)


def refuse(trail: AuditTrail, **changes: Any) -> None:
    fields: dict[str, Any] = {
        "key_id": "k",
        "purpose": 1,
        "scheme": 0x0403,
        "trace": bytes(range(25)),
        "message": b"message",
        **changes,
    }
    trail.refusal(CALLER, KeyNotFound(), **fields)


async def test_refusal_is_sent_with_hash_and_request_id(trail: AuditTrail, link: FakeLink) -> None:
    refuse(trail)
    await trail.flush(within_s=5)
    assert link.events == [
        {
            "event": "refusal",
            "caller": CALLER,
            "key_id": "k",
            "purpose": 1,
            "scheme": 0x0403,
            "code": 20,
            "request_id": bytes(range(16)).hex(),
            "message_hash": "ab530a13e45914982b79f9b7e3fba994cfd1f3fb22f71cea1afbf02b460c6d1d",
        }
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"key_id": "Not\nOne"},
        {"key_id": "é" * 5_000},
        {"purpose": 70_000},
        {"scheme": 2**31},
        {"purpose": -1},
        {"trace": b"short"},
        {"message": b""},
    ],
)
async def test_no_request_spoils_its_record(trail: AuditTrail, link: FakeLink, changes: dict[str, Any]) -> None:
    refuse(trail, **changes)
    await trail.flush(within_s=5)
    (event,) = link.events
    assert event["caller"] == CALLER
    assert event["code"] == 20


async def test_noted_events_wait_for_the_log_and_say_when_they_were_seen(
    trail: AuditTrail, link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_trail, "_RETRY_S", 0.01)
    monkeypatch.setattr(audit_trail, "_LATE_S", 0.0)
    link.error = AuditUnavailable("full")
    running = asyncio.create_task(trail.run())
    trail.note(Event.GRANT_REVOKED, caller=CALLER, key_id="k", holder="spiffe://example.org/b")
    async with asyncio.timeout(20):
        while link.calls < 3:
            await asyncio.sleep(0.01)
        assert link.events == []
        link.error = None
        while not link.events:
            await asyncio.sleep(0.01)
    running.cancel()
    assert link.events[0]["details"] == {
        "holder": "spiffe://example.org/b",
        "seen_at": "2026-01-01T00:00:00.000+00:00",
    }


async def test_what_gives_power_is_refused_without_a_record(trail: AuditTrail, link: FakeLink) -> None:
    done: list[str] = []

    async def grant() -> None:
        async with trail.recorded(Event.GRANT_CREATED, caller=CALLER, key_id="k"):
            done.append("granted")

    for error in (AuditUnavailable("full"), Unavailable("away", retry_after=timedelta(seconds=1))):
        link.error = error
        with pytest.raises(AuditUnavailable):
            await grant()
    assert done == []
    link.error = None
    await grant()
    assert (done, [event["event"] for event in link.events]) == (["granted"], ["grant_created"])


async def test_what_failed_after_its_record_is_recorded_as_failed(trail: AuditTrail, link: FakeLink) -> None:
    async def enable() -> None:
        async with trail.recorded(Event.KEY_ENABLED, caller=CALLER, key_id="k"):
            raise FailedPrecondition("it is destroyed")

    with pytest.raises(FailedPrecondition):
        await enable()
    await trail.flush(within_s=5)
    assert [(event["event"], event.get("code", 0)) for event in link.events] == [("key_enabled", 0), ("key_enabled", 6)]


async def test_signer_without_a_log_holds_up_nothing(trail: AuditTrail, link: FakeLink) -> None:
    link.capabilities = {}
    await trail.require(Event.GRANT_CREATED, caller=CALLER)
    trail.note(Event.GRANT_REVOKED)
    await trail.flush(within_s=5)
    assert link.calls == 0
    nowhere = AuditTrail()
    await nowhere.require(Event.GRANT_CREATED)
    nowhere.note(Event.GRANT_REVOKED)
    refuse(nowhere)
    await nowhere.flush(within_s=5)


async def test_flood_of_refusals_becomes_a_count(trail: AuditTrail, link: FakeLink) -> None:
    for _ in range(MAX_REFUSALS_PER_S + 1_000):
        refuse(trail)
    await trail.flush(within_s=5)
    assert len(link.events) == MAX_REFUSALS_PER_S + 1
    assert link.events[-1]["details"] == {"count": "1000"}


async def test_more_than_can_be_kept_is_dropped_and_counted(
    trail: AuditTrail, link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_trail, "MAX_WAITING", 10)
    for number in range(25):
        trail.note("some_event", number=number)
    await trail.flush(within_s=5)
    assert [event["event"] for event in link.events] == ["some_event"] * 10 + ["records_dropped"]
    assert link.events[-1]["details"] == {"count": "15"}


async def test_event_that_the_signer_refuses_holds_up_no_other(trail: AuditTrail, link: FakeLink) -> None:
    trail.note("Not an event")
    link.error = InvalidRequest("no")
    await trail.flush(within_s=5)
    link.error = None
    trail.note("an_event")
    await trail.flush(within_s=5)
    assert [event["event"] for event in link.events] == ["an_event"]


async def test_last_flush_sends_nothing_twice(trail: AuditTrail, link: FakeLink) -> None:
    """The stop comes while a batch is under way."""
    under_way, go = asyncio.Event(), asyncio.Event()
    control = link.control

    async def slow(*arguments: Any, **options: Any) -> dict[str, Any]:
        under_way.set()
        await go.wait()
        return await control(*arguments, **options)

    link.control = slow  # type: ignore[method-assign]
    running = asyncio.create_task(trail.run())
    trail.note(Event.GRANT_REVOKED, caller=CALLER)
    await under_way.wait()
    flushing = asyncio.create_task(trail.flush(within_s=20))
    await asyncio.sleep(0)
    go.set()
    await flushing
    running.cancel()
    assert [event["event"] for event in link.events] == ["grant_revoked"]


async def test_flood_of_long_made_up_key_ids_takes_no_other_record_with_it(
    trail: AuditTrail, link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backslash is two bytes in JSON: 256 of the longest details pass the bound of a control frame."""
    monkeypatch.setattr(audit_trail, "MAX_REFUSALS_PER_S", 1000)
    take = link.control

    async def framed(operation: str, *, timeout: float, events: list[dict[str, Any]]) -> dict[str, Any]:
        Control(1, operation, {"events": events}).to_bytes()
        return await take(operation, timeout=timeout, events=events)

    monkeypatch.setattr(link, "control", framed)
    for _ in range(300):
        refuse(trail, key_id="\\" * 70_000)
    trail.note(Event.GRANT_REVOKED, caller=CALLER, holder=CALLER)
    await trail.flush(within_s=10)
    assert len(link.events) == 301
    assert link.events[-1]["event"] == "grant_revoked"


async def test_event_that_the_signer_refuses_is_the_only_one_that_is_lost(trail: AuditTrail, link: FakeLink) -> None:
    for number in range(5):
        trail.note(Event.KEY_DISABLED, key_id=f"k-{number}")
    trail.note(Event.SIGNATURE, caller=CALLER)  # the signer's own
    trail.note(Event.GRANT_REVOKED, caller=CALLER)
    await trail.flush(within_s=5)
    assert [event["event"] for event in link.events] == ["key_disabled"] * 5 + ["grant_revoked"]
