"""No result leaves the signer before its record, and none leaves when there can be no record."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, cast

import pytest
from keyreeve_common.errors import AuditUnavailable, ErrorCode, InvalidRequest
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.transparency.records import AuditRecord, Event, Mark, Source
from keyreeve_keyserver.backends.software import SoftwareBackend
from keyreeve_keyserver.domain.secret import Secret
from keyreeve_keyserver.frames import Control, Refused, SignBatch, Signed, SignItem, SignResult, SignResults
from keyreeve_keyserver.signer.controls import ControlService
from keyreeve_keyserver.signer.judging import KeyTable
from keyreeve_keyserver.signer.sealing import PassphraseKey, Sealer
from keyreeve_keyserver.signer.service import SigningService
from keyreeve_testing.audit import MemoryAuditLog

MESSAGE = build_tls13_content(Purpose.TLS13_SERVER_VERIFY, bytes(32))
CALLER = "spiffe://example.org/agent/a"
REQUEST_ID = bytes(range(16))
NEW_KEY = {"key_id": "web", "key_type": "ec-p256", "role": "handshake", "purposes": ["tls13_server_verify"]}


class Signer:
    def __init__(self, audit: MemoryAuditLog) -> None:
        self.backend = SoftwareBackend("software", threads=1)
        backends, keys = {"software": self.backend}, KeyTable()
        now = lambda: datetime(2026, 1, 1, tzinfo=UTC)  # noqa: E731
        sealer = Sealer(PassphraseKey(Secret(bytes(32))))
        self.signing = SigningService(cast("Any", backends), keys, now=now, max_message=65_536, audit=audit)
        self.controls = ControlService(
            cast("Any", backends), keys, sealer, default_backend="software", now=now, audit=audit
        )

    async def control(self, op: str, **arguments: Any) -> dict[str, Any]:
        return await self.controls.run(Control(1, op, arguments))

    async def make_key(self) -> str:
        await self.backend.start()
        record: str = (await self.control("create_key", **NEW_KEY))["record"]
        await self.control("load_key", record=record)
        return record

    async def sign(self, *items: SignItem) -> list[SignResult]:
        batch = SignBatch(1, CALLER, items)
        return [
            result
            async for frame in self.signing.sign(batch)
            if isinstance(frame, SignResults)
            for result in frame.results
        ]


@pytest.fixture
def audit() -> MemoryAuditLog:
    return MemoryAuditLog()


def item(number: int, key: str = "web", *, message: bytes = MESSAGE) -> SignItem:
    return SignItem(number, KeyId(key), 0x0403, 1, 5_000, message, REQUEST_ID + bytes(9))


async def test_signature_and_refusal_are_recorded_with_hashes_only(audit: MemoryAuditLog) -> None:
    signer = Signer(audit)
    await signer.make_key()
    audit.records.clear()
    results = {result.id: result for result in await signer.sign(item(1), item(2, message=b"no handshake"))}
    found = {record.event: record for record in audit.records}
    assert set(found) == {"signature", "refusal"}
    signed = results[1]
    assert isinstance(signed, Signed)
    assert found["signature"] == AuditRecord(
        time_us=1_767_225_600_000_000,
        source=Source.SIGNER,
        event="signature",
        request_id=REQUEST_ID,
        caller=CALLER,
        key_id="web",
        purpose=1,
        scheme=0x0403,
        message_hash=sha256(MESSAGE).digest(),
        signature_hash=sha256(signed.signature).digest(),
    )
    assert found["refusal"].result == "purpose_mismatch"
    assert found["refusal"].message_hash == sha256(b"no handshake").digest()
    assert not any(MESSAGE in record.to_bytes() or signed.signature in record.to_bytes() for record in audit.records)


async def test_unloaded_key_is_no_decision_and_is_not_recorded(audit: MemoryAuditLog) -> None:
    signer = Signer(audit)
    (result,) = await signer.sign(item(1))
    assert isinstance(result, Refused)
    assert result.error.code is ErrorCode.KEY_NOT_FOUND
    assert audit.records == []


async def test_nothing_leaves_that_cannot_be_recorded(audit: MemoryAuditLog) -> None:
    signer = Signer(audit)
    await signer.make_key()
    audit.fail = True
    results = await signer.sign(item(1), item(2, message=b"no handshake"))
    assert [type(result) for result in results] == [Refused, Refused]
    assert {result.error.code for result in results if isinstance(result, Refused)} == {ErrorCode.AUDIT_UNAVAILABLE}
    assert all(isinstance(result, Refused) and result.error.retry_after for result in results)
    audit.fail = False
    (result,) = await signer.sign(item(3))
    assert isinstance(result, Signed)


async def test_key_that_is_forgotten_meanwhile_keeps_its_mark(audit: MemoryAuditLog) -> None:
    """An owned front end has an authority's key forgotten before its batch is recorded: the records bear their mark all the same."""
    signer = Signer(audit)
    await signer.backend.start()
    authority = {"role": "jwt-authority", "purposes": ["jwt_svid"]}
    profile = {"trust_domain": "example.org", "max_ttl_s": 300}
    made = await signer.control("create_key", **{**NEW_KEY, **authority}, jwt_profile=profile)
    await signer.control("load_key", record=made["record"])
    audit.records.clear()
    signing = asyncio.create_task(signer.sign(*(item(number) for number in range(40))))
    await asyncio.sleep(0)  # the first of them are judged
    await signer.control("forget_key", key_id="web")
    codes = {result.error.code for result in await signing if isinstance(result, Refused)}
    assert codes == {ErrorCode.PURPOSE_NOT_PERMITTED, ErrorCode.KEY_NOT_FOUND}
    refusals = [record for record in audit.records if record.result == "purpose_not_permitted"]
    assert {record.marks for record in refusals} == {Mark.AUTHORITY}


async def test_the_record_comes_first() -> None:
    """While the log is written, nothing is answered."""

    class SlowLog(MemoryAuditLog):
        def __init__(self) -> None:
            super().__init__()
            self.go = asyncio.Event()
            self.asked = asyncio.Event()

        async def append(self, entries: Sequence[bytes]) -> None:
            self.asked.set()
            await self.go.wait()
            await super().append(entries)

    audit = SlowLog()
    audit.go.set()
    signer = Signer(audit)
    await signer.make_key()
    audit.go.clear()
    audit.asked.clear()
    signing = asyncio.create_task(signer.sign(item(1)))
    await audit.asked.wait()
    assert not signing.done()
    audit.go.set()
    assert isinstance((await signing)[0], Signed)


async def test_keys_are_recorded_and_one_that_cannot_be_is_not_given_out(audit: MemoryAuditLog) -> None:
    signer = Signer(audit)
    record = await signer.make_key()
    assert [found.event for found in audit.records] == ["key_created"]
    assert dict(audit.records[0].details)["key_type"] == "ec-p256"
    await signer.control("destroy_key", record=record)
    assert [found.event for found in audit.records] == [
        Event.KEY_CREATED,
        Event.KEY_DESTROY_REQUESTED,
        Event.KEY_DESTROYED,
    ]
    audit.fail = True
    with pytest.raises(AuditUnavailable):
        await signer.control("create_key", **{**NEW_KEY, "key_id": "other"})


async def test_a_key_is_not_destroyed_without_a_record(audit: MemoryAuditLog) -> None:
    signer = Signer(audit)
    record = await signer.make_key()
    audit.fail = True
    with pytest.raises(AuditUnavailable):
        await signer.control("destroy_key", record=record)
    audit.fail = False
    await signer.control("load_key", record=record)
    assert isinstance((await signer.sign(item(1)))[0], Signed)


async def test_the_front_ends_events_are_marked_as_its_word(audit: MemoryAuditLog) -> None:
    events = [
        {"event": "grant_created", "caller": CALLER, "key_id": "web", "details": {"holder": CALLER, "a": "1"}},
        {"event": "refusal", "code": 20, "purpose": 10, "request_id": "ab" * 16, "message_hash": "cd" * 32},
    ]
    assert await Signer(audit).control("record", events=events) == {"recorded": 2}
    grant, refusal = audit.records
    assert grant.source is refusal.source is Source.FRONT_END
    assert grant.details == (("a", "1"), ("holder", CALLER))
    assert (refusal.result, refusal.purpose_label, refusal.marks.name) == ("key_not_found", "digest", "DIGEST")
    assert refusal.request_id == bytes.fromhex("ab" * 16)


@pytest.mark.parametrize(
    "events",
    [
        None,
        [],
        [{}],
        ["text"],
        [{"event": "signature"}],
        [{"event": "log_repaired"}],
        [{"event": "Bad Name"}],
        [{"event": "a", "unknown": 1}],
        [{"event": "a", "code": 256}],
        [{"event": "a", "code": True}],
        [{"event": "a", "purpose": -1}],
        [{"event": "a", "scheme": 70_000}],
        [{"event": "a", "caller": "ä"}],
        [{"event": "a", "key_id": "Not One"}],
        [{"event": "a", "request_id": "zz"}],
        [{"event": "a", "request_id": "ab"}],
        [{"event": "a", "message_hash": "ab"}],
        [{"event": "a", "details": []}],
        [{"event": "a", "details": {"n": "x\ny"}}],
        [{"event": "a", "details": {f"n{n}": "" for n in range(17)}}],
        [{"event": "a"}] * 257,
    ],
)
async def test_events_of_another_form_are_refused(audit: MemoryAuditLog, events: object) -> None:
    with pytest.raises(InvalidRequest):
        await Signer(audit).control("record", events=events)
    assert audit.records == []


async def test_without_a_log_everything_goes_on() -> None:
    signer = Signer(cast("MemoryAuditLog", None))
    record = await signer.make_key()
    assert isinstance((await signer.sign(item(1)))[0], Signed)
    assert await signer.control("record", events=[{"event": "grant_created"}]) == {"recorded": 0}
    assert (await signer.control("health"))["audit"]["state"] == "off"
    assert base64.b64decode(record)
