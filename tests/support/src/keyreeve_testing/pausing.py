"""The OpenSSL provider of keyserver/engine/tests/asyncsign: it signs as a card would, later and in a paused job, and fails as it is told.

The numbers are those of pausing_provider.h. A knob turned here counts for this process alone.
"""

from __future__ import annotations

import ctypes
import subprocess
from enum import IntEnum
from functools import cache
from pathlib import Path

_SOURCES = Path(__file__).parents[4] / "keyserver/engine/native/asyncsign"
_BUILT = _SOURCES.parents[1] / "build/asyncsign/keyreeve_pausing.so"


class Knob(IntEnum):
    WAKE, BATCH, RETRIES, FAULT, REFUSE = range(5)


class Fault(IntEnum):
    SOUND, FAIL, WRONG, HANG, BLOCK, AT_ONCE, SHAM, CUT = range(8)


class Count(IntEnum):
    SIGNED, WITH_THE_CARD, MOST_WITH_THE_CARD, OUTSIDE_JOBS, UNLOADED = range(5)


class PausingProvider:
    """`path` is what `qat_provider` takes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.pausing_set.argtypes = (ctypes.c_int, ctypes.c_long)
        self._library.pausing_get.restype = ctypes.c_long

    def reset(self) -> None:
        self._library.pausing_reset()

    def set(self, knob: Knob, value: int) -> None:
        self._library.pausing_set(knob, value)

    def get(self, count: Count) -> int:
        return int(self._library.pausing_get(count))

    def let_go(self) -> None:
        """Whatever hangs at the card is answered, and nothing hangs any more."""
        self._library.pausing_let_go()


@cache
def pausing_provider() -> PausingProvider:
    """Built on first use; needs gcc and libssl-dev, as script/bootstrap test installs them."""
    subprocess.run(["make", "-s", "-C", str(_SOURCES), "provider"], check=True, capture_output=True)
    return PausingProvider(_BUILT)
