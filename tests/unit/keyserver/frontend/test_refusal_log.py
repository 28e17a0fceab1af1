"""What a caller was refused is in the log, and a flood of it is a count there."""

from __future__ import annotations

from typing import Any

import pytest
from keyreeve_common.errors import InvalidRequest, Quarantined
from keyreeve_keyserver.frontend.refusal_log import MAX_LINES_PER_S, RefusalLog

NODE, OTHER = "spiffe://example.org/agent/a", "spiffe://example.org/agent/b"


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, Any]]:
    return [(record.message, record.__dict__["keyreeve_fields"]) for record in caplog.records]


def test_flood_of_batches_is_counted_and_hides_no_other_caller(caplog: pytest.LogCaptureFixture) -> None:
    now = 10.0
    log = RefusalLog(lambda: now)
    for _ in range(1000):
        log.tell(NODE, [("", 0, Quarantined("q"))] * 3)
    log.tell(OTHER, [("k-1", 1, InvalidRequest("odd"))])
    lines = told(caplog)
    assert len(lines) == MAX_LINES_PER_S + 1
    assert lines[-1][1]["caller"] == OTHER
    caplog.clear()
    now += 1
    log.tell(OTHER, [("k-1", 1, InvalidRequest("odd"))])
    assert told(caplog)[0] == ("sign_refused_more", {"caller": NODE, "count": 3 * (1000 - MAX_LINES_PER_S)})


def test_one_batch_has_few_lines_whatever_is_in_it(caplog: pytest.LogCaptureFixture) -> None:
    now = 10.0
    log = RefusalLog(lambda: now)
    log.tell(NODE, [(f"k-{number}", 1, InvalidRequest("odd")) for number in range(256)])
    assert len(told(caplog)) == 16
    caplog.clear()
    now += 2
    log.tell(NODE, [("k", 1, InvalidRequest("odd"))] * 2)
    lines = told(caplog)
    assert lines[0] == ("sign_refused_more", {"caller": NODE, "count": 240})
    assert (lines[1][0], lines[1][1]["count"]) == ("sign_refused", 2)
