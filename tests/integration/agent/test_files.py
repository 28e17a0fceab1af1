"""Files for proxies, written by a real agent; its reload commands are real programs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from keyreeve_common.key_reference import parse_key_reference_pem

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system: needs root")


def reload_into(count: Path) -> str:
    return f'reload_command = ["/bin/sh", "-c", "echo reloaded >> {count}; echo done"]'


def test_writes_the_files_and_runs_the_reload(world: Any) -> None:
    count = world.directory / "count"
    directory = world.add_proxy("web", "/web", reload_into(count))
    assignment = world.assignment()
    world.ca.push(assignment)
    agent = world.start()
    current = directory / "current"
    reference = parse_key_reference_pem((current / "key.pem").read_text())
    assert (reference.key_id, reference.socket) == ("key-web", str(world.socket))
    assert reference.spki_der == assignment.spki_der
    assert (current / "bundle.pem").read_bytes() == world.pki.bundle_pem
    assert (current / "chain.pem").read_bytes().count(b"BEGIN CERTIFICATE") == 2
    assert b"PRIVATE" not in b"".join(path.read_bytes() for path in current.iterdir())
    assert count.read_text() == "reloaded\n"
    assert agent.wait_event("proxy_reloaded")["output"] == "done"


def test_renewal_replaces_and_reloads_and_an_equal_state_does_neither(world: Any) -> None:
    count = world.directory / "count"
    directory = world.add_proxy("web", "/web", reload_into(count))
    first = world.assignment()
    world.ca.push(first)
    agent = world.start()
    mark = len(agent.events)
    world.ca.push(first)
    agent.wait_event("assignments_received", after=mark)
    world.ca.push(world.assignment(revision=2))
    agent.wait_event("proxy_reloaded", lambda event: event["version"] == "v2")
    assert os.readlink(directory / "current") == "v2"
    assert count.read_text() == "reloaded\n" * 2
    agent.terminate()
    world.start()
    assert os.readlink(directory / "current") == "v2"
    assert count.read_text() == "reloaded\n" * 2


def test_a_removed_assignment_marks_the_files(world: Any, until: Any) -> None:
    directory = world.add_proxy("web", "/web")
    assignment = world.assignment()
    world.ca.push(assignment)
    agent = world.start()
    world.ca.push()
    agent.wait_event("proxy_files_withdrawn")
    assert (directory / "withdrawn").read_text().startswith("not assigned since")
    assert (directory / "current" / "chain.pem").exists()
    until(lambda: world.status()["proxies"][0]["assigned"] is False)
    world.ca.push(assignment)
    until(lambda: not (directory / "withdrawn").exists())


def test_one_proxy_s_trouble_is_not_the_others(world: Any) -> None:
    bad = world.add_proxy("bad", "/web", 'reload_command = ["/bin/false"]')
    bad.mkdir(parents=True)
    bad.chmod(0o777)
    hanging = world.add_proxy("slow", "/web", 'reload_command = ["/bin/sleep", "60"]', 'reload_timeout = "300ms"')
    good = world.add_proxy("good", "/web")
    world.ca.push(world.assignment())
    agent = world.start()
    assert (good / "current" / "key.pem").exists()
    assert (hanging / "current" / "key.pem").exists()
    assert agent.wait_event("proxy_files_failed")["code"] == "config_invalid"
    assert agent.wait_event("proxy_reload_failed")["exit_status"] is None
    assert world.sign()
    bad.chmod(0o755)
    agent.wait_event("proxy_files_replaced", lambda event: event["proxy"] == "bad")


@needs_root
def test_a_full_disk_keeps_the_old_files_until_there_is_room(world: Any) -> None:
    disk = world.directory / "proxies"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k,mode=755", "none", disk], check=True)
    try:
        directory = world.add_proxy("web", "/web")
        world.ca.push(world.assignment())
        agent = world.start()
        before = (directory / "current" / "chain.pem").read_bytes()
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        world.ca.push(world.assignment(revision=2))
        assert agent.wait_event("proxy_files_failed")["code"] == "storage_full"
        assert (directory / "current" / "chain.pem").read_bytes() == before
        assert world.sign()
        ballast.unlink()
        agent.wait_event("proxy_files_replaced", lambda event: event["version"] == "v2")
        agent.terminate()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
def test_openssl_reads_what_was_written(world: Any) -> None:
    directory = world.add_proxy("web", "/web")
    world.ca.push(world.assignment())
    world.start()
    current = directory / "current"
    done = subprocess.run(
        [
            "openssl",
            "verify",
            "-CAfile",
            current / "bundle.pem",
            "-untrusted",
            current / "chain.pem",
            current / "chain.pem",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip().endswith("OK"), done.stderr
    assert isinstance(world.key_server.keys["key-web"], ec.EllipticCurvePrivateKey)


def test_a_new_authority_is_taken_up_with_what_it_signed(world: Any) -> None:
    directory = world.add_proxy("web", "/web")
    first = world.assignment()
    world.ca.push(first)
    agent = world.start()
    successor = type(world.pki)("agent.test")
    by_successor = world.assignment(svid=successor.svid("/web", key=world.key_server.keys["key-web"]), revision=2)
    world.ca.push(by_successor)
    agent.wait_event("assignment_refused")
    world.ca.authorities = [*world.pki.bundle_der, *successor.bundle_der]
    world.ca.push(by_successor)
    agent.wait_event("proxy_files_replaced", lambda event: event["version"] == "v2")
    assert (directory / "current" / "bundle.pem").read_bytes() == world.pki.bundle_pem + successor.bundle_pem
    assert world.sign()
    agent.terminate()
    agent = world.start()
    assert world.sign()


def test_a_bundle_of_another_trust_domain_or_an_empty_one_changes_nothing(world: Any) -> None:
    world.ca.push(world.assignment())
    agent = world.start()
    world.ca.trust_domain = "other.test"
    world.ca.wake()
    agent.wait_event("bundle_refused", lambda event: "other.test" in event["detail"])
    world.ca.trust_domain, world.ca.authorities = "agent.test", []
    world.ca.wake()
    agent.wait_event("bundle_refused", lambda event: "no authority" in event["detail"])
    assert world.sign()
