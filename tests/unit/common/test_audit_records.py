"""Audit records have one encoding each, hold to their bounds, and are readable for programs that know fewer names."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import CODE_BY_WIRE, InvalidRequest
from keyreeve_common.purposes import Purpose
from keyreeve_common.transparency.records import (
    MAX_RECORD_BYTES,
    AuditRecord,
    Event,
    Mark,
    Source,
    marks_of,
    microseconds,
    parse_record,
    signature_entries,
)

PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=60)
NAMES = st.from_regex(r"\A[a-z][a-z0-9_]{0,31}\Z")
HASHES = st.sampled_from([b"", bytes(32), bytes(range(32))])
RECORDS = st.builds(
    AuditRecord,
    time_us=st.integers(0, 253_402_300_799_999_999),
    source=st.sampled_from(Source),
    event=NAMES,
    request_id=st.binary(min_size=16, max_size=16),
    caller=PRINTABLE,
    key_id=st.from_regex(r"\A[a-z0-9-]{0,64}\Z"),
    purpose=st.integers(0, 255),
    scheme=st.integers(0, 65_535),
    code=st.integers(0, 255),
    marks=st.sampled_from([Mark(0), Mark.DIGEST, Mark.AUTHORITY, Mark.DIGEST | Mark.AUTHORITY]),
    message_hash=HASHES,
    signature_hash=HASHES,
    details=st.dictionaries(NAMES, PRINTABLE, max_size=16).map(lambda found: tuple(sorted(found.items()))),
)
SIGNATURE = AuditRecord(
    time_us=1_700_000_000_123_456,
    source=Source.SIGNER,
    event=Event.SIGNATURE.value,
    request_id=bytes(range(16)),
    caller="spiffe://example.org/agent/a",
    key_id="key-1",
    purpose=1,
    scheme=0x0403,
    message_hash=bytes(32),
    signature_hash=bytes(32),
)


@given(st.lists(st.tuples(RECORDS, st.booleans()), max_size=4), st.integers(0, 253_402_300_799_999_999))
def test_records_of_signatures_made_in_bulk_are_those_records(
    drawn: list[tuple[AuditRecord, bool]], time_us: int
) -> None:
    expected = [
        dataclasses.replace(
            record,
            time_us=time_us,
            source=Source.SIGNER,
            event="signature",
            code=0,
            marks=marks_of(record.purpose, authority_key=authority_key),
            message_hash=bytes(range(32)),
            signature_hash=bytes(32),
            details=(),
        )
        for record, authority_key in drawn
    ]
    entries = signature_entries(
        time_us,
        [(record.caller, record.key_id, record.purpose, record.scheme, authority) for record, authority in drawn],
        request_ids=[record.request_id for record, _ in drawn],
        message_hashes=[bytes(range(32))] * len(drawn),
        signature_hashes=[bytes(32)] * len(drawn),
    )
    assert entries == [record.to_bytes() for record in expected]


@given(RECORDS)
def test_record_comes_back(record: AuditRecord) -> None:
    data = record.to_bytes()
    assert len(data) <= MAX_RECORD_BYTES
    assert parse_record(data) == record


@given(RECORDS, st.data())
def test_changed_record_is_refused_or_another_record(record: AuditRecord, data: st.DataObject) -> None:
    encoded = bytearray(record.to_bytes())
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    try:
        parsed = parse_record(bytes(encoded))
    except InvalidRequest:
        return
    assert parsed != record
    assert parsed.to_bytes() == bytes(encoded)


def test_layout_is_that_of_the_page() -> None:
    """docs/protocol/audit-log.md "Record"."""
    assert SIGNATURE.to_bytes().hex() == (
        "01" + (1_700_000_000_123_456).to_bytes(8, "big").hex() + "01" + "00"
        "09" + b"signature".hex() + bytes(range(16)).hex() + "001c" + b"spiffe://example.org/agent/a".hex()
        + "05" + b"key-1".hex() + "01" + "0403" + "00" + "20" + "00" * 32 + "20" + "00" * 32 + "00"
    )  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"event": "Signature"},
        {"event": ""},
        {"event": "a" * 33},
        {"caller": "a\nb"},
        {"key_id": "UPPER"},
        {"message_hash": bytes(31)},
        {"details": (("b", ""), ("a", ""))},
        {"details": (("a", ""), ("a", ""))},
        {"details": (("a", "\x1b[31m"),)},
        {"details": tuple((f"a{n:02}", "x" * 2048) for n in range(16))},
        {"time_us": 2**63},
    ],
    ids="-".join,
)
def test_other_forms_are_refused(wrong: dict[str, Any]) -> None:
    fields = {name: getattr(SIGNATURE, name) for name in AuditRecord.__dataclass_fields__}
    with pytest.raises(InvalidRequest, match="record"):
        parse_record(AuditRecord(**{**fields, **wrong}).to_bytes())


def test_every_byte_counts() -> None:
    data = SIGNATURE.to_bytes()
    for cut in range(len(data)):
        with pytest.raises(InvalidRequest):
            parse_record(data[:cut])
    with pytest.raises(InvalidRequest, match="after the end"):
        parse_record(data + b"\x00")
    with pytest.raises(InvalidRequest, match="version"):
        parse_record(b"\x02" + data[1:])


def test_unknown_numbers_are_shown_as_such() -> None:
    record = AuditRecord(time_us=0, source=Source.SIGNER, event="from_the_future", purpose=200, scheme=0x9999, code=254)
    assert parse_record(record.to_bytes()) == record
    assert (record.purpose_label, record.scheme_label, record.result) == ("200", "0x9999", "254")


def test_labels() -> None:
    assert SIGNATURE.result == "ok"
    assert SIGNATURE.purpose_label == "tls13_server_verify"
    assert SIGNATURE.scheme_label == "ecdsa_secp256r1_sha256"
    assert SIGNATURE.time == datetime(2023, 11, 14, 22, 13, 20, 123_456, tzinfo=UTC)
    assert microseconds(SIGNATURE.time) == SIGNATURE.time_us
    assert AuditRecord(time_us=0, source=Source.SIGNER, event="refusal", code=45).result == CODE_BY_WIRE[45].value


def test_digests_and_authorities_are_marked() -> None:
    assert marks_of(Purpose.DIGEST) == Mark.DIGEST
    assert marks_of(Purpose.DIGEST, authority_key=True) == Mark.DIGEST | Mark.AUTHORITY
    for purpose in (Purpose.X509_CERTIFICATE, Purpose.X509_CRL, Purpose.OCSP_RESPONSE, Purpose.JWT_SVID):
        assert marks_of(purpose) == Mark.AUTHORITY
    assert marks_of(Purpose.CERTIFICATE_REQUEST, authority_key=True) == Mark.AUTHORITY
    assert marks_of(Purpose.TLS13_SERVER_VERIFY) == Mark(0)
