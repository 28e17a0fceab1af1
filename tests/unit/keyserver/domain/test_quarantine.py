"""What counts as lately, and when a quarantine holds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import ErrorCode, Quarantined
from keyreeve_keyserver.domain.quarantine import Cause, Conduct, Quarantine, Window

SECOND = 1_000_000_000
NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOLDER = "spiffe://example.org/agent/a"


@given(st.integers(1, 600), st.lists(st.tuples(st.integers(0, 90 * SECOND), st.integers(0, 5)), max_size=60))
def test_window_counts_nothing_older_and_all_that_is_newer(length_s: int, steps: list[tuple[int, int]]) -> None:
    window, now, events = Window(length_s), 7 * SECOND, list[tuple[int, int]]()
    for gap, count in steps:
        now += gap
        events.append((now, count))
        total = window.add(now, count)
        length_ns = length_s * SECOND
        assert total <= sum(count for at, count in events if now - at < length_ns)
        assert total >= sum(count for at, count in events if now - at <= length_ns * 15 // 16 - 16)
        assert len(window._slices) <= 16


def test_a_foreign_key_counts_once_in_a_window() -> None:
    conduct = Conduct(60.0)
    assert [conduct.add_foreign_key("k-1", number) for number in range(5)] == [1] * 5
    assert conduct.add_foreign_key("k-2", 6) == 2
    assert conduct.add(Cause.REFUSALS, 7) == 3
    assert conduct.add_foreign_key("k-1", 61 * SECOND) == 1  # counted anew, the others forgotten
    assert conduct.is_forgotten(200 * SECOND)


def test_memory_of_foreign_keys_is_bounded() -> None:
    conduct = Conduct(1.0)
    for number in range(20_000):
        conduct.add_foreign_key(f"k-{number}", number * SECOND // 10)
    assert len(conduct.foreign_keys) < 200


@pytest.mark.parametrize(
    ("until", "lifted_at", "holds"),
    [
        (None, None, True),
        (NOW + timedelta(seconds=1), None, True),
        (NOW, None, False),
        (None, NOW, False),
        (NOW + timedelta(hours=1), NOW - timedelta(hours=1), False),
    ],
)
def test_when_it_holds(until: datetime | None, lifted_at: datetime | None, holds: bool) -> None:
    since = NOW - timedelta(hours=2)
    quarantine = Quarantine(HOLDER, Cause.OPERATOR, "secret reason", "local", since, until, lifted_at)
    assert quarantine.holds(NOW) is holds
    if not holds:
        quarantine.check(NOW)
        return
    with pytest.raises(Quarantined) as caught:
        quarantine.check(NOW)
    assert caught.value.code is ErrorCode.QUARANTINED
    assert "secret reason" not in caught.value.detail
