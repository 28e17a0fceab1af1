"""Debian's nginx with key references: keys load in its master, signatures are asked for in its workers."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fake_agent import FakeAgent
from keyreeve_common.purposes import Purpose
from nginx_server import Nginx
from provider_support import KEY_MAKERS, Authority, Identity, environment, handshake, wait_until, write_openssl_conf

VERIFY_EVERY = 64  # KEYREEVE_VERIFY_EVERY of client/openssl-provider/src/key.h
HANDSHAKE_KINDS = ["ec-p256", "ec-p384", "rsa-2048", "ed25519"]
SCHEMES = {
    "ec-p256": 0x0403,
    "ec-p384": 0x0503,
    "rsa-2048": 0x0804,
    "rsa-3072": 0x0804,
    "rsa-4096": 0x0804,
    "ed25519": 0x0807,
}


@pytest.mark.parametrize("kind", HANDSHAKE_KINDS)
def test_handshakes_are_signed_by_the_agent(
    kind: str,
    agent: FakeAgent,
    authority: Authority,
    identity_of: Callable[[str], Identity],
    nginx: Callable[..., Nginx],
) -> None:
    with nginx(identity_of(kind)) as server:
        assert not agent.requests, "loading a key asked for a signature"
        assert agent.connections == 0, "loading a key opened a connection"
        for _ in range(5):
            assert b"served by keyreeve" in handshake(server.port, authority)
    assert len(agent.requests) == 5
    assert {request.scheme for request in agent.requests} == {SCHEMES[kind]}
    assert {request.purpose for request in agent.requests} == {Purpose.TLS13_SERVER_VERIFY}
    assert agent.connections <= server.workers, "a worker keeps its connection"


@pytest.mark.parametrize("kind", ["rsa-3072", "rsa-4096"])
def test_larger_rsa_keys(
    kind: str,
    agent: FakeAgent,
    authority: Authority,
    identity_of: Callable[[str], Identity],
    nginx: Callable[..., Nginx],
) -> None:
    with nginx(identity_of(kind)) as server:
        assert b"served by keyreeve" in handshake(server.port, authority)
    assert [request.scheme for request in agent.requests] == [SCHEMES[kind]]


def test_certificate_and_reference_in_one_file(
    work: Path, authority: Authority, identity_of: Callable[[str], Identity], nginx: Callable[..., Nginx]
) -> None:
    identity = identity_of("ec-p256")
    together = work / "both.pem"
    for parts in (
        (identity.certificate_file, identity.reference_file),
        (identity.reference_file, identity.certificate_file),
    ):
        together.write_text("".join(part.read_text() for part in parts))
        with nginx(replace(identity, certificate_file=together, reference_file=together)) as server:
            assert b"served by keyreeve" in handshake(server.port, authority)


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.2])
def test_a_reference_cut_short_fails_the_configuration_check(
    keep: float, identity_of: Callable[[str], Identity], nginx: Callable[..., Nginx]
) -> None:
    identity = identity_of("ec-p256")
    text = identity.reference_file.read_text()
    identity.reference_file.write_text(text[: int(len(text) * keep)])
    result = nginx(identity).check()
    assert result.returncode != 0
    assert "key reference is invalid" in result.stderr
    assert "cut short" in result.stderr


def test_a_reference_to_another_key_fails_the_configuration_check(
    identity_of: Callable[[str], Identity], nginx: Callable[..., Nginx]
) -> None:
    identity = identity_of("ec-p256")
    server = nginx(identity)
    assert server.check().returncode == 0
    spki = (
        ec.generate_private_key(ec.SECP256R1())
        .public_key()
        .public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    )
    identity.reference_file.write_text(replace(identity.reference, spki_der=spki).to_pem())
    result = server.check()
    assert result.returncode != 0
    assert "key values mismatch" in result.stderr


def test_the_configuration_check_needs_no_agent(
    agent: FakeAgent, identity_of: Callable[[str], Identity], nginx: Callable[..., Nginx]
) -> None:
    identity = identity_of("ec-p256")
    agent.stop()
    assert nginx(identity).check().returncode == 0


def test_a_wrong_key_behind_the_reference_fails_the_handshake_only(
    agent: FakeAgent, authority: Authority, identity_of: Callable[[str], Identity], nginx: Callable[..., Nginx]
) -> None:
    identity = identity_of("ec-p256")
    with nginx(identity) as server:
        workers = server.worker_pids()
        agent.keys[identity.key_id] = KEY_MAKERS["ec-p256"]()
        with pytest.raises(ssl.SSLError):
            handshake(server.port, authority)
        server.wait_for_log("signature does not fit the public key")
        agent.keys[identity.key_id] = identity.key
        assert b"served by keyreeve" in handshake(server.port, authority)
        assert server.worker_pids() == workers


@pytest.mark.parametrize("verify", ["sampled", "always"])
def test_wrong_signatures_after_good_ones_fail_at_the_peer_and_are_named(
    verify: str,
    work: Path,
    agent: FakeAgent,
    authority: Authority,
    identity_of: Callable[[str], Identity],
) -> None:
    """By default the peer verifies, and the provider now and again: no wrong signature completes a handshake, and its cause is logged."""
    identity = identity_of("ec-p256")
    env = environment(write_openssl_conf(work / "verify.cnf", verify=verify))
    with Nginx(work, identity, env, workers=1) as server:
        assert b"served by keyreeve" in handshake(server.port, authority)
        agent.keys[identity.key_id] = KEY_MAKERS["ec-p256"]()
        tried = 0
        while "signature does not fit the public key" not in server.log.read_text():
            with pytest.raises(ssl.SSLError):
                handshake(server.port, authority)
            tried += 1
            if verify == "always":
                server.wait_for_log("signature does not fit the public key")
            assert tried <= VERIFY_EVERY
        with pytest.raises(ssl.SSLError):  # a key that was found wrong is verified from then on
            handshake(server.port, authority)
        wait_until(lambda: server.log.read_text().count("signature does not fit") == 2, "the second line")
        agent.keys[identity.key_id] = identity.key
        assert b"served by keyreeve" in handshake(server.port, authority)


@pytest.mark.parametrize("kind", ["rsa-2048", "ed25519"])
def test_wrong_signatures_of_rsa_and_ed25519_never_reach_the_peer(
    kind: str,
    work: Path,
    agent: FakeAgent,
    env: dict[str, str],
    authority: Authority,
    identity_of: Callable[[str], Identity],
) -> None:
    """A faulty one beside a right one would give the key away."""
    identity = identity_of(kind)
    with Nginx(work, identity, env, workers=1) as server:
        assert b"served by keyreeve" in handshake(server.port, authority)
        agent.keys[identity.key_id] = KEY_MAKERS[kind]()
        for tried in range(1, 4):
            with pytest.raises(ssl.SSLError, match="alert"):  # ours, not the client's own finding
                handshake(server.port, authority)
            wait_until(lambda tried=tried: server.log.read_text().count("signature does not fit") == tried, "a line")  # type: ignore[misc]


def test_a_refusal_is_in_the_error_log_by_name(
    agent: FakeAgent, authority: Authority, identity_of: Callable[[str], Identity], nginx: Callable[..., Nginx]
) -> None:
    with nginx(identity_of("ec-p256")) as server:
        agent.keys.clear()
        with pytest.raises(ssl.SSLError):
            handshake(server.port, authority)
        server.wait_for_log("agent refused to sign")
        server.wait_for_log("key_not_found (20): no such key, or no grant for this caller")


def test_tls12_goes_out_with_its_purpose(
    agent: FakeAgent, authority: Authority, identity_of: Callable[[str], Identity], nginx: Callable[..., Nginx]
) -> None:
    """The fake agent signs it; the signer does for a key that was created for it."""
    with replace(nginx(identity_of("ec-p256")), protocols="TLSv1.2") as server:
        handshake(server.port, authority, maximum=ssl.TLSVersion.TLSv1_2)
    assert [request.purpose for request in agent.requests] == [Purpose.TLS12_SERVER_KEY_EXCHANGE]


def test_an_agent_that_is_down_fails_handshakes_within_the_deadline_and_comes_back(
    agent: FakeAgent, authority: Authority, identity_of: Callable[[str], Identity], nginx: Callable[..., Nginx]
) -> None:
    with nginx(identity_of("ec-p256")) as server:
        handshake(server.port, authority)
        workers = server.worker_pids()
        agent.stop()
        before = time.monotonic()
        with pytest.raises(OSError):  # noqa: PT011 - an alert or a reset
            handshake(server.port, authority)
        assert time.monotonic() - before < 2
        server.wait_for_log("agent cannot be reached")
        agent.start()
        assert b"served by keyreeve" in handshake(server.port, authority)
        assert server.worker_pids() == workers


def test_a_silent_agent_costs_no_more_than_the_deadline(
    work: Path, agent: FakeAgent, authority: Authority, identity_of: Callable[[str], Identity]
) -> None:
    conf = write_openssl_conf(work / "short.cnf", deadline_ms=300)
    with Nginx(work, identity_of("ec-p256"), environment(conf)) as server:
        agent.delay = 10.0
        before = time.monotonic()
        with pytest.raises(OSError):  # noqa: PT011 - an alert or a reset
            handshake(server.port, authority)
        assert 0.3 <= time.monotonic() - before < 3
        server.wait_for_log("did not answer within the deadline")
        agent.delay = 0.0
        assert b"served by keyreeve" in handshake(server.port, authority)


def test_reload_under_load_fails_no_handshake(
    agent: FakeAgent, authority: Authority, identity_of: Callable[[str], Identity], nginx: Callable[..., Nginx]
) -> None:
    failures: list[Exception] = []
    done = threading.Event()
    count = 0

    def load(port: int) -> None:
        nonlocal count
        while not done.is_set():
            try:
                handshake(port, authority)
                count += 1
            except Exception as error:
                failures.append(error)

    with nginx(identity_of("ec-p256")) as server:
        first = server.worker_pids()
        clients = [threading.Thread(target=load, args=(server.port,)) for _ in range(4)]
        for client in clients:
            client.start()
        try:
            for _ in range(5):
                reached = count + 20
                server.reload()
                wait_until(lambda target=reached: count >= target or bool(failures), "20 more handshakes")
        finally:
            done.set()
            for client in clients:
                client.join()
        assert not failures
        assert first.isdisjoint(server.worker_pids())
    assert len(agent.requests) >= count >= 100
