"""The bundle that the CA pushes: kept when it is new, and again when somebody removed the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from keyreeve_client.agent.assignments import CurrentKeys
from keyreeve_client.agent.attestation import NodeIdentity
from keyreeve_client.agent.config import AgentConfig, CaConfig, KeyServerConfig, SignSocketConfig
from keyreeve_client.agent.state_dir import StateDir
from keyreeve_client.agent.sync import Sync
from keyreeve_client.channel import ReloadingChannel
from keyreeve_common.errors import FailedPrecondition
from keyreeve_common.identity import TrustDomain
from keyreeve_common.v1 import ca_pb2, types_pb2
from keyreeve_testing.pki import TestPki

PKI = TestPki()
PUSH = ca_pb2.Assignments(
    sequence=1, bundle=types_pb2.Bundle(trust_domain="example.org", x509_authorities_der=PKI.bundle_der)
)


@pytest.fixture
def sync(tmp_path: Path) -> Sync:
    config = AgentConfig(
        trust_domain=TrustDomain("example.org"),
        bundle_file=tmp_path / "configured.pem",
        ca=CaConfig("127.0.0.1:1", "127.0.0.1:1"),
        key_server=KeyServerConfig(("127.0.0.1:1",)),
        sign_socket=SignSocketConfig(tmp_path / "sign.sock"),
        state_dir=tmp_path,
    )
    identity = NodeIdentity(config, StateDir(tmp_path))
    channel = ReloadingChannel("127.0.0.1:1", identity.files(), server_id=config.ca_id)
    return Sync(identity, channel, CurrentKeys(), on_state=lambda _: None)


def test_a_bundle_that_was_removed_is_put_back(sync: Sync) -> None:
    sync._take(PUSH)
    assert sync.identity.state.bundle.read_bytes() == PKI.bundle_pem
    sync.identity.state.bundle.unlink()
    sync._take(PUSH)
    assert sync.identity.state.bundle.read_bytes() == PKI.bundle_pem


def test_without_any_bundle_nothing_is_believed_and_the_error_is_typed(sync: Sync) -> None:
    with pytest.raises(FailedPrecondition, match=r"bundle\.pem: cannot be read"):
        sync._take(ca_pb2.Assignments(sequence=1))
