"""Quarantine: a holder that may not sign, whatever its grants say; and how many of its refusals it takes. Pure: time comes in.

ADR 13: what counts by default is only what an honest agent never sends, whatever the workloads of its node ask it for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from keyreeve_common.errors import Quarantined

MAX_REASON_BYTES = 512
_SLICES = 16
_SECOND_NS = 1_000_000_000


class Cause(StrEnum):
    """Who set it: an operator, or a replica that counted."""

    OPERATOR = "operator"
    REFUSALS = "refusals"  # what an agent never sends
    RATE = "rate"  # more than its rate, again and again
    WORKLOADS = "workloads"  # refusals that its node's workloads can bring about


@dataclass(frozen=True, slots=True)
class Quarantine:
    """From `since` until `until`, or until it is lifted. `set_by` is the operator's name at this edge, or the replica's."""

    holder: str
    cause: Cause
    reason: str
    set_by: str
    since: datetime
    until: datetime | None = None
    lifted_at: datetime | None = None

    def holds(self, now: datetime) -> bool:
        return self.lifted_at is None and (self.until is None or now < self.until)

    def check(self, now: datetime) -> None:
        """Raises: Quarantined, which does not say why: its caller may be the attacker."""
        if self.holds(now):
            raise Quarantined(
                "this SPIFFE ID is in quarantine; an operator of the key cluster sees why: keyreeve quarantine list"
            )


class Window:
    """How many there were lately: never one that is older than `length_s`, always all of the last 15/16 of it."""

    __slots__ = ("_slice_ns", "_slices", "_total")

    def __init__(self, length_s: float) -> None:
        self._slice_ns = max(int(length_s * _SECOND_NS) // _SLICES, 1)
        self._slices: deque[list[int]] = deque()  # [slice's number, count]
        self._total = 0

    def add(self, now_ns: int, count: int = 1) -> int:
        """The number with these."""
        number = now_ns // self._slice_ns
        if not self._slices or self._slices[-1][0] != number:
            self._slices.append([number, 0])
        self._slices[-1][1] += count
        self._total += count
        return self.total(now_ns)

    def total(self, now_ns: int) -> int:
        oldest = now_ns // self._slice_ns - _SLICES + 1
        while self._slices and self._slices[0][0] < oldest:
            self._total -= self._slices.popleft()[1]
        return self._total


@dataclass(slots=True)
class Conduct:
    """What one holder did lately. A key that it never had counts once: a grant that is on its way here is one key, however often it is used."""

    window_s: float
    counts: dict[Cause, Window] = field(default_factory=dict)
    foreign_keys: dict[str, int] = field(default_factory=dict)

    def add(self, cause: Cause, now_ns: int, count: int = 1) -> int:
        window = self.counts.get(cause)
        if window is None:
            window = self.counts[cause] = Window(self.window_s)
        return window.add(now_ns, count)

    def add_foreign_key(self, key_id: str, now_ns: int) -> int:
        """Counts as a refusal of an agent, unless this key was counted within the window."""
        forgotten_ns = now_ns - int(self.window_s * _SECOND_NS)
        counted_ns = self.foreign_keys.get(key_id)
        if counted_ns is not None and counted_ns > forgotten_ns:
            return self.add(Cause.REFUSALS, now_ns, 0)
        total = self.add(Cause.REFUSALS, now_ns)
        self.foreign_keys[key_id] = now_ns
        if len(self.foreign_keys) > 2 * total + 64:
            self.foreign_keys = {key: at for key, at in self.foreign_keys.items() if at > forgotten_ns}
        return total

    def is_forgotten(self, now_ns: int) -> bool:
        return all(window.total(now_ns) == 0 for window in self.counts.values())
