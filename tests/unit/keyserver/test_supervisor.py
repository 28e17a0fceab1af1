"""What the supervisor does with exit codes; the processes are played by the test."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from keyreeve_common.errors import ConfigInvalid
from keyreeve_common.identity import TrustDomain
from keyreeve_common.telemetry_config import TelemetryConfig
from keyreeve_keyserver.config import KeyServerConfig, SupervisorConfig
from keyreeve_keyserver.pair_keeper import EX_NOPERM, EX_UNAVAILABLE, PairKeeper
from keyreeve_keyserver.supervisor import Supervisor


def config_of(pairs: int = 1, **changes: Any) -> KeyServerConfig:
    return KeyServerConfig(
        TrustDomain("td.test"),
        Path("/s"),
        Path("/s/admin"),
        signer_config=Path("/s/signer.toml"),
        supervisor=SupervisorConfig(pairs=pairs, max_restarts=0),
        **changes,
    )


def played(keeper: PairKeeper, monkeypatch: pytest.MonkeyPatch, starts: list[Any], *, ends: str, code: int) -> None:
    """`ends` of the pair ends with each start; the signer's exit code is then `code`."""

    async def start() -> Any:
        starts.append(SimpleNamespace(signer=SimpleNamespace(returncode=None), front_end=SimpleNamespace(returncode=1)))
        return starts[-1]

    async def watch(_pair: Any) -> str:
        keeper.ready.set()
        return ends

    async def stop(pair: Any) -> None:
        pair.signer.returncode = code

    for name, function in (("_start", start), ("_watch", watch), ("_stop", stop)):
        monkeypatch.setattr(keeper, name, function)


async def test_refused_pin_is_final_when_the_front_end_ended_first(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Any] = []
    supervisor = Supervisor(config_of(), Path("/s/keyserver.toml"))
    played(supervisor.keepers[0], monkeypatch, starts, ends="front_end", code=EX_NOPERM)
    assert await supervisor.run() == EX_NOPERM
    assert len(starts) == 1


async def test_a_pin_that_one_pair_was_refused_is_shown_by_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Any] = []
    supervisor = Supervisor(config_of(pairs=3), Path("/s/keyserver.toml"))
    for keeper in supervisor.keepers:
        played(keeper, monkeypatch, starts, ends="signer", code=EX_NOPERM)
    monkeypatch.setattr(supervisor.keepers[0].ready, "set", lambda: None)  # it never came up
    assert await supervisor.run() == EX_NOPERM
    assert len(starts) == 1


@pytest.mark.parametrize("others_serve", [False, True])
async def test_a_pair_that_ends_again_and_again_rests_while_another_serves(
    monkeypatch: pytest.MonkeyPatch, others_serve: bool
) -> None:
    starts: list[Any] = []
    stopping = asyncio.Event()
    supervisor = Supervisor(config_of(pairs=2), Path("/s/keyserver.toml"))
    keeper = supervisor.keepers[1]
    rests: list[float] = []

    async def rest(seconds: float) -> None:
        rests.append(seconds)
        if len(rests) == 2:
            stopping.set()

    played(keeper, monkeypatch, starts, ends="signer", code=-9)
    monkeypatch.setattr(keeper, "_stopping", stopping)
    monkeypatch.setattr(keeper, "_others_serve", lambda: others_serve)
    monkeypatch.setattr(keeper, "_rest", rest)
    assert await keeper.run() == (0 if others_serve else EX_UNAVAILABLE)
    assert rests == ([60.0, 60.0] if others_serve else [])


def test_a_pair_for_which_there_is_no_port_is_said_at_the_start() -> None:
    config = config_of(pairs=2, telemetry=TelemetryConfig(metrics_listen="127.0.0.1:65535"))
    with pytest.raises(ConfigInvalid, match="pair 2 has no port"):
        Supervisor(config, Path("/s/keyserver.toml"))
