"""HAProxy with `ssl-mode-async`: signatures of several handshakes are in flight on one thread."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_agent import FakeAgent
from keyreeve_testing.processes import free_port
from provider_support import PROVIDER_DIR, Authority, Identity, accepts, handshake, running, wait_until

HAPROXY = "/usr/sbin/haproxy"
CLIENTS = 10
DELAY_SECONDS = 0.3


def write_configuration(work: Path, identity: Identity, port: int, *, asynchronous: bool) -> Path:
    both = work / "haproxy.pem"
    both.write_text(identity.certificate_file.read_text() + identity.reference_file.read_text())
    path = work / "haproxy.cfg"
    path.write_text(
        "global\n  nbthread 1\n  ssl-provider-path " + str(PROVIDER_DIR) + "\n"
        "  ssl-provider default\n  ssl-provider keyreeve\n"
        + ("  ssl-mode-async\n" if asynchronous else "")
        + "defaults\n  mode http\n  timeout connect 5s\n  timeout client 20s\n  timeout server 20s\n"
        f"frontend test\n  bind 127.0.0.1:{port} ssl crt {both} ssl-min-ver TLSv1.3\n"
        "  http-request return status 200 content-type text/plain string 'served by keyreeve'\n"
    )
    return path


def handshakes_at_once(port: int, authority: Authority) -> tuple[float, list[bytes | Exception]]:
    outcomes: list[bytes | Exception] = []

    def client() -> None:
        try:
            outcomes.append(handshake(port, authority))
        except Exception as error:
            outcomes.append(error)

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    before = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - before, outcomes


@pytest.mark.parametrize("kind", ["ec-p256", "ec-p384", "rsa-2048", "rsa-4096", "ed25519"])
@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "blocking"])
def test_signatures_overlap_where_the_application_lets_them(
    kind: str,
    asynchronous: bool,
    work: Path,
    agent: FakeAgent,
    authority: Authority,
    identity_of: Callable[[str], Identity],
) -> None:
    port = free_port()
    configuration = write_configuration(work, identity_of(kind), port, asynchronous=asynchronous)
    agent.delay = DELAY_SECONDS if asynchronous else DELAY_SECONDS / 10
    with running(
        [HAPROXY, "-db", "-f", str(configuration)], log=work / "haproxy.log", env={"PATH": os.environ["PATH"]}
    ):
        wait_until(lambda: accepts(port), "HAProxy")
        took, outcomes = handshakes_at_once(port, authority)
        assert all(isinstance(outcome, bytes) and b"served by keyreeve" in outcome for outcome in outcomes), outcomes
        if asynchronous:
            assert agent.most_at_once > CLIENTS // 2
            assert took < CLIENTS * DELAY_SECONDS / 2
        else:
            assert agent.most_at_once == 1


def test_async_keeps_the_deadline(
    work: Path, agent: FakeAgent, authority: Authority, identity_of: Callable[[str], Identity]
) -> None:
    """The default deadline of 3 s ends handshakes whose agent is silent, though nothing arrives on the socket."""
    port = free_port()
    configuration = write_configuration(work, identity_of("ec-p256"), port, asynchronous=True)
    agent.delay = 30.0
    with running(
        [HAPROXY, "-db", "-f", str(configuration)], log=work / "haproxy.log", env={"PATH": os.environ["PATH"]}
    ):
        wait_until(lambda: accepts(port), "HAProxy")
        took, outcomes = handshakes_at_once(port, authority)
        assert all(isinstance(outcome, OSError) for outcome in outcomes), outcomes
        assert took < 10
        agent.delay = 0.0
        assert b"served by keyreeve" in handshake(port, authority)


def test_async_survives_clients_that_leave(
    work: Path, agent: FakeAgent, authority: Authority, identity_of: Callable[[str], Identity]
) -> None:
    """A client goes while its signature is on the way: nothing is left open, and later clients are served."""
    port = free_port()
    configuration = write_configuration(work, identity_of("ec-p256"), port, asynchronous=True)
    context = ssl.create_default_context(cadata=authority.pem)

    def leave(seconds: float) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=seconds) as raw, pytest.raises(TimeoutError):
            context.wrap_socket(raw, server_hostname="localhost")

    with running(
        [HAPROXY, "-db", "-f", str(configuration)], log=work / "haproxy.log", env={"PATH": os.environ["PATH"]}
    ) as haproxy:
        descriptors = Path(f"/proc/{haproxy.pid}/fd")
        wait_until(lambda: accepts(port), "HAProxy")
        at_rest: list[int] = []
        for _ in range(3):
            agent.delay = DELAY_SECONDS
            leavers = [threading.Thread(target=leave, args=(DELAY_SECONDS / 3,)) for _ in range(CLIENTS)]
            for leaver in leavers:
                leaver.start()
            for leaver in leavers:
                leaver.join()
            agent.delay = 0.0
            assert b"served by keyreeve" in handshake(port, authority)
            if at_rest:
                wait_until(lambda: len(list(descriptors.iterdir())) <= at_rest[0] + 2, "descriptors to be closed")
            else:
                wait_until(lambda: len(list(descriptors.iterdir())) < 40, "descriptors to be closed")
                at_rest.append(len(list(descriptors.iterdir())))
