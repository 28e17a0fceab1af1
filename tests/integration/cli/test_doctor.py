"""The doctor finds what is wrong, says what to do, and passes what is right."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from fake_services import TD, Services
from keyreeve_common.v1 import ca_pb2
from keyreeve_testing.softhsm import make_softhsm_token, softhsm_is_installed


def _findings(services: Services, config_dir: Path, *more: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code, out, err = services.run("--output", "json", "doctor", "--config-dir", str(config_dir), *more)
    assert err == ""
    return code, {finding["check"]: finding for finding in json.loads(out)["findings"]}


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    directory = tmp_path / "etc"
    directory.mkdir(mode=0o755)
    return directory


def _write_keyserver(services: Services, etc: Path) -> None:
    state = etc / "state"
    state.mkdir(mode=0o700, exist_ok=True)
    (etc / "keyserver.toml").write_text(
        f'trust_domain = "{TD}"\nstate_dir = "{state}"\nadmin_socket = "{services.key_server_socket}"\n'
        f'signer_config = "signer.toml"\n'
    )


def _write_signer(etc: Path, tmp_path: Path) -> Path:
    token = make_softhsm_token(tmp_path / "token")
    passphrase = etc / "passphrase"
    passphrase.touch(mode=0o600)
    passphrase.write_text("a passphrase that is long enough\n")
    (etc / "signer.toml").write_text(
        f'[sealing]\npassphrase_file = "passphrase"\n[[backend]]\nname = "hsm"\nkind = "pkcs11"\nmodule = "{token.module}"\n'
        f'token_label = "{token.label}"\npin_file = "{token.pin_file}"\nsofthsm_conf = "{token.conf}"\n'
    )
    return token.conf


def test_the_engine_of_software_keys_and_why_it_is_not_faster(services: Services, etc: Path) -> None:
    _write_keyserver(services, etc)
    services.key_server.engine = "multibuffer"
    _, found = _findings(services, etc)
    assert found["engine of backend hsm"]["state"] == "ok"
    services.key_server.engine, services.key_server.engine_detail = "openssl", "no multibuffer: no IFMA"
    _, found = _findings(services, etc)
    assert found["engine of backend hsm"]["state"] == "warning"
    assert "no IFMA" in found["engine of backend hsm"]["detail"]


def test_an_empty_directory_is_no_installation(services: Services, etc: Path) -> None:
    code, found = _findings(services, etc)
    assert code == 1
    assert found["configuration"]["state"] == "failed"
    assert found["configuration"]["remedy"]


@pytest.mark.skipif(not softhsm_is_installed(), reason="needs softhsm2")
def test_a_key_host_in_order_passes(services: Services, etc: Path, tmp_path: Path) -> None:
    _write_keyserver(services, etc)
    _write_signer(etc, tmp_path)
    code, found = _findings(services, etc)
    assert code == 0, found
    for check in ("configuration of keyserver", "configuration of signer", "key server", "backend hsm",
                  "key server's SVID", "token of backend hsm", "signer: backend[0].pin_file"):  # fmt: skip
        assert found[check]["state"] == "ok", found[check]


@pytest.mark.skipif(not softhsm_is_installed(), reason="needs softhsm2")
def test_each_fault_of_a_key_host_is_named(services: Services, etc: Path, tmp_path: Path) -> None:
    _write_keyserver(services, etc)
    conf = _write_signer(etc, tmp_path)
    (etc / "passphrase").chmod(0o644)
    conf.write_text(f"directories.tokendir = {tmp_path / 'gone'}\n")
    services.key_server.svid_lifetime = timedelta(seconds=-5)
    services.key_server.backend_detail = "token is not there"
    code, found = _findings(services, etc)
    assert code == 1
    assert "chmod 600" in found["signer: sealing.passphrase_file"]["remedy"]
    assert "gone" in found["token of backend hsm"]["detail"]
    assert found["key server's SVID"]["state"] == "failed"
    assert found["backend hsm"]["state"] == "failed"
    assert found["backend hsm"]["detail"].endswith("token is not there")
    assert found["configuration of signer"]["state"] == "failed", "the signer refuses an open passphrase file as well"
    assert "open to other users" in found["configuration of signer"]["detail"]


def test_a_configuration_that_is_wrong_is_named_by_its_service(services: Services, etc: Path) -> None:
    _write_keyserver(services, etc)
    with (etc / "keyserver.toml").open("a") as file:
        file.write("surprise = 1\n")
    _, found = _findings(services, etc)
    assert "surprise" in found["configuration of keyserver"]["detail"]


def test_a_ca_without_an_active_authority_and_a_clock_ahead_are_named(services: Services, etc: Path) -> None:
    (etc / "ca.toml").write_text(f'admin_socket = "{services.ca_socket}"\n')
    ahead = ca_pb2.X509SvidRecord(serial="1")
    ahead.not_before.FromDatetime(datetime.now(UTC) + timedelta(minutes=10))
    services.ca.records.append(ahead)
    services.ca.serving = False
    _, found = _findings(services, etc)
    assert found["CA"]["detail"].endswith("database is locked")
    assert found["issuing authority"]["state"] == "failed"
    assert found["clock of the CA"]["state"] == "failed"
    assert "ahead of this host" in found["clock of the CA"]["detail"]


def _authority(not_before: datetime, not_after: datetime) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(not_before).not_valid_after(not_after)
    return builder.sign(key, SHA256()).public_bytes(Encoding.DER)


def test_authorities_near_their_end_are_a_warning(services: Services, etc: Path) -> None:
    (etc / "ca.toml").write_text(f'admin_socket = "{services.ca_socket}"\n')
    now = datetime.now(UTC)
    for root, since, until in ((True, 100, 300), (False, 28, 2)):
        certificate = _authority(now - timedelta(days=since), now + timedelta(days=until))
        services.ca.authorities.append(
            ca_pb2.Authority(root=root, state=ca_pb2.AUTHORITY_STATE_ACTIVE, certificate_der=certificate)
        )
    _, found = _findings(services, etc)
    assert found["root"]["state"] == "ok"
    assert found["issuing authority"]["state"] == "warning"
    assert "keyreeve authority prepare" in found["issuing authority"]["remedy"]


def test_an_agent_that_does_not_run_is_named(services: Services, etc: Path, tmp_path: Path) -> None:
    (etc / "agent.toml").write_text(
        f'state_dir = "{tmp_path / "agent"}"\n[sign_socket]\npath = "{tmp_path / "sign.sock"}"\n'
    )
    _, found = _findings(services, etc, "--provider", str(tmp_path))
    assert found["sign socket"]["state"] == "failed"
    assert found["agent"]["state"] == "failed"
    assert "keyreeve.so is not there" in found["OpenSSL provider"]["detail"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can look at what another user may reach")
def test_a_directory_that_bars_the_proxy_is_named(services: Services, etc: Path) -> None:
    closed = Path(tempfile.mkdtemp())
    (closed / "sign.sock").touch(mode=0o666)
    (etc / "agent.toml").write_text(f'state_dir = "x"\n[sign_socket]\npath = "{closed / "sign.sock"}"\n')
    _, found = _findings(services, etc, "--proxy-user", "nobody")
    way = found["way of nobody to the sign socket"]
    assert way["state"] == "failed"
    assert str(closed) in way["detail"]
    assert "chmod o+x" in way["remedy"]
    closed.chmod(0o755)
    (closed / "sign.sock").chmod(0o600)
    _, found = _findings(services, etc, "--proxy-user", "nobody")
    assert "is not writable" in found["way of nobody to the sign socket"]["detail"]
    (closed / "sign.sock").chmod(0o666)
    _, found = _findings(services, etc, "--proxy-user", "nobody")
    assert found["way of nobody to the sign socket"]["state"] == "ok"
    shutil.rmtree(closed)


def test_text_output_ends_with_counts(services: Services, etc: Path) -> None:
    code, out, _ = services.run("doctor", "--config-dir", str(etc))
    assert code == 1
    assert out.splitlines()[-1].startswith("1 failed")
