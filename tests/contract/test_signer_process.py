"""The real signer process, driven over its frames: what it signs verifies, and no fault or foreign byte takes it down."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key
from keyreeve_common.errors import (
    Conflict,
    InvalidRequest,
    KeyNotFound,
    MessageTooLarge,
    PurposeMismatch,
    PurposeNotPermitted,
    SchemeNotSupported,
    SealedRecordInvalid,
    TokenUnavailable,
)
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.schemes import DEFAULT_SCHEMES, HASHES, KeyType, SignatureScheme
from keyreeve_common.verification import rsa_padding
from keyreeve_keyserver import frames
from keyreeve_testing.processes import descendants_of
from keyreeve_testing.signer import SignerClient, connect_signer, running_signer, signer_command, write_signer_config
from keyreeve_testing.softhsm import SoftHsmToken, make_softhsm_token, softhsm_is_installed

softhsm = [pytest.mark.softhsm, pytest.mark.skipif(not softhsm_is_installed(), reason="softhsm2 is not installed")]
CONTENT = build_tls13_content(Purpose.TLS13_SERVER_VERIFY, bytes(range(32)))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "signer.log"


@pytest.fixture
def signer(tmp_path: Path, log: Path) -> Iterator[SignerClient]:
    with running_signer(write_signer_config(tmp_path / "etc"), log=log) as client:
        yield client


@pytest.fixture
def token(tmp_path: Path) -> SoftHsmToken:
    return make_softhsm_token(tmp_path / "softhsm")


def create(signer: SignerClient, key_id: str, key_type: str = KeyType.EC_P256, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "key_id": key_id,
        "key_type": str(key_type),
        "role": "handshake",
        "purposes": ["tls13_server_verify"],
        "backend": "software",
        "label": "test",
    }
    return signer.control("create_key", **{**arguments, **changes})


def item(key_id: str, number: int = 1, **changes: Any) -> frames.SignItem:
    fields: dict[str, Any] = {
        "id": number,
        "key_id": KeyId(key_id),
        "scheme": SignatureScheme.ECDSA_SECP256R1_SHA256,
        "purpose": Purpose.TLS13_SERVER_VERIFY,
        "deadline_ms": 20_000,
        "message": CONTENT,
    }
    return frames.SignItem(**{**fields, **changes})


def verify(spki: str, scheme: SignatureScheme, result: frames.SignResult, message: bytes = CONTENT) -> None:
    assert isinstance(result, frames.Signed), result
    key = load_der_public_key(base64.b64decode(spki))
    if isinstance(key, ec.EllipticCurvePublicKey):
        key.verify(result.signature, message, ec.ECDSA(HASHES[scheme.facts.hash_name]()))
    elif isinstance(key, rsa.RSAPublicKey):
        key.verify(result.signature, message, rsa_padding(scheme), HASHES[scheme.facts.hash_name]())
    else:
        assert isinstance(key, ed25519.Ed25519PublicKey)
        key.verify(result.signature, message)


def error_of(result: frames.SignResult) -> Exception:
    assert isinstance(result, frames.Refused), result
    return result.error


@pytest.mark.parametrize("backend", ["software", pytest.param("hsm", marks=softhsm)])
def test_keys_of_every_family_are_made_loaded_and_used(tmp_path: Path, log: Path, backend: str) -> None:
    token = make_softhsm_token(tmp_path / "softhsm") if backend == "hsm" else None
    families = [KeyType.EC_P256, KeyType.EC_P384, KeyType.ED25519, KeyType.RSA_2048]
    with running_signer(write_signer_config(tmp_path / "etc", token=token), log=log) as signer:
        made = {key_type: create(signer, f"k-{key_type}", key_type, backend=backend) for key_type in families}
        assert all(answer["attributes"]["generated_in_token"] is (backend == "hsm") for answer in made.values())
        for key_type, answer in made.items():
            assert signer.control("load_key", record=answer["record"]) == {"key_id": f"k-{key_type}"}
        items = [
            item(f"k-{key_type}", number, scheme=DEFAULT_SCHEMES[key_type.family])
            for number, key_type in enumerate(families * 16)
        ]
        results = signer.sign(*items)
        for number, key_type in enumerate(families * 16):
            verify(made[key_type]["spki_der"], DEFAULT_SCHEMES[key_type.family], results[number])
        assert signer.control("health")["keys_loaded"] == len(families)


def test_records_open_in_the_next_process(tmp_path: Path, log: Path) -> None:
    config = write_signer_config(tmp_path / "etc")
    with running_signer(config, log=log) as signer:
        answer = create(signer, "kept")
    with running_signer(config, log=log) as signer:
        assert isinstance(error_of(signer.sign(item("kept"))[1]), KeyNotFound)
        signer.control("load_key", record=answer["record"])
        verify(answer["spki_der"], SignatureScheme.ECDSA_SECP256R1_SHA256, signer.sign(item("kept"))[1])
        signer.control("forget_key", key_id="kept")
        assert isinstance(error_of(signer.sign(item("kept"))[1]), KeyNotFound)


def test_one_refusal_never_fails_its_batch(signer: SignerClient) -> None:
    answer = create(signer, "k")
    signer.control("load_key", record=answer["record"])
    results = signer.sign(
        item("k", 1),
        item("absent", 2),
        item("k", 3, message=CONTENT + b"\x00"),
        item("k", 4, purpose=Purpose.TLS13_CLIENT_VERIFY),
        item("k", 5, purpose=Purpose.JWT_SVID),
        item("k", 6, scheme=SignatureScheme.ED25519),
        item("k", 7, scheme=0x0201),
        item("k", 8, purpose=200),
        item("k", 9, deadline_ms=0),
        item("k", 10),
        caller="spiffe://td.test/agent/a",
    )
    refused = {
        2: KeyNotFound,
        3: PurposeMismatch,
        4: PurposeNotPermitted,
        5: PurposeNotPermitted,
        6: SchemeNotSupported,
        7: SchemeNotSupported,
        8: PurposeNotPermitted,
    }
    for number, kind in refused.items():
        assert type(error_of(results[number])) is kind, number
    assert "deadline" in str(error_of(results[9]))
    assert "message has 131 bytes, the form has 130 or 146" in str(error_of(results[3]))
    assert "role handshake never signs for jwt_svid" in str(error_of(results[5]))
    for number in (1, 10):
        verify(answer["spki_der"], SignatureScheme.ECDSA_SECP256R1_SHA256, results[number])


def test_message_bound_comes_before_everything(tmp_path: Path, log: Path) -> None:
    config = write_signer_config(tmp_path / "etc", extra="max_message_bytes = 1000")
    with running_signer(config, log=log) as signer:
        result = signer.sign(item("absent", message=bytes(1001)))[1]
        assert isinstance(error_of(result), MessageTooLarge)


def test_control_refusals_are_named(signer: SignerClient) -> None:
    create(signer, "k")
    refusals: list[tuple[str, dict[str, Any], type[Exception], str]] = [
        ("no_such_op", {}, InvalidRequest, "not known"),
        ("health", {"x": 1}, InvalidRequest, "unknown: \\['x'\\]"),
        ("create_key", {}, InvalidRequest, "members missing"),
        ("load_key", {"record": "%%"}, SealedRecordInvalid, "base64"),
        ("load_key", {"record": 7}, InvalidRequest, "not a string"),
        ("forget_key", {"key_id": "UPPER"}, InvalidRequest, "key id"),
    ]
    for op, arguments, kind, text in refusals:
        with pytest.raises(kind, match=text):
            signer.control(op, **arguments)
    changes: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"key_type": "rsa-1024"}, InvalidRequest, "key_type is none of"),
        ({"purposes": ["x509_certificate"]}, InvalidRequest, "cannot have purpose"),
        ({"purposes": []}, InvalidRequest, "at least one purpose"),
        ({"role": "authority", "purposes": ["x509_certificate"]}, InvalidRequest, "needs an authority_profile"),
        ({"backend": "nowhere"}, TokenUnavailable, "no backend nowhere"),
        ({"label": "x" * 2049}, InvalidRequest, "label"),
    ]
    for change, kind, text in changes:
        with pytest.raises(kind, match=text):
            create(signer, "other", **change)
    assert create(signer, "fine")["record"]


def test_foreign_and_changed_records_are_refused(signer: SignerClient, tmp_path: Path, log: Path) -> None:
    record = base64.b64decode(create(signer, "k")["record"])
    flipped = record[:-1] + bytes((record[-1] ^ 1,))
    relabelled = record.replace(b'"handshake"', b'"authority"')
    other = write_signer_config(tmp_path / "other")
    (tmp_path / "other" / "passphrase").write_text("quite another passphrase of length\n")
    for changed in (flipped, record[:-1], relabelled, b"", b"KRV1"):
        with pytest.raises(SealedRecordInvalid):
            signer.control("load_key", record=base64.b64encode(changed).decode())
    with running_signer(other, log=log) as stranger, pytest.raises(SealedRecordInvalid, match="another key-encryption"):
        stranger.control("load_key", record=base64.b64encode(record).decode())


def test_second_record_of_a_loaded_key_is_a_conflict(signer: SignerClient) -> None:
    first, second = create(signer, "k"), create(signer, "k", label="second")
    signer.control("load_key", record=first["record"])
    signer.control("load_key", record=first["record"])
    with pytest.raises(Conflict):
        signer.control("load_key", record=second["record"])
    with pytest.raises(Conflict):
        create(signer, "k")


@pytest.mark.parametrize(
    "noise",
    [
        b"\x00\x00\x00\x00",
        b"\x00\x00\x00\x02\x02\x7f",
        b"\x00\x00\x00\x02\x02\x10",
        b"\x00\x80\x00\x01",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\x00\x00\x0a\x02\x20\x00\x00\x00\x01\x00\x00\x00\x00",
    ],
)
def test_malformed_frame_is_answered_and_ends_the_signer_cleanly(signer: SignerClient, noise: bytes) -> None:
    signer.control("health")
    signer.connection.sendall(noise)
    assert isinstance(signer.read_answer(), frames.Malformed)
    with pytest.raises(EOFError):
        signer.read_answer()
    assert signer.process is not None
    assert signer.process.wait(20) == 0


def test_sigterm_ends_it_cleanly(signer: SignerClient, log: Path) -> None:
    signer.control("health")
    assert signer.process is not None
    signer.process.send_signal(signal.SIGTERM)
    assert signer.process.wait(20) == 0
    assert '"signer_stopped"' in log.read_text()


def test_signer_has_no_network_socket(signer: SignerClient) -> None:
    answer = create(signer, "k")
    signer.control("load_key", record=answer["record"])
    signer.sign(item("k"))
    assert signer.process is not None
    fds = Path(f"/proc/{signer.process.pid}/fd")
    inodes = {match[1] for fd in fds.iterdir() if (match := re.match(r"socket:\[(\d+)\]", os.readlink(fd)))}
    assert inodes, "the frames' own socket is there"
    tables = ("tcp", "tcp6", "udp", "udp6", "raw", "raw6", "packet", "netlink")
    for table in tables:
        path = Path(f"/proc/{signer.process.pid}/net/{table}")
        text = path.read_text() if path.exists() else ""
        seen = {word for line in text.splitlines()[1:] for word in line.split()}
        assert not inodes & seen, table
    limits = Path(f"/proc/{signer.process.pid}/limits").read_text()
    assert re.search(r"Max core file size\s+0\s+0", limits)


def test_signer_imports_no_network_library() -> None:
    code = "import sys, keyreeve_keyserver.signer.__main__; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    foreign = {"pkcs11", "sqlalchemy", "http.client", "urllib.request", "keyreeve_common.grpc_edge"}
    assert not foreign & set(loaded.split())


def start(config: Path, *how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(signer_command(config, *how), capture_output=True, text=True, timeout=30, check=False)


def test_configuration_faults_are_named(tmp_path: Path) -> None:
    good = write_signer_config(tmp_path / "etc")
    assert start(good, "--check-config").returncode == 0
    assert start(good).returncode == 2
    text = good.read_text()
    faults = {
        text + "surprise = 1\n": "surprise: unknown key",
        text.replace('kind = "software"', 'kind = "magic"'): "not one of",
        text.replace('default_backend = "software"', 'default_backend = "none"'): "default_backend",
        text.replace('passphrase_file = "passphrase"', ""): "give passphrase_file",
        text.replace('"passphrase"', '"missing"'): "cannot be read",
    }
    for content, expected in faults.items():
        good.write_text(content)
        ended = start(good, "--check-config")
        assert ended.returncode == 78, ended.stderr
        assert expected in ended.stderr
        assert "Traceback" not in ended.stderr
    good.write_text(text)
    passphrase = tmp_path / "etc" / "passphrase"
    passphrase.chmod(0o644)
    assert "open to other users; run: chmod 600" in start(good, "--check-config").stderr
    passphrase.chmod(0o600)
    passphrase.write_text("short\n")
    assert "fewer than 16 bytes" in start(good, "--check-config").stderr
    assert start(good, "--listen", str(tmp_path / "s")).returncode == 78
    passphrase.write_text("a passphrase that is long enough\n")
    (tmp_path / "etc" / "passphrase.kdf").write_text('{"n": 2}')
    ended = start(good, "--frames-fd", "0")
    assert ended.returncode == 78
    assert "restore it from a backup" in ended.stderr


def test_kdf_parameters_are_made_once(tmp_path: Path, log: Path) -> None:
    config = write_signer_config(tmp_path / "etc")
    kdf = tmp_path / "etc" / "passphrase.kdf"
    kdf.unlink()
    with running_signer(config, log=log) as signer:
        record = create(signer, "k")["record"]
    assert kdf.stat().st_mode & 0o777 == 0o600
    made = kdf.read_text()
    with running_signer(config, log=log) as signer:
        signer.control("load_key", record=record)
    assert kdf.read_text() == made
    assert len(list((tmp_path / "etc").iterdir())) == 3


@pytest.mark.parametrize("allowed", [True, False])
def test_listening_signer_knows_its_peers_by_uid(tmp_path: Path, allowed: bool) -> None:
    uid = os.getuid() if allowed else os.getuid() + 1
    config = write_signer_config(tmp_path / "etc")
    config.write_text(config.read_text() + f"[listen]\nallowed_uids = [{uid}]\n")
    path = tmp_path / "s"
    process = subprocess.Popen(
        signer_command(config, "--listen", str(path)), stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    try:
        first = connect_signer(path, process)
        if not allowed:
            with pytest.raises((EOFError, ConnectionError)):
                first.control("health")
        else:
            assert path.stat().st_mode & 0o777 == 0o660
            second = connect_signer(path, process)
            first.connection.sendall(b"\x00\x00\x00\x00")
            assert isinstance(first.read_answer(), frames.Malformed)
            with pytest.raises(EOFError):
                first.read_answer()
            assert second.control("health")["keys_loaded"] == 0
            second.connection.close()
        first.connection.close()
    finally:
        process.terminate()
        assert process.wait(20) == 0
    assert not path.exists()


class TestToken:
    pytestmark = softhsm

    def test_capabilities_tell_both_backends(self, tmp_path: Path, token: SoftHsmToken, log: Path) -> None:
        with running_signer(write_signer_config(tmp_path / "etc", token=token), log=log) as signer:
            answer = signer.control("capabilities")
        assert answer["default_backend"] == "software"
        software, hsm = answer["backends"]
        assert (software["custody"], hsm["custody"]) == ("sealed-software", "token-resident")
        assert hsm["state"] == "up"
        assert hsm["schemes"] == software["schemes"]
        assert hsm["key_types"] == software["key_types"]

    def test_wrong_pin_stops_the_start(self, tmp_path: Path, token: SoftHsmToken) -> None:
        config = write_signer_config(tmp_path / "etc", token=token)
        token.pin_file.write_text("00000000\n")
        ended = start(config, "--listen", str(tmp_path / "s"))
        assert ended.returncode == 78  # allowed_uids is empty
        config.write_text(config.read_text() + f"[listen]\nallowed_uids = [{os.getuid()}]\n")
        ended = start(config, "--listen", str(tmp_path / "s"))
        assert ended.returncode == 77
        assert "correct the PIN file" in ended.stderr
        assert "00000000" not in ended.stderr
        assert not (tmp_path / "s").exists()

    def test_missing_token_directory_leaves_the_rest_up(self, tmp_path: Path, token: SoftHsmToken, log: Path) -> None:
        token.directory.rename(tmp_path / "moved")
        with running_signer(write_signer_config(tmp_path / "etc", token=token), log=log) as signer:
            health = {backend["name"]: backend for backend in signer.control("health")["backends"]}
            assert health["software"]["state"] == "up"
            assert health["hsm"]["state"] == "down"
            assert "token directory" in health["hsm"]["detail"]
            with pytest.raises(TokenUnavailable, match="token directory"):
                create(signer, "k", backend="hsm")
            assert create(signer, "k")["record"]

    def test_destroyed_token_key_is_gone(self, tmp_path: Path, token: SoftHsmToken, log: Path) -> None:
        with running_signer(write_signer_config(tmp_path / "etc", token=token), log=log) as signer:
            record = create(signer, "k", backend="hsm")["record"]
            signer.control("load_key", record=record)
            assert signer.control("destroy_key", record=record) == {}
            with pytest.raises(KeyNotFound):
                signer.control("load_key", record=record)

    def test_token_seals_the_records(self, tmp_path: Path, token: SoftHsmToken, log: Path) -> None:
        sealing = 'token_backend = "hsm"\ntoken_key_label = "keyreeve-kek"'
        config = write_signer_config(tmp_path / "etc", token=token, sealing=sealing)
        with running_signer(config, log=log) as signer:
            members = {"key_type": "ec-p256", "role": "handshake", "purposes": ["tls13_server_verify"]}
            wanted = [("soft", "software"), ("hard", "hsm"), *((f"more-{n}", "software") for n in range(10))]
            for number, (key_id, backend) in enumerate(wanted):
                arguments = {**members, "key_id": key_id, "backend": backend}
                signer.connection.sendall(frames.Control(number, "create_key", arguments).to_bytes())
            made: dict[int, dict[str, Any]] = {}
            while len(made) < len(wanted):
                done = signer.read_answer()
                assert isinstance(done, frames.ControlOk), done
                made[done.request_id] = done.answer
            software, hsm = made[0], made[1]
        with running_signer(config, log=log) as signer:
            for answer, key_id in ((software, "soft"), (hsm, "hard")):
                signer.control("load_key", record=answer["record"])
                verify(answer["spki_der"], SignatureScheme.ECDSA_SECP256R1_SHA256, signer.sign(item(key_id))[1])
                record = bytearray(base64.b64decode(answer["record"]))
                record[-1] ^= 1
                with pytest.raises(SealedRecordInvalid):
                    signer.control("load_key", record=base64.b64encode(record).decode())

    def test_pin_and_passphrase_stay_out_of_logs_and_arguments(
        self, tmp_path: Path, token: SoftHsmToken, log: Path
    ) -> None:
        with running_signer(write_signer_config(tmp_path / "etc", token=token), log=log) as signer:
            create(signer, "k", backend="hsm")
            with pytest.raises(Conflict):
                create(signer, "k", backend="hsm")
            assert signer.process is not None
            pids = [signer.process.pid, *descendants_of(signer.process.pid)]
            assert len(pids) == 4  # the signer, its launcher, two workers
            told = b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for pid in pids for name in ("cmdline", "environ"))
        for secret in (token.pin.encode(), b"a passphrase that is long enough"):
            assert secret not in log.read_bytes()
            assert secret not in told


@pytest.mark.softhsm
@pytest.mark.skipif(not softhsm_is_installed(), reason="softhsm2 is not installed")
def test_signer_with_workers_ends_in_order(tmp_path: Path) -> None:
    """Locked down as it is by then, it still waits for its launcher, which ends the workers."""
    config, log = write_signer_config(tmp_path, token=make_softhsm_token(tmp_path / "softhsm")), tmp_path / "log"
    with running_signer(config, log=log) as client:
        client.control("health")
    assert client.process is not None
    assert client.process.returncode == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[-1]["event"] == "signer_stopped"
    assert not [line for line in lines if line["level"] == "error"]
