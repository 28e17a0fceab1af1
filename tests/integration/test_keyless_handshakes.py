"""The whole path with real parts: nginx and Python `ssl` hold references, the keys are in SoftHSM, every handshake is signed remotely."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from keyreeve_common.schemes import key_type_of
from keyreeve_testing.stack import PROVIDER, Served, Stack, StackConfig

pytestmark = [pytest.mark.native, pytest.mark.softhsm, pytest.mark.timeout(300)]

SERVED = (
    Served("frontend", "/ns/web/sa/frontend", mutual=True),
    Served("p256", "/ns/web/sa/p256", "ec-p256"),
    Served("p384", "/ns/web/sa/p384", "ec-p384"),
    Served("rsa2048", "/ns/web/sa/rsa2048", "rsa-2048"),
    Served("ed25519", "/ns/web/sa/ed25519", "ed25519"),
)
TYPES = [pytest.param(served.name, served.key_type, id=served.key_type) for served in SERVED[1:]]
PYTHON_SERVER = """
import os, socket, ssl, sys
chain, key, uid, gid = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.minimum_version = ssl.TLSVersion.TLSv1_3
context.load_cert_chain(chain, key)          # loads without the network, as root
os.setgroups([]); os.setgid(int(gid)); os.setuid(int(uid))
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
raw, _ = listener.accept()
with context.wrap_socket(raw, server_side=True) as tls:   # signs as the worker's user
    tls.sendall(b"hello")
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    config = StackConfig(tmp_path_factory.mktemp("stack") / "keyreeve", served=SERVED)
    with Stack(config) as running:
        yield running


@pytest.mark.parametrize(("name", "key_type"), TYPES)
def test_nginx_serves_with_a_key_born_in_the_token(stack: Stack, name: str, key_type: str) -> None:
    path = f"/ns/web/sa/{name}"
    before = stack.key_of(path)
    certificate = stack.handshake(name)
    after = stack.key_of(path)
    assert key_type_of(certificate.public_key()).value == key_type
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey)
    assert after["signatures"] == before["signatures"] + 1
    assert after["backend"] == "softhsm"
    assert after["attributes"]["extractable"] is False
    assert after["attributes"]["sensitive"] is True
    assert after["attributes"]["generated_in_token"] is True


@pytest.mark.parametrize(("name", "key_type"), TYPES)
def test_python_ssl_serves_with_the_same_reference(stack: Stack, name: str, key_type: str) -> None:
    del key_type
    files, user = stack.svid_dir(name), pwd.getpwnam(stack.worker_user)
    server = subprocess.Popen(
        [
            sys.executable,
            "-c",
            PYTHON_SERVER,
            str(files / "chain.pem"),
            str(files / "key.pem"),
            str(user.pw_uid),
            str(user.pw_gid),
        ],
        env=stack.openssl_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        assert port, server.communicate(timeout=10)[1]
        host = stack.dns_name(name)
        fetch = subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", host, "-verify_hostname", host,
             "-CAfile", str(stack.bundle), "-verify_return_error", "-tls1_3", "-quiet"],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False,
        )  # fmt: skip
        assert fetch.stdout == b"hello", fetch.stderr.decode()
        assert server.wait(10) == 0
    finally:
        server.kill()
        server.communicate()


def test_mutual_tls_with_both_keys_remote(stack: Stack) -> None:
    server, client = stack.key_of("/ns/web/sa/frontend"), stack.key_of("/ns/web/sa/client")
    page = stack.curl("frontend")
    assert page.ok, page.error
    assert stack.key_of("/ns/web/sa/frontend")["signatures"] == server["signatures"] + 1
    assert stack.key_of("/ns/web/sa/client")["signatures"] == client["signatures"] + 1


def test_a_user_whom_no_entry_names_gets_no_signature(stack: Stack) -> None:
    """The client's identity belongs to the user who runs the tests; nginx's user may read its reference and still not use it."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    reference = (stack.svid_dir("client") / "key.pem").read_bytes()
    copy = stack.run_dir / "www" / "reference.pem"
    copy.write_bytes(reference)
    copy.chmod(0o644)
    user = pwd.getpwnam(stack.worker_user)
    settings = stack.run_dir / "www" / "openssl.cnf"
    provider = Path(shutil.copy(PROVIDER, stack.run_dir / "www"))  # the clone may lie where that user cannot go
    settings.write_text(stack.openssl_conf.read_text().replace(str(PROVIDER), str(provider)))
    done = subprocess.run(
        ["openssl", "req", "-new", "-subj", "/CN=x", "-config", "/etc/ssl/openssl.cnf", "-key", str(copy)],
        env={**stack.openssl_env(), "OPENSSL_CONF": str(settings)}, user=user.pw_uid, group=user.pw_gid, extra_groups=[], cwd="/",
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    copy.unlink()
    settings.unlink()
    provider.unlink()
    assert done.returncode != 0
    assert "key_not_found" in done.stderr


def test_a_thousand_handshakes_in_a_row(stack: Stack) -> None:
    before = stack.key_of("/ns/web/sa/p256")["signatures"]
    for _ in range(1000):
        stack.handshake("p256")
    assert stack.key_of("/ns/web/sa/p256")["signatures"] == before + 1000


@dataclass
class Load:
    """Handshakes without a pause from several threads until told to stop."""

    stack: Stack
    stop: threading.Event = field(default_factory=threading.Event)
    done: int = 0
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                self.stack.handshake("p256")
            except OSError as error:
                with self.lock:
                    self.failures.append(repr(error))
            with self.lock:
                self.done += 1

    def count(self) -> int:
        with self.lock:
            return self.done


def test_reloads_under_load_fail_no_handshake(stack: Stack) -> None:
    assert stack.nginx is not None
    load = Load(stack)
    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(load.run) for _ in range(4)]
        try:
            for _ in range(5):
                reached, old = load.count() + 20, stack.nginx_workers()
                stack.nginx.send_signal(signal.SIGHUP)
                stack.wait_until(lambda old=old: not (stack.nginx_workers() & old), "the old workers to go")
                stack.wait_until(lambda reached=reached: load.count() >= reached, "handshakes with the new workers")
        finally:
            load.stop.set()
        for future in futures:
            future.result()
    assert load.failures == []
    assert load.done >= 100


def test_a_restarted_agent_needs_no_new_token(stack: Stack) -> None:
    """Its key is in its state directory, which outlives the process."""
    agent = stack.processes["agent"]
    assert agent.terminate() == 0
    agent.start_ready()
    assert stack.curl("frontend").ok


def test_the_doctor_finds_nothing_wrong(stack: Stack) -> None:
    report = stack.cli("doctor", "--config-dir", str(stack.etc), "--provider", str(PROVIDER.parent),
                       "--proxy-user", stack.worker_user)  # fmt: skip
    assert report["failed"] == 0
    assert report["ok"] > 25
