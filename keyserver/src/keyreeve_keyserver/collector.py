"""The garbage collector of a process that serves many small requests."""

from __future__ import annotations

import gc

# A batch makes thousands of objects that are no part of a cycle: the usual 700 would have the collector look through them for each.
_THRESHOLDS = (50_000, 20, 100)


def collect_rarely() -> None:
    """For when all is there that stays: it is never looked through again."""
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
