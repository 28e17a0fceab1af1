"""What the supervisor does with exit codes; the processes are played by the test."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from keyreeve_common.identity import TrustDomain
from keyreeve_keyserver.config import KeyServerConfig
from keyreeve_keyserver.supervisor import EX_NOPERM, Supervisor


async def test_refused_pin_is_final_when_the_front_end_ended_first(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Any] = []

    async def start() -> Any:
        starts.append(SimpleNamespace(signer=SimpleNamespace(returncode=None), front_end=SimpleNamespace(returncode=1)))
        return starts[-1]

    async def watch(_pair: Any) -> str:
        return "front_end"

    async def stop(pair: Any) -> None:
        pair.signer.returncode = EX_NOPERM

    config = KeyServerConfig(TrustDomain("td.test"), Path("/s"), Path("/s/admin"), signer_config=Path("/s/signer.toml"))
    supervisor = Supervisor(config, Path("/s/keyserver.toml"))
    for name, played in (("_start", start), ("_watch", watch), ("_stop", stop)):
        monkeypatch.setattr(supervisor, name, played)
    assert await supervisor.run() == EX_NOPERM
    assert len(starts) == 1
