"""Debian's nginx with key references: keys load in its master, signatures are asked for in its workers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fake_agent import FakeAgent
from keyreeve_common.purposes import Purpose
from nginx import Nginx
from support import Authority, Identity, handshake

HANDSHAKE_KINDS = ["ec-p256", "ec-p384", "rsa-2048", "ed25519"]
SCHEMES = {
    "ec-p256": 0x0403,
    "ec-p384": 0x0503,
    "rsa-2048": 0x0804,
    "rsa-3072": 0x0804,
    "rsa-4096": 0x0804,
    "ed25519": 0x0807,
}


@pytest.mark.parametrize("kind", HANDSHAKE_KINDS)
def test_handshakes_are_signed_by_the_agent(
    kind: str,
    agent: FakeAgent,
    authority: Authority,
    identity_of: Callable[[str], Identity],
    nginx: Callable[..., Nginx],
) -> None:
    with nginx(identity_of(kind)) as server:
        assert not agent.requests, "loading a key asked for a signature"
        assert agent.connections == 0, "loading a key opened a connection"
        for _ in range(5):
            assert b"served by keyreeve" in handshake(server.port, authority)
    assert len(agent.requests) == 5
    assert {request.scheme for request in agent.requests} == {SCHEMES[kind]}
    assert {request.purpose for request in agent.requests} == {Purpose.TLS13_SERVER_VERIFY}
    assert agent.connections <= server.workers, "a worker keeps its connection"
