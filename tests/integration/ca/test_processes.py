"""The CA process: start-up and its refusals, renewal by itself, several instances on one PostgreSQL."""

from __future__ import annotations

import itertools
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from keyreeve_common.errors import PermissionDenied, Unavailable
from keyreeve_common.v1 import ca_pb2
from keyreeve_testing.keyserver import KeyServerRig
from keyreeve_testing.postgres import postgres_is_installed, running_postgres
from keyreeve_testing.processes import ManagedProcess


def test_ca_that_was_not_initialised_says_what_to_do(tmp_path: Path, key_server: KeyServerRig, new_ca: Any) -> None:
    rig = new_ca(tmp_path / "ca", key_server)
    (rig.directory / "state").mkdir()
    with rig.process:
        rig.process.start()
        assert rig.process.wait() == 78
        assert "keyreeve init" in rig.process.events_named("ca_failed")[-1]["detail"]


def test_check_config(tmp_path: Path, key_server: KeyServerRig, new_ca: Any) -> None:
    rig = new_ca(tmp_path / "ca", key_server)

    def check() -> tuple[int, str]:
        with ManagedProcess.python_module("keyreeve_ca", "--config", rig.config, "--check-config") as process:
            process.start()
            return process.wait(), process.log

    assert check()[0] == 0
    rig.config.write_text(rig.config.read_text() + 'nonsense = "1"\n')
    code, log = check()
    assert code == 78
    assert "background.nonsense: unknown key" in log


def test_init_without_key_server_is_unavailable_and_resumes(
    tmp_path: Path, key_server: KeyServerRig, new_ca: Any
) -> None:
    rig = new_ca(tmp_path / "ca", key_server)
    key_server.process.terminate()
    code, report, complaint = rig.init(check=False)
    assert (code, report) == (3, [])
    assert "unavailable" in complaint
    key_server.process.start_ready()
    assert rig.init()[0] == 0


def test_taken_port_is_named(ca: Any) -> None:
    second = ca.new_process()
    with second:
        second.start()
        assert second.wait() == 78
        assert str(ca.port) in second.events_named("ca_failed")[-1]["detail"]


def test_admin_socket_is_for_its_owner_only(ca: Any) -> None:
    assert stat.S_IMODE(os.stat(ca.admin_socket).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(ca.admin_socket.parent).st_mode) == 0o700
    with ca.local() as local:
        health = local.health.Check(ca_pb2.HealthRequest())
    assert health.serving, health.detail


def test_health_names_the_key_server_that_is_away(ca: Any) -> None:
    ca.key_server.process.terminate()
    with ca.local() as local:
        health = local.health.Check(ca_pb2.HealthRequest())
    assert not health.serving
    assert f"127.0.0.1:{ca.key_server.port}" in health.detail


def test_short_lives_are_renewed_without_a_break(tmp_path: Path, key_server: KeyServerRig, new_ca: Any) -> None:
    rig = new_ca(tmp_path / "ca", key_server, issuance='default_ttl = "4s"\nservice_ttl = "6s"\nbackdate = "0s"')
    rig.init()
    with rig.running():
        node = rig.node()
        entry = ca_pb2.Entry(
            spiffe_id="spiffe://example.org/web",
            parent_id=node.spiffe_id,
            selectors=[ca_pb2.Selector(type="unix", value="uid:1")],
        )
        with rig.local() as local:
            local.entries.CreateEntry(ca_pb2.CreateEntryRequest(entry=entry))
        chains: list[bytes] = []
        with rig.caller(node.identity) as stubs:
            for message in stubs.agents.WatchAssignments(ca_pb2.WatchAssignmentsRequest(), timeout=60):
                for each in message.assignments:
                    assert not each.HasField("error") or not chains, each.error
                    if each.chain_der and (not chains or chains[-1] != each.chain_der[0]):
                        chains.append(each.chain_der[0])
                if len(chains) == 4:
                    break
        leaves = [x509.load_der_x509_certificate(der) for der in chains]
        for older, newer in itertools.pairwise(leaves):
            assert newer.not_valid_before_utc < older.not_valid_after_utc
            assert newer.public_key() == older.public_key()
        rig.process.wait_event("own_svid_renewed")
        rig.process.wait_event("key_server_certified")
        again = rig.process.events_named("key_server_certified")
        assert again


@pytest.mark.postgres
def test_two_instances_share_one_postgresql(tmp_path: Path, key_server: KeyServerRig, new_ca: Any) -> None:
    if not postgres_is_installed():
        pytest.skip("PostgreSQL is not installed")
    with running_postgres() as postgres:
        url = postgres.make_database().replace("postgresql+psycopg", "postgresql")
        first = new_ca(tmp_path / "ca1", key_server, database=f'url = "{url}"')
        second = new_ca(tmp_path / "ca2", key_server, database=f'url = "{url}"')
        first.init()
        _, report, _ = second.init()
        made = {step["step"] for step in report if step["state"] != "kept"}
        assert made == {"CA's own SVID", "bundle file"}
        with first.running(), second.running():
            node = first.node()
            with second.caller(node.identity) as stubs:
                stream = stubs.agents.WatchAssignments(ca_pb2.WatchAssignmentsRequest(), timeout=60)
                assert not next(stream).assignments
                entry = ca_pb2.Entry(
                    spiffe_id="spiffe://example.org/web",
                    parent_id=node.spiffe_id,
                    selectors=[ca_pb2.Selector(type="unix", value="uid:1")],
                )
                with first.local() as local:  # the other instance hears of it through the database
                    local.entries.CreateEntry(ca_pb2.CreateEntryRequest(entry=entry))
                assert any(each.chain_der for message in _until_ready(stream) for each in message.assignments)
                with first.local() as local:
                    local.nodes.EvictAgent(ca_pb2.EvictAgentRequest(spiffe_id=node.spiffe_id))
                with pytest.raises(Exception, match="evicted"):
                    list(stream)
            postgres.stop()
            with first.local() as local, pytest.raises(Unavailable):
                local.entries.ListEntries(ca_pb2.ListEntriesRequest())
            postgres.start()
            with first.local() as local:
                assert len(local.entries.ListEntries(ca_pb2.ListEntriesRequest()).entries) == 1
            with second.caller(node.identity) as stubs, pytest.raises(PermissionDenied):
                stubs.entries.ListEntries(ca_pb2.ListEntriesRequest())


def _until_ready(stream: Any) -> Any:
    for message in stream:
        yield message
        if message.assignments and not any(each.HasField("error") for each in message.assignments):
            return


def test_authorities_rotate_on_an_operators_word(ca: Any) -> None:
    with ca.local() as local:
        before = local.authorities.GetBundle(ca_pb2.GetBundleRequest())
        prepared = local.authorities.PrepareAuthority(ca_pb2.PrepareAuthorityRequest())
        active = local.authorities.ActivateAuthority(
            ca_pb2.ActivateAuthorityRequest(authority_id=prepared.authority_id)
        )
        assert active.state == ca_pb2.AUTHORITY_STATE_ACTIVE
        states = [each.state for each in local.authorities.ListAuthorities(ca_pb2.ListAuthoritiesRequest()).authorities]
        assert sorted(states) == [2, 2, 3]
        assert local.authorities.GetBundle(ca_pb2.GetBundleRequest()) == before
    node = ca.node()
    assert node.chain[1].subject == x509.load_der_x509_certificate(prepared.certificate_der).subject
