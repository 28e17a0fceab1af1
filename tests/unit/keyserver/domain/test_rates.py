"""Token buckets: what is admitted in any span of time, whatever comes when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import InvalidRequest
from keyreeve_keyserver.domain.rates import MAX_BURST, MAX_PER_SECOND, Buckets, Pace, Rate, pace_of, wait_ns

SECOND = 1_000_000_000
rates = st.builds(
    Rate,
    st.one_of(st.integers(1, MAX_PER_SECOND).map(float), st.floats(1 / 86_400, MAX_PER_SECOND)),
    st.integers(1, 50),
)
gaps = st.lists(st.one_of(st.just(0), st.integers(0, 50), st.integers(0, 100 * SECOND)), min_size=1, max_size=120)


def admit(buckets: Buckets[str], key: str, pace: Pace, now_ns: int) -> int:
    """What is left to wait; 0 or less: it was admitted."""
    full_at = buckets.after(key, pace, now_ns)
    wait = wait_ns(full_at, pace, now_ns)
    if wait <= 0:
        buckets.take(key, full_at, now_ns)
    return wait


@given(rates, gaps, st.integers(0, 1 << 62))
def test_no_span_admits_more_than_burst_and_rate(rate: Rate, gaps: list[int], start: int) -> None:
    pace, buckets = pace_of(rate), Buckets[str]()
    admitted: list[int] = []
    now = start
    for gap in gaps:
        now += gap
        if admit(buckets, "k", pace, now) <= 0:
            admitted.append(now)
    for first in range(len(admitted)):
        for last in range(first, len(admitted)):
            span_ns = admitted[last] - admitted[first]
            assert last - first + 1 <= rate.burst + rate.per_second * span_ns / SECOND + 1e-6


@given(rates, gaps)
def test_whoever_waits_as_told_is_admitted(rate: Rate, gaps: list[int]) -> None:
    pace, buckets = pace_of(rate), Buckets[str]()
    now = 5 * SECOND
    for gap in gaps:
        now += gap
        wait = admit(buckets, "k", pace, now)
        if wait > 0:
            assert admit(buckets, "k", pace, now + wait - 1) == 1
            now += wait
            assert admit(buckets, "k", pace, now) <= 0


@given(rates)
def test_burst_is_there_at_once_and_comes_back(rate: Rate) -> None:
    pace, buckets = pace_of(rate), Buckets[str]()
    for now in (0, pace.capacity_ns, 9 * pace.capacity_ns):
        assert all(admit(buckets, "k", pace, now) <= 0 for _ in range(rate.burst))
        assert admit(buckets, "k", pace, now) > 0


def test_refusal_takes_nothing_from_anyone() -> None:
    pace, buckets = pace_of(Rate(1, 1)), Buckets[str]()
    assert admit(buckets, "a", pace, 0) <= 0
    assert [admit(buckets, "a", pace, 0) for _ in range(100)] == [SECOND] * 100
    assert admit(buckets, "b", pace, 0) <= 0
    assert admit(buckets, "a", pace, SECOND) <= 0


def test_a_slow_rate_that_was_raised_locks_nobody_out() -> None:
    buckets = Buckets[str]()
    slow, fast = pace_of(Rate(1 / 3600, 100)), pace_of(Rate(100, 10))
    for _ in range(100):
        admit(buckets, "k", slow, 0)
    assert 0 < admit(buckets, "k", fast, 0) <= SECOND // 100  # an empty bucket of the new rate
    assert admit(buckets, "k", fast, SECOND // 100) <= 0


def test_full_buckets_are_forgotten() -> None:
    pace, buckets = pace_of(Rate(1000, 1)), Buckets[str]()
    for number in range(100_000):
        admit(buckets, f"k{number}", pace, number * 1000)  # each is full again after a millisecond, a thousand later
    assert len(buckets) <= 3000


@pytest.mark.parametrize(("replicas", "burst"), [(1, 10), (3, 3), (20, 1)])
def test_replicas_share(replicas: int, burst: int) -> None:
    pace = pace_of(Rate(100, 10), replicas=replicas)
    assert pace.interval_ns == replicas * 10_000_000
    assert pace.capacity_ns == burst * pace.interval_ns


@pytest.mark.parametrize(
    ("per_second", "burst"),
    [(0, 1), (-1, 1), (float("nan"), 1), (float("inf"), 1), (MAX_PER_SECOND + 1, 1), (1, 0), (1, MAX_BURST + 1)],
)
def test_rates_that_are_none(per_second: float, burst: int) -> None:
    with pytest.raises(InvalidRequest, match="rate: "):
        Rate(per_second, burst)
