"""A key host whose clock steps, forward and back, while it serves. Front end and signer run under libfaketime: only the clock is not real."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from time import monotonic

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from keyreeve_client.audit.log_directory import LogDirectory
from keyreeve_client.audit.search import FoundRecord, Query, search_log
from keyreeve_common.errors import ErrorCode, KeyreeveError
from keyreeve_common.grpc_edge import error_from_rpc
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.v1 import keyserver_pb2
from keyreeve_testing.fault_table import row_of, write_rows
from keyreeve_testing.keyserver import KeyServerRig, Stubs, verify_p256
from keyreeve_testing.load import Load
from keyreeve_testing.pki import Svid, TestPki
from keyreeve_testing.processes import ManagedProcess

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
HOUR = timedelta(hours=1)
pytestmark = pytest.mark.skipif(not FAKETIME.exists(), reason="faketime is not installed")


@dataclass
class SteppedHost:
    rig: KeyServerRig
    offset_file: Path
    signer: ManagedProcess
    front_end: ManagedProcess
    lasting: Svid  # valid years before and after now

    def step(self, offset: timedelta) -> None:
        """The key host's clock is `offset` ahead of the true time from now on."""
        draft = self.offset_file.with_suffix(".new")
        draft.write_text(f"{offset.total_seconds():+.0f}\n")
        draft.rename(self.offset_file)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SteppedHost]:
    directory = tmp_path_factory.mktemp("clock")
    years = timedelta(days=3650)
    rig = KeyServerRig(directory / "ks", TestPki(lives=(years, years)))
    rig.signer_toml.write_text(rig.signer_toml.read_text() + "\n[listen]\nallowed_uids = [0]\n")
    offset_file = directory / "ks" / "offset"
    offset_file.write_text("+0\n")
    stepped = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(offset_file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_FORCE_MONOTONIC_FIX": "0",
    }
    socket = rig.directory / "signer.sock"
    signer = ManagedProcess(
        [sys.executable, "-m", "keyreeve_keyserver.signer", "--config", rig.signer_toml, "--listen", socket],
        name="signer",
        env=stepped,
        log_path=directory / "signer.log",
    )
    front_end = ManagedProcess(
        [sys.executable, "-m", "keyreeve_keyserver", "--config", rig.config, "--frontend-only"],
        name="front end",
        env=stepped,
        log_path=directory / "front-end.log",
    )
    with ExitStack() as stack:
        stack.enter_context(signer)
        stack.enter_context(front_end)
        signer.start_ready()
        front_end.start_ready()
        front_end.wait_event("signer_connected")
        now = datetime.now(UTC)
        rig.install_svid(not_before=now - years / 2, not_after=now + years / 2)
        lasting = rig.pki.svid("keyreeve/agent/lasting", not_before=now - years / 2, not_after=now + years / 2)
        yield SteppedHost(rig, offset_file, signer, front_end, lasting)


@pytest.fixture(autouse=True)
def true_time(host: SteppedHost) -> Iterator[None]:
    host.step(timedelta(0))
    yield
    host.step(timedelta(0))


def refusal(stubs: Stubs, key_id: str) -> KeyreeveError:
    with pytest.raises(grpc.RpcError) as refused:
        stubs.sign(key_id)
    return error_from_rpc(refused.value)


def granted_key(host: SteppedHost, name: str, *, expires_at: datetime | None = None) -> keyserver_pb2.Key:
    key = host.rig.create_key(name)
    stamp = Timestamp()
    if expires_at is not None:
        stamp.FromDatetime(expires_at)
    host.rig.grant(key.key_id, host.lasting.spiffe_id, expires_at=stamp if expires_at else None)
    return key


def test_steps_under_load_fail_no_signature_and_lose_no_record(host: SteppedHost) -> None:
    key = granted_key(host, "under-load")
    given: list[bytes] = []
    with host.rig.caller(host.lasting) as caller:

        def once() -> None:
            message = build_tls13_content(Purpose.TLS13_SERVER_VERIFY, secrets.token_bytes(32))
            caller.sign(key.key_id, message=message)
            given.append(sha256(message).digest())

        with Load("clock", once, failures=(grpc.RpcError,)) as load:
            load.wait_successes(10, within=60)
            began = monotonic()
            for offset in (HOUR, timedelta(0), -HOUR, timedelta(0)):
                host.step(offset)
                load.wait_successes(50, within=60)
            load.wait_successes(10, within=60)
    row = row_of(
        "clock of a key host stepped by an hour, ahead and back", began, handshakes=(), signatures=load.since(began)
    )
    found = search_log(LogDirectory(host.rig.audit_directory), Query(event="signature", key_id=key.key_id))
    recorded = {each.record.message_hash for each in found if isinstance(each, FoundRecord)}
    row = replace(row, records_lost=sum(1 for digest in given if digest not in recorded))
    write_rows("reliability-clock", [row])
    assert (row.signatures_failed, row.records_lost) == (0, 0)


@pytest.mark.parametrize("offset", [HOUR, -HOUR, timedelta(days=30), timedelta(days=-30)])
def test_signing_goes_on_over_a_connection_that_stands(host: SteppedHost, offset: timedelta) -> None:
    key = granted_key(host, f"stands-{offset.total_seconds():g}")
    with host.rig.caller(host.lasting) as caller:
        verify_p256(key.spki_der, caller.sign(key.key_id))
        host.step(offset)
        for _ in range(5):
            verify_p256(key.spki_der, caller.sign(key.key_id))
    with host.rig.caller(host.lasting) as again:
        verify_p256(key.spki_der, again.sign(key.key_id))


def test_grant_ends_by_the_clock_and_a_step_back_brings_nothing_but_its_time(host: SteppedHost) -> None:
    key = granted_key(host, "expires", expires_at=datetime.now(UTC) + HOUR)
    with host.rig.caller(host.lasting) as caller:
        caller.sign(key.key_id)
        host.step(2 * HOUR)
        assert refusal(caller, key.key_id).code is ErrorCode.KEY_NOT_FOUND
        host.step(timedelta(0))
        caller.sign(key.key_id)


def test_an_svid_that_the_clock_ends_is_refused_and_good_again_with_the_clock(host: SteppedHost) -> None:
    short = host.rig.pki.svid("keyreeve/agent/short")
    key = host.rig.create_key("short-lived")
    host.rig.grant(key.key_id, short.spiffe_id)
    with host.rig.caller(short) as caller:
        caller.sign(key.key_id)
        host.step(timedelta(days=30))
        assert refusal(caller, key.key_id).code is ErrorCode.SVID_EXPIRED
        host.step(timedelta(0))
        caller.sign(key.key_id)


def test_a_step_forward_destroys_no_key_early(host: SteppedHost) -> None:
    key = granted_key(host, "to-be-destroyed")
    with host.rig.local() as local:
        local.keys.DisableKey(keyserver_pb2.DisableKeyRequest(key_id=key.key_id), timeout=20)
        local.keys.DestroyKey(keyserver_pb2.DestroyKeyRequest(key_id=key.key_id), timeout=20)
        mark = len(host.front_end.events)
        host.step(timedelta(days=30))
        host.front_end.wait_event("clock_went_ahead", after=mark, timeout=60)
        found = local.keys.GetKey(keyserver_pb2.GetKeyRequest(key_id=key.key_id), timeout=20)
        assert found.state == keyserver_pb2.KEY_STATE_PENDING_DESTRUCTION


def test_neither_process_ended_or_met_a_fault_of_its_own(host: SteppedHost) -> None:
    """Runs last."""
    for process in (host.signer, host.front_end):
        assert process.running
        assert not [event for event in process.events if event.get("level") == "error" or "traceback" in event]
