"""The whole of Keyreeve under stock nginx: every kind of key, a thousand handshakes in a row, reloads under load, no handshake lost."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from keyreeve_common.schemes import key_type_of
from keyreeve_testing.softhsm import softhsm_is_installed
from keyreeve_testing.stack import NGINX, Served, Stack, StackConfig

pytestmark = [
    pytest.mark.native,
    pytest.mark.softhsm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not softhsm_is_installed() or not Path(NGINX).exists(), reason="needs softhsm2 and nginx"),
]

KINDS = {"p256": "ec-p256", "p384": "ec-p384", "rsa": "rsa-2048", "ed": "ed25519"}
HANDSHAKES = 1000
RELOADS = 5
# A server of Python's ssl with a key reference, as in the provider's README; one connection, then it ends.
PYTHON_SERVER = """
import socket, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.minimum_version = ssl.TLSVersion.TLSv1_3
context.load_cert_chain(sys.argv[1], sys.argv[2])
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    connection, _ = listener.accept()
    with context.wrap_socket(connection, server_side=True) as tls:
        tls.sendall(b"python")
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    served = tuple(Served(name, f"/ns/web/sa/{name}", key_type) for name, key_type in KINDS.items())
    with Stack(StackConfig(directory=tmp_path_factory.mktemp("stack") / "files", served=served)) as running:
        # The Python server of these tests is root's, nginx's workers are another user's: both are delegates.
        for name in KINDS:
            running.cli("entry", "update", running.entries[name], "--delegate", f"unix:user:{running.worker_user}",
                        "--delegate", f"unix:uid:{os.geteuid()}")  # fmt: skip
        yield running


@pytest.mark.parametrize("name", KINDS)
def test_nginx_serves_each_kind_of_key(stack: Stack, name: str) -> None:
    certificate = stack.handshake(name)
    assert key_type_of(certificate.public_key()).value == KINDS[name]
    assert stack.curl(name).ok
    key = stack.key_of(f"/ns/web/sa/{name}")
    assert key["attributes"]["token"] == "keyreeve-demo"
    assert key["attributes"]["extractable"] is False
    assert key["attributes"]["sensitive"] is True


@pytest.mark.parametrize("name", KINDS)
def test_python_serves_each_kind_of_key(stack: Stack, name: str) -> None:
    files = stack.svid_dir(name)
    with subprocess.Popen(
        [sys.executable, "-c", PYTHON_SERVER, str(files / "chain.pem"), str(files / "key.pem")],
        env=stack.openssl_env(), stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        port = int(server.stdout.readline())
        context = ssl.create_default_context(cafile=str(stack.bundle))
        import socket

        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
            context.wrap_socket(raw, server_hostname=stack.dns_name(name)) as tls,
        ):
            assert tls.recv(16) == b"python"


def test_a_thousand_handshakes_in_a_row(stack: Stack) -> None:
    before = stack.key_of("/ns/web/sa/p256")["signatures"]
    for _ in range(HANDSHAKES):
        stack.handshake("p256")
    assert stack.key_of("/ns/web/sa/p256")["signatures"] - before == HANDSHAKES


def test_reloads_under_load_fail_no_handshake(stack: Stack) -> None:
    failures: list[str] = []
    done = threading.Event()
    counts = [0, 0, 0, 0]

    def shake(number: int) -> None:
        while not done.is_set():
            try:
                stack.handshake("p256")
            except OSError as error:
                failures.append(str(error))
            counts[number] += 1

    threads = [threading.Thread(target=shake, args=(number,)) for number in range(len(counts))]
    for thread in threads:
        thread.start()
    for _ in range(RELOADS):
        workers, seen = stack.nginx_workers(), sum(counts)
        assert (
            subprocess.run([*stack.nginx_command(), "-s", "reload"], env=stack.openssl_env(), check=False).returncode
            == 0
        )
        stack.wait_until(lambda old=workers: bool(stack.nginx_workers() - old), "new workers")  # type: ignore[misc]
        stack.wait_until(lambda old=seen: sum(counts) > old + 100, "a hundred more handshakes")  # type: ignore[misc]
    done.set()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert sum(counts) > RELOADS * 100


def test_a_renewed_agent_svid_and_a_restarted_agent_lose_nothing(stack: Stack) -> None:
    """The agent is ended and started again without a token: its key is in its state directory, which outlives the process."""
    agent = stack.processes["agent"]
    assert agent.terminate() == 0
    agent.start_ready()
    assert stack.curl("p256").ok


def test_the_doctor_finds_nothing_wrong(stack: Stack) -> None:
    from keyreeve_testing.stack import PROVIDER

    report = stack.cli("doctor", "--config-dir", str(stack.etc), "--provider", str(PROVIDER.parent),
                       "--proxy-user", stack.worker_user)  # fmt: skip
    assert report["failed"] == 0
    assert report["ok"] > 25
