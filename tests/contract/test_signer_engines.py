"""The real signer under its seccomp filter and Landlock, with each engine: what it signs verifies, and it says what it signs with."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_der_public_key
from keyreeve_common.key_id import KeyId
from keyreeve_common.metrics import samples_from_json
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.schemes import DEFAULT_SCHEMES, KeyType
from keyreeve_common.verification import verify_signature
from keyreeve_engine import SWITCH, available
from keyreeve_keyserver import frames
from keyreeve_testing.pausing import pausing_provider
from keyreeve_testing.signer import SignerClient, running_signer, signer_command, write_signer_config

CONTENT = build_tls13_content(Purpose.TLS13_SERVER_VERIFY, bytes(range(32)))
TYPES = [KeyType.EC_P256, KeyType.EC_P384, KeyType.ED25519, KeyType.RSA_2048]
needs_lanes = pytest.mark.skipif(not available().usable, reason=available().reason)


def sign_and_verify(signer: SignerClient) -> None:
    """64 signatures by four keys in one batch."""
    made = {}
    for key_type in TYPES:
        made[key_type] = signer.control(
            "create_key",
            key_id=f"k-{key_type}",
            key_type=str(key_type),
            role="handshake",
            purposes=["tls13_server_verify"],
            backend="software",
            label="test",
        )
        signer.control("load_key", record=made[key_type]["record"])
    wanted = TYPES * 16
    items = [
        frames.SignItem(
            number,
            KeyId(f"k-{key_type}"),
            DEFAULT_SCHEMES[key_type.family],
            Purpose.TLS13_SERVER_VERIFY,
            20_000,
            CONTENT,
        )
        for number, key_type in enumerate(wanted)
    ]
    results = signer.sign(*items)
    for number, key_type in enumerate(wanted):
        result = results[number]
        assert isinstance(result, frames.Signed), result
        key = load_der_public_key(base64.b64decode(made[key_type]["spki_der"]))
        verify_signature(key, DEFAULT_SCHEMES[key_type.family], CONTENT, signature=result.signature)


def events(log: Path, name: str) -> list[dict[str, str]]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def counts(signer: SignerClient, metric: str) -> dict[str, float]:
    """By the last label."""
    samples = samples_from_json(signer.control("metrics")["samples"])
    return {sample.labels[-1]: sample.value for sample in samples if sample.name == metric}


@needs_lanes
def test_lanes_sign_inside_the_sandbox(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running_signer(write_signer_config(tmp_path / "etc"), log=log) as signer:
        sign_and_verify(signer)
        health = signer.control("health")
        assert health["protections"]["calls"] == "on"
        assert health["backends"][0]["engine"] == "multibuffer"
        assert health["backends"][0]["engine_detail"] == ""
        assert counts(signer, "keyreeve_signer_engine_requests_total")["multibuffer"] >= 16
        assert counts(signer, "keyreeve_signer_engine_fallback") == {"software": 0}
    assert events(log, "signing_engine")[0]["engine"] == "multibuffer"
    assert {line["key_type"] for line in events(log, "engine_measured")} >= {"ec-p256", "rsa-2048"}


def test_without_lanes_openssl_signs_and_the_signer_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without IFMA, whatever this one has."""
    monkeypatch.setenv(SWITCH, "off")
    log = tmp_path / "log"
    with running_signer(write_signer_config(tmp_path / "etc"), log=log) as signer:
        sign_and_verify(signer)
        (backend,) = signer.control("health")["backends"]
        assert backend["engine"] == "openssl"
        assert SWITCH in backend["engine_detail"]
        by_engine = counts(signer, "keyreeve_signer_engine_requests_total")
        assert by_engine.keys() == {"openssl"}
        assert by_engine["openssl"] >= 64
        assert counts(signer, "keyreeve_signer_engine_fallback") == {"software": 1}
    (said,) = events(log, "signing_engine")
    assert said["level"] == "warning"
    assert SWITCH in said["detail"]


def test_openssl_by_choice_is_no_fallback(tmp_path: Path) -> None:
    config = write_signer_config(tmp_path / "etc")
    config.write_text(config.read_text() + 'engine = "openssl"\n')
    with running_signer(config, log=tmp_path / "log") as signer:
        sign_and_verify(signer)
        (backend,) = signer.control("health")["backends"]
        assert (backend["engine"], backend["engine_detail"]) == ("openssl", "")
        assert counts(signer, "keyreeve_signer_engine_fallback") == {"software": 0}


def test_a_signer_that_must_have_lanes_does_not_start_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "off")
    config = write_signer_config(tmp_path / "etc")
    config.write_text(config.read_text() + 'engine = "multibuffer"\n[listen]\nallowed_uids = [0]\n')
    ended = subprocess.run(
        signer_command(config, "--listen", str(tmp_path / "socket")), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 78
    assert SWITCH in ended.stderr


def test_a_card_signs_inside_the_sandbox(tmp_path: Path) -> None:
    """The test provider stands for the card: its thread, the helper and its descriptors, under Landlock and the filter."""
    config = write_signer_config(tmp_path / "etc")
    config.write_text(config.read_text() + f'engine = "qat"\nqat_provider = "{pausing_provider().path}"\n')
    log = tmp_path / "log"
    with running_signer(config, log=log) as signer:
        sign_and_verify(signer)
        health = signer.control("health")
        assert health["protections"]["calls"] == health["protections"]["files"] == "on"
        (backend,) = health["backends"]
        assert backend["engine"] == "qat"
        assert "qat" not in backend["engine_detail"]
        by_engine = counts(signer, "keyreeve_signer_engine_requests_total")
        assert by_engine["qat"] >= 32  # RSA and P-384
        assert sum(by_engine.values()) >= by_engine["qat"] + 32  # P-256 and Ed25519 stay off the card
    (ready,) = events(log, "qat_ready")
    assert ready["key_types"] == "ec-p384,rsa-2048,rsa-3072,rsa-4096"


def test_a_card_that_is_not_there_is_said_and_the_others_sign(tmp_path: Path) -> None:
    config = write_signer_config(tmp_path / "etc")
    config.write_text(config.read_text() + 'engine = "qat"\nqat_provider = "no-such-provider"\n')
    log = tmp_path / "log"
    with running_signer(config, log=log) as signer:
        sign_and_verify(signer)
        (backend,) = signer.control("health")["backends"]
        assert backend["engine"] in {"multibuffer", "openssl"}
        assert backend["engine_detail"].startswith("no qat: provider: ")
        assert counts(signer, "keyreeve_signer_engine_fallback") == {"software": 1}
    (said,) = events(log, "signing_engine")
    assert said["level"] == "warning"
    assert "no-such-provider" in said["detail"]
