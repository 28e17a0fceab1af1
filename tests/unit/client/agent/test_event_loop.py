"""The agent's event loop: uvloop where it is there, Python's own where it is not."""

from __future__ import annotations

import sys

import pytest
from keyreeve_client.agent import event_loop


def name_of_loop() -> str:
    names: list[str] = []

    async def look() -> None:
        names.append(event_loop.loop_name())

    event_loop.run(look())
    return names[0]


def test_uvloop_is_used() -> None:
    pytest.importorskip("uvloop", reason="uvloop is not installed on this platform")
    assert name_of_loop() == "uvloop"


def test_without_uvloop_pythons_own_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert name_of_loop() == "asyncio"
