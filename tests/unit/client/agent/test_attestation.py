"""The node's own identity: what may go wrong before and while it is renewed, each with one clear error."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from keyreeve_client.agent import attestation
from keyreeve_client.agent.attestation import NodeIdentity
from keyreeve_client.agent.config import AgentConfig, CaConfig, KeyServerConfig, SignSocketConfig
from keyreeve_client.agent.state_dir import StateDir
from keyreeve_client.channel import open_local_channel
from keyreeve_common.errors import ConfigInvalid, DeadlineExceeded, KeyreeveError, RateLimited, Unavailable
from keyreeve_common.identity import TrustDomain
from keyreeve_common.v1 import ca_pb2, ca_pb2_grpc


@pytest.fixture
def identity(tmp_path: Path) -> NodeIdentity:
    (tmp_path / "token").write_text("token")
    (tmp_path / "token").chmod(0o600)
    config = AgentConfig(
        trust_domain=TrustDomain("example.org"),
        bundle_file=tmp_path / "bundle.pem",
        ca=CaConfig("127.0.0.1:1", "127.0.0.1:1"),
        key_server=KeyServerConfig(("127.0.0.1:1",)),
        sign_socket=SignSocketConfig(tmp_path / "sign.sock"),
        join_token_file=tmp_path / "token",
        state_dir=tmp_path,
    )
    return NodeIdentity(config, StateDir(tmp_path))


async def test_a_missing_bundle_file_is_named(identity: NodeIdentity) -> None:
    with pytest.raises(ConfigInvalid, match=r"bundle\.pem: bundle_file cannot be read: No such file"):
        await identity.attest()


@pytest.mark.parametrize("content", [b"", b"no PEM"])
async def test_a_bundle_file_without_certificates_is_named(identity: NodeIdentity, content: bytes) -> None:
    identity.config.bundle_file.write_bytes(content)
    with pytest.raises(ConfigInvalid, match=r"bundle\.pem: bundle_file holds no PEM certificate"):
        await identity.attest()


@pytest.mark.parametrize("busy", [Unavailable("away"), DeadlineExceeded("slow"), RateLimited("a thousand agents")])
async def test_waits_for_a_ca_that_is_away_slow_or_busy(
    identity: NodeIdentity, monkeypatch: pytest.MonkeyPatch, busy: KeyreeveError
) -> None:
    answers: list[KeyreeveError | None] = [busy, None]
    monkeypatch.setattr(attestation.Backoff, "next", lambda _: 0.0)

    async def attest() -> None:
        if (answer := answers.pop(0)) is not None:
            raise answer

    monkeypatch.setattr(identity, "attest", attest)
    await identity.establish()
    assert not answers


class Silent(ca_pb2_grpc.AgentsServicer):
    """Takes a renewal and never answers."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def RenewAgentSvid(self, request: Any, context: Any) -> ca_pb2.RenewAgentSvidResponse:
        self.asked.set()
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_renewal_whose_channel_is_replaced_fails_and_the_task_goes_on(
    identity: NodeIdentity, tmp_path: Path
) -> None:
    service, server = Silent(), grpc.aio.server()
    ca_pb2_grpc.add_AgentsServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{tmp_path / 'ca.sock'}")
    await server.start()
    channel = open_local_channel(tmp_path / "ca.sock")

    class Channel:
        async def current(self) -> grpc.aio.Channel:
            return channel

    renewal = asyncio.create_task(identity.renew(Channel()))  # type: ignore[arg-type]
    await service.asked.wait()
    await channel.close()
    with pytest.raises(Unavailable, match="channel to the CA was closed"):
        await renewal
    await server.stop(0)
