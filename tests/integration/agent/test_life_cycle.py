"""One agent from its join token to its end, as a real process between a fake CA and a fake key server."""

from __future__ import annotations

import stat
from typing import Any


def test_attests_syncs_signs_and_stops(world: Any) -> None:
    world.ca.push(world.assignment())
    agent = world.start()
    assert world.sign()
    assert world.ca.attested == 1
    assert not world.token_file.exists()
    assert stat.S_IMODE((world.state_dir / "svid.pem").stat().st_mode) == 0o600
    assert world.key_server.callers == {"spiffe://agent.test/keyreeve/agent/node-1"}
    assert agent.terminate() == 0
    assert not world.socket.exists()
    assert agent.events_named("agent_stopped")
