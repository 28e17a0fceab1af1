"""The canary's key: shared by request id, and made anew where somebody destroyed it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from keyreeve_common.errors import Unavailable
from keyreeve_common.key_id import KeyId
from keyreeve_keyserver.catalog.records import KeyEntry, NewKey
from keyreeve_keyserver.domain.keys import KeyState
from keyreeve_keyserver.frontend.canary import Canaries
from keyreeve_keyserver.frontend.metrics import FrontEndMetrics

NOW = datetime(2026, 1, 1, tzinfo=UTC)
BACKEND = {"name": "soft", "key_types": ["ec-p256"]}


class Keys:
    def __init__(self) -> None:
        self.made: dict[str, KeyEntry] = {}

    async def make(self, new: NewKey) -> KeyEntry:
        fresh = KeyEntry(
            KeyId(f"k-{len(self.made)}"),
            new.key_type,
            new.role,
            new.purposes,
            new.backend,
            new.label,
            None,
            KeyState.ENABLED,
            b"",
            {},
            NOW,
            1,
        )
        return self.made.setdefault(new.request_id, fresh)

    def all_become(self, state: KeyState) -> None:
        self.made = {name: replace(entry, state=state) for name, entry in self.made.items()}


def canaries(keys: Keys) -> Canaries:
    unused = cast("Any", None)
    return Canaries(unused, unused, keys.make, metrics=FrontEndMetrics(), clock=lambda: NOW)


async def test_destroyed_key_has_a_successor_and_all_replicas_find_the_same() -> None:
    keys = Keys()
    first = await canaries(keys)._key("soft", BACKEND)
    assert await canaries(keys)._key("soft", BACKEND) == first
    for _ in range(2):
        keys.all_become(KeyState.DESTROYED)
        one, other = canaries(keys), canaries(keys)
        found = await one._key("soft", BACKEND)
        assert found.state is KeyState.ENABLED
        assert await other._key("soft", BACKEND) == found
    assert len(keys.made) == 3


async def test_disabled_key_is_the_operators_to_enable() -> None:
    keys = Keys()
    await canaries(keys)._key("soft", BACKEND)
    keys.all_become(KeyState.DISABLED)
    with pytest.raises(Unavailable, match="keyreeve key enable k-0"):
        await canaries(keys)._key("soft", BACKEND)
