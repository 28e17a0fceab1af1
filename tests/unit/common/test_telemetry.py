"""Log lines: one JSON object each, also for what Python could not raise."""

from __future__ import annotations

import json
import subprocess
import sys

_PROGRAM = """
from keyreeve_common.telemetry import configure_logging, log

class Handle:
    def __del__(self):
        raise ValueError("a secret of the handle")

configure_logging("test")
log("before", count=1)
handle = Handle()
del handle
log("after")
"""


def test_what_a_destructor_raises_is_a_line_without_its_text() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["before", "exception_ignored", "after"]
    assert lines[1]["kind"] == "ValueError"
    assert "Handle.__del__" in lines[1]["where"]
    assert "secret" not in done.stderr
