"""The three real services together: a real agent attests, is assigned an identity and writes its files; an eviction takes it away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography import x509
from keyreeve_common.v1 import ca_pb2
from keyreeve_testing.processes import ManagedProcess

WEB = "spiffe://example.org/web"
N1 = "spiffe://example.org/keyreeve/agent/n1"


def test_agent_is_assigned_what_the_ca_says(tmp_path: Path, ca: Any) -> None:
    token = tmp_path / "join-token"
    token.touch(mode=0o600)
    token.write_text(ca.join_token(N1))
    (tmp_path / "bundle.pem").write_bytes(ca.bundle_pem)
    config = tmp_path / "agent.toml"
    config.write_text(
        'trust_domain = "example.org"\nbundle_file = "bundle.pem"\njoin_token_file = "join-token"\nstate_dir = "agent"\n'
        f'[ca]\naddress = "127.0.0.1:{ca.port}"\nattest_address = "127.0.0.1:{ca.attest_port}"\n'
        f'[key_server]\naddresses = ["127.0.0.1:{ca.key_server.port}"]\n[sign_socket]\npath = "sign.sock"\n'
        f'[[proxy]]\nname = "nginx"\nspiffe_id = "{WEB}"\ndirectory = "nginx"\n'
    )
    entry = ca_pb2.Entry(
        spiffe_id=WEB,
        parent_id=N1,
        selectors=[ca_pb2.Selector(type="unix", value="uid:0")],
        dns_names=["web.example.org"],
    )
    with ManagedProcess.python_module("keyreeve_client.agent", "--config", config, name="agent") as agent:
        agent.start_ready()
        with ca.local() as local:
            local.entries.CreateEntry(ca_pb2.CreateEntryRequest(entry=entry))
        agent.wait_event("assignments_received", lambda event: event["usable"] == 1)
        with ca.local() as local:
            (shown,) = local.nodes.ListAgents(ca_pb2.ListAgentsRequest()).agents
            assert shown.connected
            (svid,) = local.svids.ListSvids(ca_pb2.ListSvidsRequest(spiffe_id=WEB, current_only=True)).svids
        leaf = x509.load_der_x509_certificate(svid.chain_der[0])
        assert f"{leaf.serial_number:x}" == svid.serial
        with ca.local() as local:
            local.nodes.BanAgent(ca_pb2.BanAgentRequest(spiffe_id=N1))
        agent.wait_event("ca_lost", lambda event: event["code"] == "agent_banned")
