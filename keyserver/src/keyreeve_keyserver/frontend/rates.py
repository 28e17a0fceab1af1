"""Rates of signatures at this replica: of each grant, each holder and each key. A request takes a token of all three or of none.

`admit` is on the hot path: up to three dictionary look-ups and sums for an item. What has no limit costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from time import monotonic_ns

from keyreeve_common.errors import RateLimited

from keyreeve_keyserver.config import Rates
from keyreeve_keyserver.domain.policy import Grant
from keyreeve_keyserver.domain.rates import Buckets, Pace, Rate, pace_of, wait_ns

_NS_PER_MS = 1_000_000


class RateExceeded(RateLimited):
    """The caller's own doing, unlike a server that is too busy."""


class RateLimiter:
    def __init__(self, config: Rates, *, clock_ns: Callable[[], int] = monotonic_ns) -> None:
        self._replicas = config.replicas
        self._clock_ns = clock_ns
        self._of_grants: Buckets[tuple[str, str]] = Buckets()
        self._of_holders: Buckets[str] = Buckets()
        self._of_keys: Buckets[str] = Buckets()
        self._grant_default = self._pace(config.per_grant, config.per_grant_burst)
        self._holder_pace = self._pace(config.per_holder, config.per_holder_burst)
        self._key_pace = self._pace(config.per_key, config.per_key_burst)
        self._paces: dict[Rate, Pace] = {}

    def admit(self, grant: Grant, count: int = 1) -> None:
        """Takes `count` tokens of the grant, of its holder and of its key, all or none.

        Raises: RateExceeded, which says whose bucket has too few and when to retry.
        """
        now_ns = self._clock_ns()
        of_grant = self._grant_default if grant.rate is None else self._pace_of(grant.rate)
        of_holder, of_key = self._holder_pace, self._key_pace
        grant_at = holder_at = key_at = 0
        pair = (grant.key_id, grant.holder)
        if of_grant is not None:
            grant_at = self._of_grants.after(pair, of_grant, now_ns, count)
            if grant_at - now_ns > of_grant.capacity_ns:
                raise _limited("this grant", wait_ns(grant_at, of_grant, now_ns))
        if of_holder is not None:
            holder_at = self._of_holders.after(grant.holder, of_holder, now_ns, count)
            if holder_at - now_ns > of_holder.capacity_ns:
                raise _limited("this holder", wait_ns(holder_at, of_holder, now_ns))
        if of_key is not None:
            key_at = self._of_keys.after(grant.key_id, of_key, now_ns, count)
            if key_at - now_ns > of_key.capacity_ns:
                raise _limited("this key", wait_ns(key_at, of_key, now_ns))
        if grant_at:
            self._of_grants.take(pair, grant_at, now_ns)
        if holder_at:
            self._of_holders.take(grant.holder, holder_at, now_ns)
        if key_at:
            self._of_keys.take(grant.key_id, key_at, now_ns)

    def limits(self, grant: Grant) -> bool:
        """Whether `admit` has anything to look at for this grant."""
        of_grant = self._grant_default if grant.rate is None else grant.rate
        return of_grant is not None or self._holder_pace is not None or self._key_pace is not None

    def _pace(self, per_second: int, burst: int) -> Pace | None:
        """None: no limit."""
        return pace_of(Rate(per_second, burst or 2 * per_second), replicas=self._replicas) if per_second else None

    def _pace_of(self, rate: Rate) -> Pace:
        found = self._paces.get(rate)
        if found is None:
            if len(self._paces) > 4096:  # as many different rates as administrators think of
                self._paces.clear()
            found = self._paces[rate] = pace_of(rate, replicas=self._replicas)
        return found


def _limited(whose: str, wait: int) -> RateExceeded:
    milliseconds = -(-wait // _NS_PER_MS)
    return RateExceeded(
        f"{whose} has used its rate of signatures at this replica; its next is due in {milliseconds} ms",
        retry_after=timedelta(milliseconds=milliseconds),
    )
