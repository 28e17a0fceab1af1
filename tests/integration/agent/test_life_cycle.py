"""One agent from its join token to its end, as a real process between a fake CA and a fake key server."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography import x509


def test_attests_syncs_signs_and_stops(world: Any) -> None:
    world.ca.push(world.assignment())
    agent = world.start()
    assert world.sign()
    assert world.ca.attested == 1
    assert not world.token_file.exists()
    assert stat.S_IMODE((world.state_dir / "svid.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE(world.socket.stat().st_mode) == 0o666
    assert world.key_server.callers == {"spiffe://agent.test/keyreeve/agent/node-1"}
    assert resource.prlimit(agent.pid, resource.RLIMIT_CORE) == (0, 0)
    assert agent.terminate() == 0
    assert not world.socket.exists()
    assert agent.events_named("agent_stopped")


def test_a_restart_keeps_the_svid_and_needs_no_token(world: Any) -> None:
    world.ca.push(world.assignment())
    world.start().terminate()
    kept = (world.state_dir / "svid.pem").read_bytes()
    world.start()
    assert world.sign()
    assert world.ca.attested == 1
    assert (world.state_dir / "svid.pem").read_bytes() == kept


def test_kill_9_leaves_a_stale_socket_that_the_next_start_replaces(world: Any) -> None:
    world.ca.push(world.assignment())
    agent = world.start()
    agent.kill()
    assert world.socket.is_socket()
    world.start()
    assert world.sign()
    assert world.ca.attested == 1


def test_a_second_agent_on_the_same_state_is_refused(world: Any) -> None:
    world.start()
    second = world.agent().start()
    assert second.wait() == 1
    assert "another agent runs" in second.wait_event("agent_failed")["detail"]
    with world.client() as client:
        client.ping()


def test_no_token_or_a_bad_one_says_that_a_new_one_is_needed(world: Any) -> None:
    missing = world.agent().start()
    assert missing.wait() == 1
    assert "new join token is needed" in missing.wait_event("agent_failed")["detail"]
    world.write_token("token-that-is-wrong")
    refused = world.agent().start()
    assert refused.wait() == 1
    failure = refused.wait_event("agent_failed")
    assert failure["code"] == "attestation_failed"
    assert "new join token is needed" in failure["detail"]
    assert "token-that-is-wrong" not in refused.log


def test_an_expired_svid_without_token_says_that_a_new_one_is_needed(world: Any) -> None:
    world.start().terminate()
    svid = world.pki.expired_svid("/keyreeve/agent/node-1")
    (world.state_dir / "svid.pem").write_bytes(svid.key_pem + svid.chain_pem)
    agent = world.agent().start()
    assert agent.wait() == 1
    detail = agent.wait_event("agent_failed")["detail"]
    assert "expired" in detail
    assert "new join token is needed" in detail


def test_waits_for_a_ca_that_is_away_at_the_start(world: Any) -> None:
    world.ca.stop()
    world.write_token()
    agent = world.agent().start()
    agent.wait_event("attestation_waits_for_ca")
    world.ca.start()
    agent.wait_ready()
    assert world.ca.attested == 1


def test_stops_while_it_waits_for_the_ca(world: Any) -> None:
    world.ca.stop()
    world.write_token()
    agent = world.agent().start()
    agent.wait_event("attestation_waits_for_ca")
    assert agent.terminate() == 0


def test_a_ca_with_another_name_is_not_believed(world: Any) -> None:
    world.extra = ""
    world.write_token()
    path = world.config()
    path.write_text(path.read_text().replace("[ca]", '[ca]\nspiffe_id = "spiffe://agent.test/keyreeve/somebody"'))
    world.config = lambda: path
    agent = world.agent().start()
    agent.wait_event("attestation_waits_for_ca")
    assert world.ca.attested == 0
    assert world.token_file.exists()


def test_renews_its_own_svid_and_goes_on_with_it(world: Any) -> None:
    world.ca.svid_lifetime = timedelta(seconds=4)
    world.ca.push(world.assignment())
    agent = world.start()
    before = (world.state_dir / "svid.pem").read_bytes()
    agent.wait_event("agent_svid_renewed")
    assert world.sign()
    mark = len(agent.events)
    agent.wait_event("agent_svid_renewed", after=mark)
    assert world.sign()
    after = (world.state_dir / "svid.pem").read_bytes()
    keys = {x509.load_pem_x509_certificate(pem).public_key().public_numbers() for pem in (before, after)}  # type: ignore[union-attr]
    assert len(keys) == 2
    world.ca.push(world.assignment(), world.assignment("/second", key_id="key-second"))
    agent.wait_event("assignments_received", lambda event: event["usable"] == 2)
    assert world.sign("key-second")


def test_a_banned_agent_says_so_and_takes_up_a_new_token(world: Any) -> None:
    world.ca.push(world.assignment())
    agent = world.start()
    world.ca.banned = True
    world.ca.wake()
    event = agent.wait_event("agent_refused_by_ca")
    assert event["code"] == "agent_banned"
    assert "new join token" in event["what_to_do"]
    assert world.sign()
    world.ca.banned = False
    world.ca.tokens.add("token-of-tomorrow")
    mark = len(agent.events)
    world.write_token("token-of-tomorrow")
    agent.wait_event("ca_connected", after=mark)


def test_sighup_changes_nothing(world: Any) -> None:
    agent = world.start()
    agent.process.send_signal(signal.SIGHUP)
    agent.wait_event("sighup_ignored")
    with world.client() as client:
        client.ping()


def test_check_config(world: Any) -> None:
    world.add_proxy("web", "/web")
    command = [sys.executable, "-m", "keyreeve_client.agent", "--check-config", "--config", str(world.config())]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    world.add_proxy("db", "/db", 'owner = "no-such-user-here"')
    world.config()
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"no-such-user-here" in done.stderr
    assert not world.state_dir.exists()


def test_status_says_what_is_served(world: Any, until: Any) -> None:
    world.ca.push(world.assignment(hint="web"))
    world.start()
    world.sign()
    until(lambda: world.status()["signatures"] == 1)
    status = world.status()
    assert status["agent_id"] == "spiffe://agent.test/keyreeve/agent/node-1"
    assert status["ca"]["connected"] is True
    assert status["key_servers"][0]["available"] is True
    (svid,) = status["svids"]
    assert (svid["spiffe_id"], svid["key_id"], svid["signatures"]) == ("spiffe://agent.test/web", "key-web", 1)
    assert b"PRIVATE" not in (world.state_dir / "status.json").read_bytes()
    assert Path(f"/proc/{status['pid']}").exists()
    assert os.getpid() != status["pid"]
