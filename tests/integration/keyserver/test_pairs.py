"""Two pairs of front end and signer on one port: both serve, each keeps an audit log of its own, and one may die without the other."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic

import grpc
import pytest
from keyreeve_client.audit.log_directory import LogDirectory
from keyreeve_client.audit.search import FoundRecord, Query, search_log
from keyreeve_client.audit.verification import verify_log
from keyreeve_common.v1 import keyserver_pb2
from keyreeve_testing.keyserver import KeyServerRig, Stubs, verify_p256

AGENT = "keyreeve/agent/a"
CHANNELS = 24  # the kernel gives each connection to one of two: all to the same would be a chance of 2 in 2**24


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[KeyServerRig]:
    rig = KeyServerRig(tmp_path / "ks", extra="[supervisor]\npairs = 2\n")
    with rig.running():
        rig.process.wait_event("ready", lambda entry: entry["pair"] == 2)
        until(lambda: len(rig.process.events_named("listening")) == 2)
        yield rig


def until(condition: Callable[[], object], *, within: float = 30) -> None:
    """Asks again and again; each condition here asks another process, which takes its time."""
    end = monotonic() + within
    while not condition():
        assert monotonic() < end, "it did not come to pass"


@contextmanager
def channels(rig: KeyServerRig, count: int = CHANNELS) -> Iterator[list[Stubs]]:
    agent = rig.pki.svid(AGENT)
    with ExitStack() as stack:
        yield [stack.enter_context(rig.caller(agent)) for _ in range(count)]


def with_retries(stubs: Stubs, key_id: str, *, also: tuple[grpc.StatusCode, ...] = ()) -> bytes:
    """As an agent does: what was refused as unavailable is asked again, and what a process that ended left without an answer."""
    end = monotonic() + 30
    while True:
        try:
            return stubs.sign(key_id)
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, *also) or monotonic() > end:
                raise


def pids(rig: KeyServerRig, pair: int) -> tuple[int, int]:
    started = [entry for entry in rig.process.events_named("started") if entry["pair"] == pair][-1]
    return int(started["signer_pid"]), int(started["front_end_pid"])


def granted_key(rig: KeyServerRig) -> keyserver_pb2.Key:
    key = rig.create_key()
    rig.grant(key.key_id, rig.pki.spiffe_id(AGENT))
    with channels(rig) as callers:  # the grant was given at the first pair: the other learns of it as replicas do
        for stubs in callers:
            with_retries(stubs, key.key_id, also=(grpc.StatusCode.NOT_FOUND,))
    return key


def audit_directories(rig: KeyServerRig) -> list[Path]:
    return [rig.directory / "audit", rig.directory / "audit-2"]


def signatures_in(directory: Path) -> int:
    """After the log is verified."""
    log = LogDirectory(directory)
    assert verify_log(log, log.vkey()).findings == []
    found = search_log(log, Query())
    return sum(isinstance(each, FoundRecord) and each.record.event == "signature" for each in found)


def test_both_pairs_serve_one_port_and_each_has_a_log_that_verifies(rig: KeyServerRig) -> None:
    key = granted_key(rig)
    with channels(rig) as callers:
        for stubs in callers:
            verify_p256(key.spki_der, with_retries(stubs, key.key_id))
    assert rig.process.terminate() == 0
    counts = [signatures_in(directory) for directory in audit_directories(rig)]
    assert all(counts), counts
    assert sum(counts) >= 2 * CHANNELS
    origins = [LogDirectory(directory).vkey().name for directory in audit_directories(rig)]
    assert len(set(origins)) == 2


@pytest.mark.parametrize("victim", [0, 1], ids=["signer", "front-end"])
def test_a_killed_pair_costs_no_request_and_leaves_the_other_alone(rig: KeyServerRig, victim: int) -> None:
    key = granted_key(rig)
    other = pids(rig, 1)
    with channels(rig) as callers:
        for stubs in callers:
            with_retries(stubs, key.key_id)
        mark = len(rig.process.events)
        os.kill(pids(rig, 2)[victim], signal.SIGKILL)
        for stubs in callers:
            verify_p256(key.spki_der, with_retries(stubs, key.key_id))
        ended = rig.process.wait_event("process_ended", after=mark)
        assert ended["pair"] == 2
        rig.process.wait_event("ready", lambda entry: entry["pair"] == 2, after=mark)
        for stubs in callers:
            verify_p256(key.spki_der, with_retries(stubs, key.key_id))
    assert pids(rig, 1) == other
    assert rig.process.terminate() == 0
    assert sum(signatures_in(directory) for directory in audit_directories(rig)) >= 3 * CHANNELS


def test_a_revocation_at_one_pair_is_in_force_at_both(rig: KeyServerRig) -> None:
    key = granted_key(rig)
    with channels(rig) as callers:
        rig.revoke(key.key_id, rig.pki.spiffe_id(AGENT))

        def is_refused(stubs: Stubs) -> bool:
            try:
                stubs.sign(key.key_id)
            except grpc.RpcError as error:
                return error.code() is grpc.StatusCode.NOT_FOUND
            return False

        until(lambda: all(is_refused(stubs) for stubs in callers))


def test_hangup_renews_the_pairs_one_at_a_time(rig: KeyServerRig) -> None:
    key = granted_key(rig)
    before = pids(rig, 1), pids(rig, 2)
    with channels(rig) as callers:
        mark = len(rig.process.events)
        os.kill(rig.process.pid, signal.SIGHUP)
        while not any(entry["event"] == "pairs_renewed" for entry in rig.process.events[mark:]):
            for stubs in callers[:4]:
                verify_p256(key.spki_der, with_retries(stubs, key.key_id))
    order = [
        (entry["event"], entry["pair"]) for entry in rig.process.events[mark:] if entry["event"] in ("started", "ready")
    ]
    assert order == [("started", 1), ("ready", 1), ("started", 2), ("ready", 2)]
    assert not {*before[0], *before[1]} & {*pids(rig, 1), *pids(rig, 2)}


def test_the_second_pair_has_an_admin_socket_of_its_own_and_the_same_keys(rig: KeyServerRig) -> None:
    key = granted_key(rig)
    with grpc.insecure_channel(f"unix:{rig.directory}/run/admin-2.sock") as channel:
        stubs = Stubs(channel)
        until(
            lambda: [each.key_id for each in stubs.keys.ListKeys(keyserver_pb2.ListKeysRequest()).keys] == [key.key_id]
        )
        health = stubs.health.Check(keyserver_pb2.HealthRequest())
    assert health.serving
    assert health.HasField("svid_not_after")
