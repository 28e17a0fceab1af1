"""Rates at a front end: whose bucket refuses, and that a refusal takes no token."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from keyreeve_common.errors import ConfigInvalid, RateLimited
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import Purpose
from keyreeve_keyserver.config import Rates
from keyreeve_keyserver.domain.policy import Grant
from keyreeve_keyserver.domain.rates import Rate
from keyreeve_keyserver.frontend.rates import RateLimiter

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SERVER = frozenset({Purpose.TLS13_SERVER_VERIFY})


def grant(key: str = "k", holder: str = "h", rate: Rate | None = None) -> Grant:
    return Grant(KeyId(key), holder, SERVER, NOW, rate=rate)


class Clock:
    ns = 0

    def __call__(self) -> int:
        return self.ns


def limiter(clock: Clock, **config: Any) -> RateLimiter:
    return RateLimiter(Rates(**{"per_holder": 0, "per_key": 0, **config}), clock_ns=clock)


def admitted(limiter: RateLimiter, grant: Grant, tries: int = 50) -> int:
    count = 0
    for _ in range(tries):
        try:
            limiter.admit(grant)
        except RateLimited:
            continue
        count += 1
    return count


def test_a_grants_own_rate_and_the_default_of_others() -> None:
    rates = limiter(Clock(), per_grant=1, per_grant_burst=3)
    assert admitted(rates, grant(rate=Rate(1, 7))) == 7
    assert admitted(rates, grant(key="other")) == 3
    assert admitted(limiter(Clock()), grant()) == 50  # no limit


def test_all_keys_of_a_holder_share_and_all_holders_of_a_key() -> None:
    rates = limiter(Clock(), per_holder=1, per_holder_burst=5)
    assert admitted(rates, grant("k1")) + admitted(rates, grant("k2")) == 5
    assert admitted(rates, grant("k1", "other")) == 5
    rates = limiter(Clock(), per_key=1, per_key_burst=5)
    assert admitted(rates, grant(holder="a")) + admitted(rates, grant(holder="b")) == 5


def test_what_one_bucket_refuses_costs_the_others_nothing() -> None:
    """A workload that floods its own key leaves the node's other keys their rate."""
    rates = limiter(Clock(), per_holder=1, per_holder_burst=10)
    assert admitted(rates, grant("flooded", rate=Rate(1, 2)), tries=1000) == 2
    assert admitted(rates, grant("quiet")) == 8


def test_refusal_says_whose_and_when() -> None:
    clock = Clock()
    rates = limiter(clock, per_holder=4, per_holder_burst=1)
    rates.admit(grant())
    with pytest.raises(RateLimited, match="this holder has used its rate") as caught:
        rates.admit(grant())
    assert caught.value.retry_after == timedelta(milliseconds=250)
    clock.ns += 250_000_000
    rates.admit(grant())


def test_replicas_divide_every_rate() -> None:
    rates = limiter(Clock(), per_holder=10, per_holder_burst=30, replicas=3)
    assert admitted(rates, grant()) == 10
    assert admitted(rates, grant(holder="b", rate=Rate(100, 6))) == 2


@pytest.mark.parametrize("wrong", [{"per_key": -1}, {"per_grant": 1_000_001}, {"per_key_burst": -1}, {"replicas": 0}])
def test_rates_that_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigInvalid):
        Rates(**wrong)
