"""Records of what the signer did and of what the front end reports. Pure: times come in."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import TypeVar

from keyreeve_common.errors import ErrorCode, InvalidRequest
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
from keyreeve_keyserver.frames import JsonObject, Refused, SignBatch, Signed, SignResult

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

    def __init__(self, batch: SignBatch) -> None:
        self._caller = batch.caller
        self._items = {item.id: item for item in batch.items}
        self.authorities: dict[KeyId, bool] = {}

    def entries(self, results: Sequence[SignResult], *, time_us: int) -> list[bytes]:
        """One record for each result but those that say `key_not_found` of a key that is not loaded: no decision, and the item comes again."""
        signed = [result for result in results if isinstance(result, Signed)]
        entries = self._signatures(signed, time_us)
        if len(signed) < len(results):
            entries += [self._refusal(result, time_us) for result in results if self._is_decided_refusal(result)]
        return entries

    def _signatures(self, results: Sequence[Signed], time_us: int) -> list[bytes]:
        caller, authorities = self._caller, self.authorities
        items = list(map(self._items.__getitem__, [result.id for result in results]))
        uses = [(caller, item.key_id, item.purpose, item.scheme, authorities[item.key_id]) for item in items]
        return signature_entries(
            time_us,
            uses,
            request_ids=[item.trace[:REQUEST_ID_BYTES] for item in items],
            message_hashes=sha256_each([item.message for item in items]),
            signature_hashes=sha256_each([result.signature for result in results]),
        )

    def _is_decided_refusal(self, result: SignResult) -> bool:
        if isinstance(result, Signed):
            return False
        return result.error.code is not ErrorCode.KEY_NOT_FOUND or self._items[result.id].key_id in self.authorities

    def _refusal(self, result: SignResult, time_us: int) -> bytes:
        item = self._items[result.id]
        return AuditRecord(
            time_us=time_us,
            source=Source.SIGNER,
            event=Event.REFUSAL.value,
            request_id=item.trace[:REQUEST_ID_BYTES],
            caller=self._caller,
            key_id=item.key_id,
            purpose=item.purpose,
            scheme=item.scheme,
            code=result.error.rendering.wire if isinstance(result, Refused) else 0,
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
