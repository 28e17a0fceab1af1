"""Records of what the signer did and of what the front end reports. Pure: times come in."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import TypeVar

from keyreeve_common.errors import ErrorCode, InvalidRequest, KeyreeveError
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import AUTHORITY_ROLES
from keyreeve_common.trace import REQUEST_ID_BYTES
from keyreeve_common.transparency.records import (
    NO_REQUEST_ID,
    AuditRecord,
    Event,
    Mark,
    Source,
    check_record,
    marks_of,
    parse_record,
    signature_entries,
)

from keyreeve_keyserver.audit.hashes import sha256_each
from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_keyserver.frames import JsonObject, SignItem

MAX_EVENTS = 256
_SIGNERS_OWN = frozenset({Event.SIGNATURE, Event.LOG_STARTED, Event.LOG_REPAIRED})
_TEXTS = frozenset({"event", "request_id", "caller", "key_id", "message_hash"})
_NUMBERS = frozenset({"purpose", "scheme", "code"})
T = TypeVar("T")


class SignRecords:
    """What is recorded of the items of one batch.

    `authorities` says of the keys that were loaded when their items were judged whether they are an authority's: a key may be forgotten
    before its results are recorded.
    """

    def __init__(self, caller: str) -> None:
        self._caller = caller
        self.authorities: dict[KeyId, bool] = {}

    def of_signatures(self, items: Sequence[SignItem], signatures: list[bytes], *, time_us: int) -> list[bytes]:
        """One record for each of these items, whose signatures are these."""
        caller, authorities = self._caller, self.authorities
        return signature_entries(
            time_us,
            [(caller, item.key_id, item.purpose, item.scheme, authorities[item.key_id]) for item in items],
            request_ids=[item.trace[:REQUEST_ID_BYTES] for item in items],
            message_hashes=sha256_each([item.message for item in items]),
            signature_hashes=sha256_each(signatures),
        )

    def of_refusals(self, refused: Sequence[tuple[SignItem, KeyreeveError]], *, time_us: int) -> list[bytes]:
        """One record for each but `key_not_found` of a key that is not loaded: that is no decision, and the item comes again."""
        return [
            self._refusal(item, error, time_us)
            for item, error in refused
            if error.code is not ErrorCode.KEY_NOT_FOUND or item.key_id in self.authorities
        ]

    def _refusal(self, item: SignItem, error: KeyreeveError, time_us: int) -> bytes:
        return AuditRecord(
            time_us=time_us,
            source=Source.SIGNER,
            event=Event.REFUSAL.value,
            request_id=item.trace[:REQUEST_ID_BYTES],
            caller=self._caller,
            key_id=item.key_id,
            purpose=item.purpose,
            scheme=item.scheme,
            code=error.rendering.wire,
            marks=marks_of(item.purpose, authority_key=self.authorities.get(item.key_id, False)),
            message_hash=sha256(item.message).digest(),
        ).to_bytes()


def key_record(event: Event, record: KeyRecord, *, time_us: int) -> AuditRecord:
    """What the signer did with a key."""
    return AuditRecord(
        time_us=time_us,
        source=Source.SIGNER,
        event=event.value,
        key_id=record.key_id,
        marks=Mark.AUTHORITY if record.role in AUTHORITY_ROLES else Mark(0),
        details=(
            ("backend", record.backend),
            ("key_type", record.key_type.value),
            ("purposes", ",".join(sorted(purpose.label for purpose in record.purposes))),
            ("role", record.role.value),
            ("spki_sha256", sha256(record.spki_der).hexdigest()),
        ),
    )


def front_end_records(events: object, *, time_us: int) -> list[AuditRecord]:
    """The records that the front end asks for (docs/protocol/signer-frames.md `record`). Raises: InvalidRequest."""
    if not isinstance(events, list) or not 1 <= len(events) <= MAX_EVENTS:
        raise InvalidRequest(f"events: a list of 1 to {MAX_EVENTS} is expected")
    return [_front_end_record(event, time_us) for event in events]


def _front_end_record(event: object, time_us: int) -> AuditRecord:
    if not isinstance(event, dict) or event.keys() - _TEXTS - _NUMBERS - {"details"} or "event" not in event:
        raise InvalidRequest("events: an object of the known members, `event` among them, is expected")
    texts = {name: _typed(event, name, str, "") for name in _TEXTS}
    numbers = {name: _typed(event, name, int, 0) for name in _NUMBERS}
    details = _typed(event, "details", dict, {})
    if texts["event"] in _SIGNERS_OWN:
        raise InvalidRequest(f"events: {texts['event']} is the signer's own")
    try:
        record = AuditRecord(
            time_us=time_us,
            source=Source.FRONT_END,
            event=texts["event"],
            request_id=bytes.fromhex(texts["request_id"]) or NO_REQUEST_ID,
            caller=texts["caller"],
            key_id=texts["key_id"],
            marks=marks_of(numbers["purpose"]),
            message_hash=bytes.fromhex(texts["message_hash"]),
            details=tuple(sorted((str(name), str(value)) for name, value in details.items())),
            purpose=numbers["purpose"],
            scheme=numbers["scheme"],
            code=numbers["code"],
        )
    except ValueError:
        raise InvalidRequest("events: request_id or message_hash is not hexadecimal") from None
    return parse_record(check_record(record).to_bytes())


def _typed(event: JsonObject, name: str, kind: type[T], default: T) -> T:
    value = event.get(name, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InvalidRequest(f"events: {name} is not of its kind")
    return value
