"""Which keys are loaded, and what they may sign. Pure: times come in.

What a key may do for a purpose with a scheme never changes while it is loaded, so it is settled once and kept with the key: each message costs a
look-up and the comparison of its form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from keyreeve_common.errors import DeadlineExceeded, KeyNotFound
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import AUTHORITY_ROLES, Purpose

from keyreeve_keyserver.backends.ports import SignRequest
from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_keyserver.domain.purposes import Rule, check_length, rule_for
from keyreeve_keyserver.frames import SignItem


@dataclass(slots=True)
class LoadedKey:
    """A record and the rules that were asked for so far; `lane` is the work that its signatures go with: backend and type of key."""

    record: KeyRecord
    lane: str = field(init=False)
    is_authority: bool = field(init=False)
    _rules: dict[tuple[int, int], Rule] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.lane = f"{self.record.backend}/{self.record.key_type.value}"
        self.is_authority = self.record.role in AUTHORITY_ROLES

    def rule(self, purpose: int, scheme: int) -> Rule:
        """Raises: PurposeNotPermitted, SchemeNotSupported."""
        asked = (purpose, scheme)
        rule = self._rules.get(asked)
        if rule is None:  # refusals are not kept, so what is kept is bounded by purposes and schemes
            rule = self._rules[asked] = rule_for(self.record, purpose=purpose, scheme=scheme)
        return rule


class KeyTable:
    """The loaded keys: their records only. What is secret of them is in their backend."""

    def __init__(self) -> None:
        self._keys: dict[KeyId, LoadedKey] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, key_id: KeyId) -> KeyRecord | None:
        loaded = self._keys.get(key_id)
        return loaded.record if loaded else None

    def loaded(self, key_id: KeyId) -> LoadedKey | None:
        return self._keys.get(key_id)

    def put(self, record: KeyRecord) -> None:
        self._keys[record.key_id] = LoadedKey(record)

    def remove(self, key_id: KeyId) -> KeyRecord | None:
        loaded = self._keys.pop(key_id, None)
        return loaded.record if loaded else None


def judge_item(
    item: SignItem, loaded: LoadedKey | None, *, received: float, now: datetime, max_message: int
) -> tuple[SignRequest, Rule]:
    """The request to hand to a backend, and the rule that lets it through. Order: length, key, role and purpose, scheme, form.

    Raises: MessageTooLarge, KeyNotFound, PurposeNotPermitted, SchemeNotSupported, PurposeMismatch, ProfileViolation, DeadlineExceeded.
    """
    message = item.message
    if len(message) > max_message:
        check_length(message, max_message)
    if loaded is None:
        raise KeyNotFound
    rule = loaded.rule(item.purpose, item.scheme)
    rule.check(message, now)
    if item.deadline_ms == 0:
        raise DeadlineExceeded("deadline_ms is 0")
    deadline = received + item.deadline_ms / 1000
    return SignRequest(loaded.record, rule.scheme, message, deadline, rule.purpose is Purpose.DIGEST), rule
