"""The permit to destroy one key, not before a time: a sealed note that the front end keeps through the waiting time.

The signer has no store and follows no catalog, so what it once agreed to comes back to it in this form. It names the key by id and public key,
and fits no other. Sealed under the key-encryption key: every replica's signer honours it, and nobody else writes one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256

from keyreeve_common.errors import FailedPrecondition, SealedRecordInvalid
from keyreeve_common.strict_json import canonical_json

from keyreeve_keyserver.domain.keys import KeyRecord

MAX_WAIT_SECONDS = 10 * 366 * 86_400
_KIND = "destruction-permit"
_TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True)
class DestructionPermit:
    """`not_before` is whole seconds, aware UTC, by the clock of the signer that gave the permit."""

    key_id: str
    spki_sha256: str
    not_before: datetime

    @classmethod
    def of(cls, record: KeyRecord, *, not_before: datetime) -> DestructionPermit:
        whole = not_before.astimezone(UTC).replace(microsecond=0)
        return cls(record.key_id, sha256(record.spki_der).hexdigest(), whole)

    @classmethod
    def parse(cls, note: bytes) -> DestructionPermit:
        """Raises: SealedRecordInvalid for a note that is something else."""
        try:
            fields = json.loads(note)
            if fields.pop("kind") != _KIND:
                raise ValueError("another kind of note")
            not_before = datetime.strptime(fields.pop("not_before"), _TIME).replace(tzinfo=UTC)
            permit = cls(not_before=not_before, **fields)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise SealedRecordInvalid("the note is no permit to destroy a key") from None
        if permit.to_bytes() != note:
            raise SealedRecordInvalid("the permit is not in canonical form")
        return permit

    def to_bytes(self) -> bytes:
        return canonical_json(
            {
                "kind": _KIND,
                "key_id": self.key_id,
                "spki_sha256": self.spki_sha256,
                "not_before": self.not_before.strftime(_TIME),
            }
        )

    def check(self, record: KeyRecord, *, now: datetime) -> None:
        """Raises: SealedRecordInvalid for another key's permit; FailedPrecondition before its time."""
        if (self.key_id, self.spki_sha256) != (record.key_id, sha256(record.spki_der).hexdigest()):
            raise SealedRecordInvalid("the permit is for another key")
        if now < self.not_before:
            raise FailedPrecondition(f"the waiting time of this destruction ends at {self.not_before.isoformat()}")
