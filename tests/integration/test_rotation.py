"""Rotation with real parts: a reload brings the new key, and a proxy that has not reloaded goes on with the old one until that ends."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keyreeve_client.channel import open_sync_local_channel
from keyreeve_client.key_admin import KeyAdminClient
from keyreeve_testing.stack import Served, Stack, StackConfig

pytestmark = [pytest.mark.native, pytest.mark.softhsm, pytest.mark.timeout(300)]
PATH = "/ns/web/sa/frontend"


@pytest.fixture
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    config = StackConfig(tmp_path_factory.mktemp("stack") / "keyreeve", served=(Served("frontend", PATH),))
    with Stack(config) as running:
        yield running


def spki_of(certificate: x509.Certificate) -> bytes:
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def test_old_handshakes_work_until_the_old_key_ends_and_new_ones_from_the_reload_on(stack: Stack) -> None:
    old = stack.svid_of(PATH)
    reference, reload = stack.svid_dir("frontend") / "key.pem", stack.etc / "reload-nginx"
    read, script = reference.read_bytes(), reload.read_text()
    before = spki_of(stack.handshake("frontend"))

    reload.write_text("#!/bin/sh\nexit 0\n")  # a proxy that is told and does not reload
    fresh = stack.cli("entry", "rotate-key", old["entry_id"])
    assert fresh["key_id"] != old["key_id"]
    stack.wait_until(lambda: reference.read_bytes() != read, "the agent wrote no new reference")
    assert spki_of(stack.handshake("frontend")) == before

    reload.write_text(script)
    subprocess.run([str(reload)], check=True)
    stack.wait_until(lambda: spki_of(stack.handshake("frontend")) != before, "nginx serves over no new key")
    former = stack.cli("key", "show", old["key_id"])
    assert (former["state"], former["successor"]) == ("enabled", fresh["key_id"])
    assert former["life"]["retire_at"] > old["not_after"]
    assert stack.cli("key", "show", fresh["key_id"])["generation"] == 2

    with open_sync_local_channel(stack.key_server_socket) as channel:  # the last certificate's end, brought forward
        KeyAdminClient(channel).retire_key(old["key_id"], at=datetime.now(UTC) + timedelta(seconds=1))
    stack.wait_until(
        lambda: stack.cli("key", "show", old["key_id"])["state"] == "disabled", "the old key was not retired"
    )
    assert "retired" in stack.cli("key", "show", old["key_id"])["life"]["state_reason"]
    assert spki_of(stack.handshake("frontend")) != before
