"""What the signer signs with where the processor can sign eight at a time: modules in C, each of them optional.

Nothing here falls back by itself: who imports it asks `available` first. `KEYREEVE_MULTIBUFFER=off` makes it say no, so that tests and
operators can have the other path on any machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

SWITCH = "KEYREEVE_MULTIBUFFER"


@dataclass(frozen=True, slots=True)
class Availability:
    """`reason` says what is missing, "" where nothing is."""

    usable: bool
    reason: str = ""


def available() -> Availability:
    """Whether `multibuffer` can sign on this machine."""
    if os.environ.get(SWITCH, "").lower() in {"off", "0", "no"}:
        return Availability(False, f"switched off by the environment variable {SWITCH}")
    if multibuffer is None:
        return Availability(False, "keyreeve-engine was built without crypto_mb, which comes for x86-64 Linux only")
    if not multibuffer.kinds():
        return Availability(False, "the processor has no IFMA instructions, or the system does not enable them")
    return Availability(True)


def _optional(name: str) -> ModuleType | None:
    try:
        return import_module(f"keyreeve_engine.{name}")
    except ImportError:  # not built on every platform
        return None


# With the package, not when it is first needed: the signer may not open files then.
multibuffer = _optional("_multibuffer")
asyncsign = _optional("_asyncsign")
