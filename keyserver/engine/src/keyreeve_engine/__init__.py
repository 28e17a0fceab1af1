"""What the signer signs with where the processor can sign eight at a time: modules in C, each of them optional.

Nothing here falls back by itself: who imports it asks `available` first. `KEYREEVE_MULTIBUFFER=off` makes it say no, so that tests and
operators can have the other path on any machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

SWITCH = "KEYREEVE_MULTIBUFFER"


@dataclass(frozen=True, slots=True)
class Availability:
    """`reason` says what is missing, "" where nothing is."""

    usable: bool
    reason: str = ""


def available() -> Availability:
    """Whether `keyreeve_engine._multibuffer` can sign on this machine."""
    if os.environ.get(SWITCH, "").lower() in {"off", "0", "no"}:
        return Availability(False, f"switched off by the environment variable {SWITCH}")
    try:
        from keyreeve_engine import _multibuffer  # noqa: PLC0415 - not built on every platform
    except ImportError:
        return Availability(False, "keyreeve-engine was built without crypto_mb, which comes for x86-64 Linux only")
    if not _multibuffer.kinds():
        return Availability(False, "the processor has no IFMA instructions, or the system does not enable them")
    return Availability(True)
