"""Log lines for refused signatures: who, which key and purpose, why, how often; never a message.

Always true: one caller brings about at most MAX_LINES_PER_S lines a second, whatever it asks for, so that a flood of requests fills neither
the log's disk nor the pipe to whoever keeps it. What is left out is counted. The audit log has its own bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from time import monotonic

from keyreeve_common.errors import KeyreeveError
from keyreeve_common.purposes import Purpose
from keyreeve_common.telemetry import log_warning

MAX_LINES_PER_S = 64
_MAX_KINDS = 16  # of one batch
_PURPOSES = frozenset(int(purpose) for purpose in Purpose if purpose is not Purpose.UNSPECIFIED)


class RefusalLog:
    def __init__(self, clock_s: Callable[[], float] = monotonic) -> None:
        self._clock_s = clock_s
        self._began = 0.0
        self._lines: Counter[str] = Counter()  # of this second, by caller
        self._left_out: Counter[str] = Counter()

    def tell(self, caller: str, refusals: Sequence[tuple[str, int, KeyreeveError]]) -> None:
        """One line for each (key, purpose, code) of a batch, at most 16, with how many there were."""
        if (now := self._clock_s()) - self._began >= 1:
            self._close()
            self._began = now
        if self._lines[caller] >= MAX_LINES_PER_S:
            self._left_out[caller] += len(refusals)
            return
        seen: dict[tuple[str, int, str], tuple[int, str]] = {}
        for key_id, purpose, error in refusals:
            kind = (key_id[:64], purpose, error.code.value)
            seen[kind] = (seen.get(kind, (0, ""))[0] + 1, error.detail)
        for (key_id, purpose, code), (count, detail) in list(seen.items())[:_MAX_KINDS]:
            shown = Purpose(purpose).label if purpose in _PURPOSES else str(purpose)
            log_warning(
                "sign_refused", caller=caller, key_id=key_id, purpose=shown, code=code, detail=detail, count=count
            )
        self._lines[caller] += min(len(seen), _MAX_KINDS)
        self._left_out[caller] += sum(count for count, _ in list(seen.values())[_MAX_KINDS:])

    def _close(self) -> None:
        for caller, count in self._left_out.items():
            if count:
                log_warning("sign_refused_more", caller=caller, count=count)
        self._lines.clear()
        self._left_out.clear()
