"""Kills, stops, full disks and locks: what recovers, what is refused, what is lost (nothing)."""

from __future__ import annotations

import os
import select
import signal
import socket
import sqlite3
import ssl
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from time import monotonic
from typing import TypeVar

import grpc
import pytest
from cryptography import x509
from keyreeve_common.errors import KeyreeveError
from keyreeve_common.grpc_edge import error_from_rpc
from keyreeve_common.v1 import keyserver_pb2, types_pb2
from keyreeve_testing.keyserver import KeyServerRig, create_request, sign_item, verify_p256
from keyreeve_testing.pki import TestPki
from keyreeve_testing.processes import ManagedProcess, ProcessFailed
from keyreeve_testing.softhsm import make_softhsm_token, softhsm_is_installed

AGENT = "keyreeve/agent/a"
T = TypeVar("T")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[KeyServerRig]:
    with KeyServerRig(tmp_path / "ks").running() as running:
        yield running


def until_answered(call: Callable[[], T], *, within: float = 20) -> T:
    """Retries while the server is away, as a client does."""
    deadline = monotonic() + within
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or monotonic() > deadline:
                raise


def refused(call: Callable[[], object]) -> KeyreeveError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return error_from_rpc(caught.value)


def test_killed_signer_comes_back(rig: KeyServerRig) -> None:
    agent = rig.pki.svid(AGENT)
    key = rig.create_key()
    rig.grant(key.key_id, agent.spiffe_id)
    with rig.caller(agent) as stubs:
        verify_p256(key.spki_der, stubs.sign(key.key_id))
        old = rig.pids()
        mark = len(rig.process.events)
        os.kill(old[0], signal.SIGKILL)
        rig.process.wait_ready()
        rig.process.wait_event("process_ended", lambda entry: entry["process"] == "signer", after=mark)
        verify_p256(key.spki_der, until_answered(lambda: stubs.sign(key.key_id)))
    assert rig.pids() != old


def test_requests_in_flight_get_unavailable(rig: KeyServerRig) -> None:
    agent = rig.pki.svid(AGENT)
    key = rig.create_key()
    rig.grant(key.key_id, agent.spiffe_id)
    out: SimpleQueue[keyserver_pb2.SignBatch | None] = SimpleQueue()
    with rig.caller(agent) as stubs:
        stubs.sign(key.key_id)
        call = stubs.signing.SignStream(iter(out.get, None))
        out.put(keyserver_pb2.SignBatch(items=[sign_item(0, key.key_id)]))
        assert next(call).results[0].signature
        signer = rig.pids()[0]
        os.kill(signer, signal.SIGSTOP)  # so that the batch is surely in flight when the signer dies
        out.put(keyserver_pb2.SignBatch(items=[sign_item(number, key.key_id) for number in range(1, 9)]))
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(next, call)
            with pytest.raises(TimeoutError):
                answer.result(0.3)
            os.kill(signer, signal.SIGKILL)
            results = answer.result(10).results
        assert [result.error.code for result in results] == ["unavailable"] * 8
        assert all(result.error.HasField("retry_after") for result in results)
        call.cancel()
        rig.process.wait_ready()
        until_answered(lambda: stubs.sign(key.key_id))


def test_killed_front_end_comes_back(rig: KeyServerRig) -> None:
    agent = rig.pki.svid(AGENT)
    key = rig.create_key()
    rig.grant(key.key_id, agent.spiffe_id)
    os.kill(rig.pids()[1], signal.SIGKILL)
    rig.process.wait_ready()
    with rig.caller(agent) as stubs:
        verify_p256(key.spki_der, until_answered(lambda: stubs.sign(key.key_id)))


def test_killed_supervisor_leaves_no_orphans(rig: KeyServerRig) -> None:
    pids = rig.pids()
    handles = [os.pidfd_open(pid) for pid in pids]
    rig.process.kill()
    for handle in handles:
        assert _ended(handle, within=20), rig.process.log_tail()
        os.close(handle)


def _ended(pidfd: int, *, within: float) -> bool:
    return bool(select.select([pidfd], [], [], within)[0])


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("backend", ["software", pytest.param("hsm", marks=pytest.mark.softhsm)])
def test_crash_during_creation_and_retry_give_one_key(tmp_path: Path, victim: int, backend: str) -> None:
    if backend == "hsm" and not softhsm_is_installed():
        pytest.skip("softhsm2 is not installed")
    token = make_softhsm_token(tmp_path / "token") if backend == "hsm" else None
    with KeyServerRig(tmp_path / "ks", token=token, default_backend=backend).running() as rig:
        with rig.local() as local:
            future = local.keys.CreateKey.future(create_request("crash", key_type=types_pb2.KEY_TYPE_RSA_2048))
            _wait_for_intent(rig, "crash")
            os.kill(rig.pids()[victim], signal.SIGKILL)
            future.exception(timeout=30)
        rig.process.wait_ready()
        request = create_request("crash", key_type=types_pb2.KEY_TYPE_RSA_2048)
        with rig.local() as local:
            key = until_answered(lambda: local.keys.CreateKey(request, timeout=60))
            again = local.keys.CreateKey(request, timeout=60)
            listed = local.keys.ListKeys(keyserver_pb2.ListKeysRequest()).keys
        assert key.key_id == again.key_id
        assert [entry.key_id for entry in listed] == [key.key_id]


def _wait_for_intent(rig: KeyServerRig, request_id: str) -> None:
    with sqlite3.connect(rig.state / "catalog.sqlite3", timeout=10) as database:
        deadline = monotonic() + 20
        query = "SELECT count(*) FROM keyreeve_keys WHERE request_id = ?"
        while database.execute(query, (request_id,)).fetchone() == (0,):
            assert monotonic() < deadline
    database.close()


@pytest.mark.softhsm
@pytest.mark.skipif(not softhsm_is_installed(), reason="softhsm2 is not installed")
def test_keys_of_a_token_sign_and_cannot_leave(tmp_path: Path) -> None:
    token = make_softhsm_token(tmp_path / "token")
    with KeyServerRig(tmp_path / "ks", token=token, default_backend="hsm").running() as rig:
        agent = rig.pki.svid(AGENT)
        key = rig.create_key()
        assert key.backend == "hsm"
        assert key.attributes.sensitive
        assert not key.attributes.extractable
        assert key.attributes.generated_in_token
        rig.grant(key.key_id, agent.spiffe_id)
        with rig.caller(agent) as stubs:
            verify_p256(key.spki_der, stubs.sign(key.key_id))
            os.kill(rig.pids()[0], signal.SIGKILL)
            rig.process.wait_ready()
            verify_p256(key.spki_der, until_answered(lambda: stubs.sign(key.key_id)))


def test_catalog_locked_by_another_process(tmp_path: Path) -> None:
    with KeyServerRig(tmp_path / "ks", catalog='busy_timeout = "200ms"').running() as rig:
        agent = rig.pki.svid(AGENT)
        key = rig.create_key()
        rig.grant(key.key_id, agent.spiffe_id)
        database = sqlite3.connect(rig.state / "catalog.sqlite3", isolation_level=None)
        database.execute("BEGIN IMMEDIATE")
        error = refused(lambda: rig.create_key("other"))
        assert error.code.value == "storage_busy"
        assert error.retry_after
        with rig.caller(agent) as stubs:
            verify_p256(key.spki_der, stubs.sign(key.key_id))
        database.close()
        assert rig.create_key("other").key_id


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k,mode=700", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> None:
    """Writes until nothing more fits."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 1024)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        config = f'path = "{disk}/catalog.sqlite3"'
        with KeyServerRig(tmp_path / "ks", catalog=config).running() as rig:
            agent = rig.pki.svid(AGENT)
            key = rig.create_key()
            rig.grant(key.key_id, agent.spiffe_id)
            filler = disk / "filler"
            fill(filler)
            made, error = 1, None
            while error is None and made < 2000:
                try:
                    rig.create_key(f"fill-{made}")
                    made += 1
                except grpc.RpcError as caught:
                    error = error_from_rpc(caught)
            assert error is not None
            assert error.code.value == "storage_full"
            assert "free some" in error.detail
            with rig.caller(agent) as stubs:
                verify_p256(key.spki_der, stubs.sign(key.key_id))
            filler.unlink()
            rig.create_key(f"fill-{made}")
            with rig.local() as local:
                listed = local.keys.ListKeys(keyserver_pb2.ListKeysRequest(page_size=1000)).keys
            assert len(listed) == made + 1
            assert key.key_id in [entry.key_id for entry in listed]


def test_first_start_waits_for_an_svid(tmp_path: Path) -> None:
    with KeyServerRig(tmp_path / "ks").running(initialised=False) as rig:
        assert rig.process.wait_event("waiting_for_svid")["detail"] == "run: keyreeve init"
        with rig.local() as local:
            health = local.health.Check(keyserver_pb2.HealthRequest())
            assert not health.serving
            assert "keyreeve init" in health.detail
        agent = rig.pki.svid(AGENT)
        with rig.caller(agent) as stubs:
            assert refused(lambda: stubs.sign("k-x")).code.value == "unavailable"
        rig.install_svid()
        rig.process.wait_event("listening")
        with rig.caller(agent) as stubs:
            assert stubs.health.Check(keyserver_pb2.HealthRequest(), timeout=10).serving


def test_svid_that_expired_while_we_were_down(tmp_path: Path) -> None:
    with KeyServerRig(tmp_path / "ks").running() as rig:
        rig.process.terminate()
        expired = rig.pki.expired_svid("keyreeve/keyserver")
        (rig.state / "svid.pem").write_bytes(expired.chain_pem)
        rig.process.start_ready()
        assert rig.process.wait_event("installed_svid_not_usable")["code"] == "svid_expired"
        rig.process.wait_event("waiting_for_svid")
        mark = len(rig.process.events)
        rig.install_svid()
        rig.process.wait_event("listening", after=mark)


def test_svids_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    with KeyServerRig(tmp_path / "ks").running(initialised=False) as rig, rig.local() as local:
        csr = local.identity.GetCsr(keyserver_pb2.GetCsrRequest(spiffe_id=rig.spiffe_id)).csr_der

        def install(chain: list[bytes]) -> KeyreeveError:
            return refused(lambda: local.identity.InstallSvid(rig.install_request(chain)))

        assert "not of this key server's key" in install(rig.pki.svid("keyreeve/keyserver").chain_der).detail
        wrong_id = rig.pki.svid_for_csr(csr, rig.pki.spiffe_id("keyreeve/other"))
        assert "expected is" in install(wrong_id).detail
        foreign = rig.pki.svid_for_csr(csr, "spiffe://evil.example/keyreeve/keyserver")
        assert install(foreign).code.value == "foreign_trust_domain"
        other_root = TestPki(rig.pki.trust_domain).svid_for_csr(csr, rig.spiffe_id)
        assert install(other_root).code.value == "svid_invalid"
        assert install([b"nonsense"]).code.value == "svid_invalid"
        assert install([]).code.value == "svid_invalid"
        assert not (rig.state / "svid.pem").exists()


def test_new_svid_does_not_drop_open_streams(rig: KeyServerRig) -> None:
    agent = rig.pki.svid(AGENT)
    key = rig.create_key()
    rig.grant(key.key_id, agent.spiffe_id)
    out: SimpleQueue[keyserver_pb2.SignBatch | None] = SimpleQueue()
    with rig.caller(agent) as stubs:
        call = stubs.signing.SignStream(iter(out.get, None))
        out.put(keyserver_pb2.SignBatch(items=[sign_item(1, key.key_id)]))
        assert next(call).results[0].signature
        before = (rig.state / "svid.pem").read_bytes()
        with rig.caller(rig.pki.svid("keyreeve/ca")) as ca:  # the CA renews over mTLS
            csr = ca.identity.GetCsr(keyserver_pb2.GetCsrRequest()).csr_der
            ca.identity.InstallSvid(rig.install_request(rig.pki.svid_for_csr(csr, rig.spiffe_id)))
        assert (rig.state / "svid.pem").read_bytes() != before
        out.put(keyserver_pb2.SignBatch(items=[sign_item(2, key.key_id)]))
        assert next(call).results[0].signature
        out.put(None)
        assert list(call) == []
    context = ssl.create_default_context(cadata=rig.pki.bundle_pem.decode())
    context.check_hostname = False
    context.load_cert_chain(*agent.write(rig.directory))
    with socket.create_connection(("127.0.0.1", rig.port)) as raw, context.wrap_socket(raw) as tls:
        shown = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")
    assert shown in x509.load_pem_x509_certificates((rig.state / "svid.pem").read_bytes())


def test_sigterm_drains(rig: KeyServerRig) -> None:
    agent = rig.pki.svid(AGENT)
    key = rig.create_key()
    rig.grant(key.key_id, agent.spiffe_id)
    out: SimpleQueue[keyserver_pb2.SignBatch | None] = SimpleQueue()
    with rig.caller(agent) as stubs:
        stubs.sign(key.key_id)
        call = stubs.signing.SignStream(iter(out.get, None))
        out.put(keyserver_pb2.SignBatch(items=[sign_item(0, key.key_id)]))
        assert next(call).results[0].signature
        signer = rig.pids()[0]
        os.kill(signer, signal.SIGSTOP)
        out.put(keyserver_pb2.SignBatch(items=[sign_item(1, key.key_id)]))
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(next, call)
            with pytest.raises(TimeoutError):
                answer.result(0.3)
            mark = len(rig.process.events)
            rig.process.process.send_signal(signal.SIGTERM)
            rig.process.wait_event("draining", after=mark)
            os.kill(signer, signal.SIGCONT)
            verify_p256(key.spki_der, answer.result(10).results[0].signature)
        assert refused(lambda: next(call)).code.value == "unavailable"
    assert rig.process.wait() == 0
    assert not rig.admin_socket.exists()


@pytest.mark.softhsm
@pytest.mark.skipif(not softhsm_is_installed(), reason="softhsm2 is not installed")
def test_wrong_pin_is_not_tried_again(tmp_path: Path) -> None:
    token = make_softhsm_token(tmp_path / "token")
    token.pin_file.write_text("wrong-pin\n")
    rig = KeyServerRig(tmp_path / "ks", token=token, default_backend="hsm")
    with rig.process:
        rig.process.start()
        assert rig.process.wait() == 77
        assert len(rig.process.events_named("started")) == 1
        assert "PIN" in rig.process.events_named("not_restarted")[0]["detail"]


def test_wrong_signer_configuration_ends_the_supervisor(tmp_path: Path) -> None:
    rig = KeyServerRig(tmp_path / "ks")
    rig.signer_toml.write_text("nonsense = 1\n")
    with rig.process:
        rig.process.start()
        assert rig.process.wait() == 78
        assert len(rig.process.events_named("started")) == 1


def test_restarts_are_bounded(tmp_path: Path) -> None:
    extra = '[supervisor]\nmax_restarts = 2\nbackoff = "10ms"'
    with KeyServerRig(tmp_path / "ks", extra=extra).running() as rig:
        for _ in range(2):
            os.kill(rig.pids()[0], signal.SIGKILL)
            rig.process.wait_ready()
        os.kill(rig.pids()[0], signal.SIGKILL)
        assert rig.process.wait() == 69
        assert rig.process.events_named("gave_up")


def test_check_config(tmp_path: Path) -> None:
    rig = KeyServerRig(tmp_path / "ks")
    check = ManagedProcess.python_module("keyreeve_keyserver", "--config", rig.config, "--check-config")
    with check:
        assert check.start().wait() == 0
    rig.config.write_text(rig.config.read_text() + "colour = 1\n")
    with check:
        assert check.start().wait() == 78
        assert "catalog.colour: unknown key" in check.log


def test_second_server_on_the_same_state_is_refused(rig: KeyServerRig) -> None:
    second = ManagedProcess.python_module("keyreeve_keyserver", "--config", rig.config, "--frontend-only")
    with second, pytest.raises(ProcessFailed, match="another front end runs"):
        second.start_ready()


def test_open_directory_of_the_admin_socket_is_refused(tmp_path: Path) -> None:
    rig = KeyServerRig(tmp_path / "ks")
    rig.admin_socket.parent.mkdir(mode=0o755)
    rig.admin_socket.parent.chmod(0o755)
    with rig.process:
        assert rig.process.start().wait() == 78
        assert "chmod 700" in rig.process.log


def test_front_end_and_signer_as_separate_units(tmp_path: Path) -> None:
    rig = KeyServerRig(tmp_path / "ks")
    rig.signer_toml.write_text(rig.signer_toml.read_text() + f"[listen]\nallowed_uids = [{os.getuid()}]\n")
    listen = rig.directory / "signer.sock"
    arguments = ("--config", rig.signer_toml, "--listen", listen)
    signer = ManagedProcess.python_module("keyreeve_keyserver.signer", *arguments)
    rig.process = ManagedProcess.python_module("keyreeve_keyserver", "--config", rig.config, "--frontend-only")
    with rig.process, signer:
        rig.process.start_ready()
        rig.process.wait_event("signer_not_reachable")
        rig.install_svid()
        assert refused(rig.create_key).code.value == "unavailable"
        signer.start_ready()
        rig.process.wait_event("signer_connected")
        agent = rig.pki.svid(AGENT)
        key = rig.create_key()
        rig.grant(key.key_id, agent.spiffe_id)
        out: SimpleQueue[keyserver_pb2.SignBatch | None] = SimpleQueue()
        with rig.caller(agent) as stubs:
            call = stubs.signing.SignStream(iter(out.get, None))
            out.put(keyserver_pb2.SignBatch(items=[sign_item(1, key.key_id)]))
            assert next(call).results[0].signature
            mark = len(rig.process.events)
            signer.kill()
            rig.process.wait_event("signer_lost", after=mark)
            out.put(keyserver_pb2.SignBatch(items=[sign_item(2, key.key_id)]))
            assert next(call).results[0].error.code == "unavailable"
            signer.start_ready()
            rig.process.wait_event("signer_connected", after=mark)
            out.put(keyserver_pb2.SignBatch(items=[sign_item(3, key.key_id)]))
            assert next(call).results[0].signature
            out.put(None)
            assert list(call) == []
