"""The gate before a signature leaves: what it lets pass, what it withholds, and that it never turns a refusal into a signature."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from keyreeve_common.errors import ErrorCode, TokenUnavailable
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_keyserver.catalog.catalog import Catalog
from keyreeve_keyserver.catalog.records import GrantEntry
from keyreeve_keyserver.domain.keys import KeyState
from keyreeve_keyserver.domain.policy import Grant, KeyFacts
from keyreeve_keyserver.domain.quarantine import Cause, Quarantine
from keyreeve_keyserver.frames import Refused, Signed, SignItem, SignResult
from keyreeve_keyserver.frontend.access import Access, CatalogThreads
from keyreeve_keyserver.frontend.release import ReleaseGate
from sqlalchemy import URL

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOLDER = "spiffe://example.org/agent/a"
KEYS = (KeyId("k-1"), KeyId("k-2"))
SERVER = frozenset({Purpose.TLS13_SERVER_VERIFY})
LIVE = Grant(KEYS[0], HOLDER, SERVER, NOW)


class Rig:
    def __init__(self, threads: CatalogThreads) -> None:
        self.access = Access(threads, max_staleness=timedelta(seconds=60))
        self.gate = ReleaseGate(self.access, lambda: NOW)
        self.left: list[SignResult] = []
        self.seq = 0

    def put_key(self, key_id: KeyId, state: KeyState) -> None:
        self.seq += 1
        self.access._put_key(KeyFacts(key_id, KeyRole.HANDSHAKE, SERVER, state), self.seq)

    def put_grant(self, grant: Grant) -> None:
        self.seq += 1
        self.access.apply_grant(GrantEntry(grant, self.seq))

    def ask(self) -> Sequence[SignResult]:
        """The signer's answers for an item of each key, and the way out for them."""
        items = [SignItem(number, key_id, 0x0403, 1, 1000, b"m") for number, key_id in enumerate(KEYS)]
        self.out = self.gate.guard(HOLDER, items, self.left.extend)
        return [Signed(item.id, b"s") for item in items]

    def codes(self) -> list[ErrorCode | None]:
        return [None if isinstance(result, Signed) else result.error.code for result in self.left]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    url = URL.create("sqlite", database=str(tmp_path / "catalog.sqlite3"))
    threads = CatalogThreads(Catalog.open(url, busy_timeout=timedelta(milliseconds=200)))
    rig = Rig(threads)
    await rig.access.refresh()
    for key_id in KEYS:
        rig.put_key(key_id, KeyState.ENABLED)
        rig.put_grant(replace(LIVE, key_id=key_id))
    yield rig
    threads.close()


async def test_nothing_changed(rig: Rig) -> None:
    answers = rig.ask()
    rig.out(answers)
    assert rig.left == answers


async def test_revoked_meanwhile(rig: Rig) -> None:
    answers = rig.ask()
    rig.put_grant(replace(LIVE, revoked_at=NOW))
    rig.out(answers)
    assert rig.codes() == [ErrorCode.KEY_NOT_FOUND, None]


async def test_disabled_or_narrowed_meanwhile(rig: Rig) -> None:
    answers = rig.ask()
    rig.put_key(KEYS[0], KeyState.DISABLED)
    rig.put_grant(replace(LIVE, key_id=KEYS[1], purposes=frozenset({Purpose.TLS13_CLIENT_VERIFY})))
    rig.out(answers)
    assert rig.codes() == [ErrorCode.KEY_DISABLED, ErrorCode.PURPOSE_NOT_PERMITTED]


async def test_pieces_are_each_looked_at_and_refusals_pass(rig: Rig) -> None:
    first, second = rig.ask()
    rig.out([first])
    rig.put_grant(replace(LIVE, key_id=KEYS[1], revoked_at=NOW))
    rig.out([Refused(second.id, TokenUnavailable("away"))])
    rig.out([second])
    assert rig.codes() == [None, ErrorCode.TOKEN_UNAVAILABLE, ErrorCode.KEY_NOT_FOUND]


async def test_changes_of_others_withhold_nothing(rig: Rig) -> None:
    answers = rig.ask()
    rig.put_grant(replace(LIVE, holder="spiffe://example.org/agent/b"))
    rig.put_grant(replace(LIVE, expires_at=NOW + timedelta(hours=1)))
    rig.out(answers)
    assert rig.left == answers


async def test_catalog_lost_for_too_long_meanwhile(rig: Rig) -> None:
    answers = rig.ask()
    rig.access._read_at -= 61
    rig.out(answers)
    assert rig.codes() == [ErrorCode.UNAVAILABLE] * 2


async def test_quarantined_meanwhile(rig: Rig) -> None:
    answers = rig.ask()
    rig.access.quarantine_here(Quarantine(HOLDER, Cause.REFUSALS, "r", "replica", NOW))
    rig.out(answers)
    assert rig.codes() == [ErrorCode.QUARANTINED] * 2


async def test_unknown_key_after_a_restore_is_withheld(rig: Rig) -> None:
    answers = rig.ask()
    rig.access._grants.clear()
    rig.access.generation += 1
    rig.out(answers)
    assert rig.codes() == [ErrorCode.KEY_NOT_FOUND] * 2
