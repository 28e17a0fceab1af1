"""Requests through the sign socket of a real agent: who may, what is refused and how, and what outages look like."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from typing import Any

import pytest
from keyreeve_common.errors import (
    DeadlineExceeded,
    KeyNotFound,
    KeyreeveError,
    MalformedFrame,
    MessageTooLarge,
    PurposeMismatch,
    RateLimited,
    SvidExpired,
    Unavailable,
)
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import SignatureScheme

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="starts a process of another user: needs root")
SCHEME = SignatureScheme.ECDSA_SECP256R1_SHA256
AS_NOBODY = """
import os, sys
from keyreeve_client.agent.sign_socket_client import SignSocketClient
from keyreeve_common.errors import KeyreeveError
client = SignSocketClient(sys.argv[1])
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for key_id in sys.argv[2:]:
    try:
        print(key_id, "signed", client.sign(key_id, 0x0403, 1, message=b"m").hex()[:2])
    except KeyreeveError as error:
        print("refused", error.code.value, error.detail, error.retry_after)
"""


def as_nobody(world: Any, *key_ids: str) -> list[str]:
    command = [sys.executable, "-c", AS_NOBODY, str(world.socket), *key_ids]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@needs_root
def test_another_user_is_refused_as_if_the_key_did_not_exist(world: Any) -> None:
    world.ca.push(world.assignment(), world.assignment("/theirs", key_id="key-theirs", selectors=("uid:65534",)))
    world.start()
    forbidden, unknown, own = as_nobody(world, "key-web", "key-that-is-none", "key-theirs")
    assert forbidden == unknown
    assert "key_not_found" in forbidden
    assert own.startswith("key-theirs signed")
    assert world.sign()
    with pytest.raises(KeyNotFound):
        world.sign("key-theirs")
    assert world.key_server.signed == {"key-web": 1, "key-theirs": 1}


@needs_root
def test_a_delegate_uses_the_key_of_the_workload(world: Any) -> None:
    delegate = {"selectors": [{"type": "unix", "value": "user:nobody"}, {"type": "unix", "value": "gid:65534"}]}
    proxy = world.assignment("/proxy", key_id="key-proxy")
    web = world.assignment(
        selectors=("uid:4000000000",), delegates=[delegate, {"spiffe_id": world.pki.spiffe_id("/proxy")}]
    )
    world.ca.push(web, proxy)
    world.start()
    assert world.sign("key-web")
    assert as_nobody(world, "key-web")[0].startswith("key-web signed")


def test_selectors_of_the_program_are_learnt_when_needed(world: Any) -> None:
    program = os.path.realpath(sys.executable)
    uid = f"uid:{os.geteuid()}"
    world.ca.push(
        world.assignment(selectors=(uid, f"path:{program}")),
        world.assignment("/other", key_id="key-other", selectors=(uid, "path:/bin/true")),
        world.assignment("/hash", key_id="key-hash", selectors=(uid, f"sha256:{'0' * 64}")),
    )
    world.start()
    assert world.sign()
    for key_id in ("key-other", "key-hash"):
        with pytest.raises(KeyNotFound):
            world.sign(key_id)


def test_the_purpose_goes_on_untouched_and_the_key_server_refuses(world: Any) -> None:
    world.ca.push(world.assignment())
    world.start()
    with world.client() as client:
        for purpose in (Purpose.UNSPECIFIED, Purpose.DIGEST, 200):
            with pytest.raises(PurposeMismatch):
                client.sign("key-web", SCHEME, purpose, message=b"anything")
    assert world.key_server.purposes == [0, 10, 200]


def test_oversize_names_the_limit_and_malformed_closes(world: Any) -> None:
    world.ca.push(world.assignment())
    agent = world.start()
    with world.client() as client:
        with pytest.raises(MessageTooLarge, match="65536"):
            client.sign("key-web", SCHEME, 1, message=bytes(65_537))
        with pytest.raises(MalformedFrame, match="66000"):
            client.sign("key-web", SCHEME, 1, message=bytes(70_000))
    with world.client() as client, pytest.raises(MalformedFrame):
        client.sign("KEY", SCHEME, 1, message=b"m")
    agent.wait_event("sign_frame_malformed")
    assert world.sign()


def test_a_flood_of_connections_is_bounded(world: Any) -> None:
    world.socket_options = "max_connections_per_uid = 20"
    world.ca.push(world.assignment())
    agent = world.start()
    with world.client() as client:
        client.ping()
        flood = []
        for _ in range(200):
            one = socket.socket(socket.AF_UNIX)
            one.connect(str(world.socket))
            flood.append(one)
        with pytest.raises(RateLimited):
            world.sign()
        client.ping()
        assert len(os.listdir(f"/proc/{agent.pid}/fd")) < 120
        for one in flood:
            one.close()
    _until_signs(world)


def test_running_out_of_descriptors_is_survived(world: Any) -> None:
    world.ca.push(world.assignment())
    agent = world.start()
    with world.client() as client:
        client.ping()
        used = len(os.listdir(f"/proc/{agent.pid}/fd"))
        resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, (used + 11, used + 11))
        flood = []
        for _ in range(40):
            one = socket.socket(socket.AF_UNIX)
            one.connect(str(world.socket))
            flood.append(one)
        client.ping()
        for one in flood:
            one.close()
    _until_signs(world)


def _until_signs(world: Any, timeout: float = 15.0) -> None:
    """Signs as soon as that works again."""
    pause = threading.Event()
    for _ in range(int(timeout / 0.05)):
        try:
            world.sign()
        except KeyreeveError as error:
            last = error
            pause.wait(0.05)
        else:
            return
    raise last


def test_an_expired_svid_is_named(world: Any) -> None:
    world.ca.push(world.assignment())
    world.start()
    assert world.sign()
    world.ca.push(world.assignment(lifetime=timedelta(seconds=1)))  # comes into use, expired or not
    with pytest.raises(SvidExpired):
        _sign_on(world)


def _sign_on(world: Any) -> None:
    pause = threading.Event()
    for _ in range(200):
        world.sign()
        pause.wait(0.05)


def test_a_key_server_that_is_down_is_unavailable_within_the_deadline_and_comes_back(world: Any) -> None:
    world.ca.push(world.assignment())
    agent = world.start()
    assert world.sign()
    world.key_server.stop()
    with pytest.raises(Unavailable):
        world.sign(deadline=timedelta(seconds=3))
    agent.wait_event("key_server_lost")
    world.key_server.start()
    _until_signs(world)
    agent.wait_event("key_server_back")


def test_a_key_server_that_hangs_costs_only_the_deadline(world: Any) -> None:
    world.ca.push(world.assignment())
    world.start()
    assert world.sign()
    world.key_server.hold()
    with pytest.raises(DeadlineExceeded):
        world.sign(deadline=timedelta(milliseconds=300))
    world.key_server.release()
    _until_signs(world)


def test_the_ca_is_away_and_signing_goes_on_even_after_a_restart(world: Any) -> None:
    world.ca.push(world.assignment())
    agent = world.start()
    world.ca.stop()
    agent.wait_event("ca_lost")
    assert world.sign()
    agent.terminate()
    again = world.start()
    assert again.events_named("serving_kept_assignments")
    assert world.sign()
    world.ca.start()
    again.wait_event("ca_connected")


def test_a_removed_assignment_is_refused_at_once(world: Any) -> None:
    world.ca.push(world.assignment(), world.assignment("/second", key_id="key-second"))
    agent = world.start()
    with world.client() as client:
        client.sign("key-web", SCHEME, 1, message=b"m")
        world.ca.push(world.assignment("/second", key_id="key-second"))
        agent.wait_event("assignments_received", lambda event: event["usable"] == 1)
        with pytest.raises(KeyNotFound):
            client.sign("key-web", SCHEME, 1, message=b"m")
        client.sign("key-second", SCHEME, 1, message=b"m")


def test_wrong_and_foreign_assignments_are_refused_and_logged(world: Any) -> None:
    good, wrong = world.assignment(), world.assignment("/wrong", key_id="key-wrong")
    wrong.spki_der = good.spki_der
    foreign = world.assignment("/foreign", key_id="key-foreign")
    foreign.chain_der[:] = type(world.pki)("agent.test").svid("/foreign").chain_der
    world.ca.push(wrong, good, foreign)
    agent = world.start()
    assert world.sign()
    for key_id in ("key-wrong", "key-foreign"):
        agent.wait_event("assignment_refused", lambda event, key_id=key_id: event["entry_id"] == f"entry-{key_id}")
        with pytest.raises(KeyNotFound):
            world.sign(key_id)
    assert world.status()["refused_assignments"][0]["error"]["code"] == "svid_invalid"


def test_a_drain_answers_what_is_outstanding(world: Any) -> None:
    world.ca.push(world.assignment())
    agent = world.start()
    world.sign()
    world.key_server.arrived.get(timeout=5)
    world.key_server.hold()
    answers: list[bytes] = []
    asking = threading.Thread(target=lambda: answers.append(world.sign(deadline=timedelta(seconds=20))))
    asking.start()
    world.key_server.arrived.get(timeout=10)
    agent.process.terminate()
    agent.wait_event("agent_draining", lambda event: event["outstanding"] == 1)
    world.key_server.release()
    asking.join(10)
    assert len(answers) == 1
    assert agent.wait() == 0


def test_another_key_server_takes_over_without_a_failed_request(world: Any) -> None:
    replica = world.add_key_server()
    world.ca.push(world.assignment())
    world.start()
    assert world.sign()
    assert (world.key_server.signed["key-web"], replica.signed["key-web"]) == (1, 0)
    world.key_server.stop()
    for _ in range(5):
        assert world.sign()
    assert replica.signed["key-web"] == 5
