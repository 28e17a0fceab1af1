"""What becomes of keys, with real processes: a key that fails its self-test is disabled, a destruction waits and is carried out once."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from keyreeve_client.cli.__main__ import run
from keyreeve_common.files import read_secret
from keyreeve_common.v1 import keyserver_pb2
from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_keyserver.domain.secret import Secret
from keyreeve_keyserver.signer.sealing import PassphraseKey, Sealer, load_kdf_parameters
from keyreeve_testing.keyserver import KeyServerRig, Stubs, create_request, verify_p256
from keyreeve_testing.softhsm import make_softhsm_token, softhsm_is_installed

SECONDS = 20


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[KeyServerRig]:
    with KeyServerRig(tmp_path).running() as rig:
        yield rig


def sealer_of(rig: KeyServerRig) -> Sealer:
    parameters = load_kdf_parameters(rig.directory / "passphrase.kdf")
    return Sealer(PassphraseKey(parameters.derive(Secret(read_secret(rig.directory / "passphrase")))))


def record_of(rig: KeyServerRig, key_id: str) -> KeyRecord:
    with sqlite3.connect(rig.state / "catalog.sqlite3") as catalog:
        sealed = catalog.execute("SELECT sealed_record FROM keyreeve_keys WHERE key_id = ?", [key_id]).fetchone()[0]
    record, _ = asyncio.run(sealer_of(rig).open(sealed))
    return record


def shown(stubs: Stubs, key_id: str) -> keyserver_pb2.Key:
    return stubs.keys.GetKey(keyserver_pb2.GetKeyRequest(key_id=key_id), timeout=SECONDS)


def refusal_of(call: Callable[[], object]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return str(dict(caught.value.trailing_metadata())["keyreeve-error-code"])


def check_faulty_key_is_disabled(rig: KeyServerRig, faulty: str, other: keyserver_pb2.Key) -> None:
    agent = rig.pki.svid("agent/a")
    for key_id in (faulty, other.key_id):
        rig.grant(key_id, agent.spiffe_id)
    with rig.caller(agent) as stubs, rig.local() as local:
        assert refusal_of(lambda: stubs.sign(faulty)) == "key_self_test_failed"
        wait_for(lambda: shown(local, faulty).state == keyserver_pb2.KEY_STATE_DISABLED, "the key is not disabled")
        assert (
            "another key" in shown(local, faulty).life.state_reason
            or "not the one" in shown(local, faulty).life.state_reason
        )
        assert refusal_of(lambda: stubs.sign(faulty)) == "key_disabled"
        verify_p256(other.spki_der, stubs.sign(other.key_id))
    (event,) = rig.process.events_named("key_self_test_failed")
    assert (event["level"], event["key_id"]) == ("error", faulty)


def test_record_whose_box_holds_another_key_is_disabled(rig: KeyServerRig) -> None:
    """Only who has the key-encryption key can make such a record: a fault of ours, or of a restored backup."""
    faulty, other = rig.create_key("faulty"), rig.create_key("other")
    record = record_of(rig, faulty.key_id)
    foreign = ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    sealed = asyncio.run(sealer_of(rig).seal(record, Secret(foreign)))
    with sqlite3.connect(rig.state / "catalog.sqlite3") as catalog:
        catalog.execute("UPDATE keyreeve_keys SET sealed_record = ? WHERE key_id = ?", [sealed, faulty.key_id])
    check_faulty_key_is_disabled(rig, faulty.key_id, other)
    with rig.local() as local:  # an operator may enable it: then it is tested again
        enabled = local.keys.EnableKey(keyserver_pb2.EnableKeyRequest(key_id=faulty.key_id), timeout=SECONDS)
    assert enabled.state == keyserver_pb2.KEY_STATE_ENABLED
    assert enabled.life.state_reason == ""


SWAP = """
import sys, pkcs11
from pkcs11 import Attribute
module, label, pin_file, one, other = sys.argv[1:]
token = pkcs11.lib(module).get_token(token_label=label)
with token.open(rw=True, user_pin=open(pin_file).read().strip()) as session:
    def move(old, new):
        for found in list(session.get_objects({Attribute.ID: old.encode()})):
            found[Attribute.ID] = new.encode()
    move(one, "aside"); move(other, one); move("aside", other)
"""


@pytest.mark.softhsm
@pytest.mark.skipif(not softhsm_is_installed(), reason="softhsm2 is not installed")
def test_token_object_that_was_swapped_is_disabled(tmp_path: Path) -> None:
    """Another object under the same CKA_ID: what an operator's mistake or an attacker at the token leaves behind."""
    token = make_softhsm_token(tmp_path / "softhsm")
    rig = KeyServerRig(tmp_path / "rig", token=token, default_backend="hsm")
    with rig.running():
        faulty, stranger = rig.create_key("faulty"), rig.create_key("stranger")
        other = rig.create_key("other", backend="software")
        refs = [record_of(rig, key.key_id).backend_ref for key in (faulty, stranger)]
        arguments = [str(token.module), token.label, str(token.pin_file), *refs]
        subprocess.run(
            [sys.executable, "-c", SWAP, *arguments], check=True, env={**os.environ, "SOFTHSM2_CONF": str(token.conf)}
        )
        check_faulty_key_is_disabled(rig, faulty.key_id, other)


KEYS = '[keys]\ndestruction_wait = "1s"\nreap_interval = "100ms"\n'


def schedule(stubs: Stubs, key_id: str, *, seconds: int) -> keyserver_pb2.Key:
    request = keyserver_pb2.ScheduleKeyDestructionRequest(key_id=key_id)
    request.after.FromSeconds(seconds)
    return stubs.keys.ScheduleKeyDestruction(request, timeout=SECONDS)


def disable(stubs: Stubs, key_id: str) -> None:
    stubs.keys.DisableKey(keyserver_pb2.DisableKeyRequest(key_id=key_id), timeout=SECONDS)


def test_destruction_waits_can_be_cancelled_and_survives_a_kill(tmp_path: Path) -> None:
    rig = KeyServerRig(tmp_path, extra=KEYS)
    agent = rig.pki.svid("agent/a")
    with rig.running():
        kept, doomed = rig.create_key("kept").key_id, rig.create_key("doomed").key_id
        with rig.local() as local:
            rig.grant(kept, agent.spiffe_id)
            assert refusal_of(lambda: schedule(local, kept, seconds=60)) == "failed_precondition"
            for key_id in (kept, doomed):
                disable(local, key_id)
            assert refusal_of(lambda: schedule(local, kept, seconds=0)) == "invalid_request"
            pending = schedule(local, kept, seconds=3600)
            assert pending.state == keyserver_pb2.KEY_STATE_PENDING_DESTRUCTION
            assert pending.life.HasField("destroy_at")
            enable = keyserver_pb2.EnableKeyRequest(key_id=kept)
            assert refusal_of(lambda: local.keys.EnableKey(enable, timeout=SECONDS)) == "failed_precondition"
            with rig.caller(agent) as stubs:
                assert refusal_of(lambda: stubs.sign(kept)) == "key_disabled"
            cancel = keyserver_pb2.CancelKeyDestructionRequest(key_id=kept)
            assert local.keys.CancelKeyDestruction(cancel, timeout=SECONDS).state == keyserver_pb2.KEY_STATE_DISABLED
            schedule(local, doomed, seconds=1)
        for pid in rig.pids():
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: len(rig.process.events_named("ready")) > 1, "the key server did not come back")
        wait_for(lambda: is_destroyed(rig, doomed), "the key was not destroyed")
        with rig.local() as local:
            assert local.keys.EnableKey(enable, timeout=SECONDS).state == keyserver_pb2.KEY_STATE_ENABLED
            local.keys.CreateKey(create_request("doomed"), timeout=SECONDS)  # its request id still finds it, destroyed
        with rig.caller(agent) as stubs:
            stubs.sign(kept)


def is_destroyed(rig: KeyServerRig, key_id: str) -> bool:
    """Destroyed by name, and its record is gone."""
    with sqlite3.connect(rig.state / "catalog.sqlite3") as catalog:
        query = "SELECT state, sealed_record, destruction_permit FROM keyreeve_keys WHERE key_id = ?"
        return bool(catalog.execute(query, [key_id]).fetchone() == ("destroyed", None, None))


@pytest.mark.softhsm
@pytest.mark.skipif(not softhsm_is_installed(), reason="softhsm2 is not installed")
def test_destroyed_key_is_gone_from_its_token(tmp_path: Path) -> None:
    token = make_softhsm_token(tmp_path / "softhsm")
    rig = KeyServerRig(tmp_path / "rig", token=token, default_backend="hsm", extra=KEYS)
    with rig.running(), rig.local() as local:
        key = rig.create_key("doomed")
        objects = set(token.directory.rglob("*.object"))
        disable(local, key.key_id)
        schedule(local, key.key_id, seconds=1)
        wait_for(lambda: is_destroyed(rig, key.key_id), "the key was not destroyed")
        assert len(set(token.directory.rglob("*.object"))) == len(objects) - 2  # private and public half


def test_key_is_attested_and_verified_by_the_command(rig: KeyServerRig, capsys: pytest.CaptureFixture[str]) -> None:
    key_id, nonce = rig.create_key().key_id, "ab" * 16
    told, pinned = rig.directory / "told.json", rig.directory / "attestation.pem"
    asked = ["key", "attest", key_id, "--key-server-socket", str(rig.admin_socket), "--nonce", nonce]
    assert run([*asked, "--out", str(told), "--public-key-out", str(pinned)]) == 0
    assert run([*asked, "--out", str(rig.directory / "again.json")]) == 0  # by the same attestation key
    verify = ["key", "verify-attestation", "--public-key", str(pinned), "--nonce", nonce, "-o", "json"]
    for file in (told, rig.directory / "again.json"):
        capsys.readouterr()
        assert run([*verify, str(file)]) == 0
        assert f'"key_id": "{key_id}"' in capsys.readouterr().out
    told.write_text(told.read_text().replace('"extractable": true', '"extractable": false'))
    assert run([*verify, str(told)]) == 1
    assert "does not verify" in capsys.readouterr().err
