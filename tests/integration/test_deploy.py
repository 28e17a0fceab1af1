"""What deploy/ holds is in order: sample configurations are what the services read, units are what systemd reads, and hard enough."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from keyreeve_ca.config import load_ca_config
from keyreeve_client.agent.config import AgentConfig
from keyreeve_common.config import load_config
from keyreeve_keyserver.config import load_keyserver_config
from keyreeve_keyserver.signer.config import SignerConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIG, UNITS, NGINX = ROOT / "deploy/config", ROOT / "deploy/systemd", ROOT / "deploy/nginx"
# The most that `systemd-analyze security` may find wrong with each, 0 (nothing) to 10.
PLAIN = {"keyreeve-signer": 0.6, "keyreeve-keyserver": 1.5, "keyreeve-ca": 1.5, "keyreeve-agent": 3.0}
EXPOSURE = {**PLAIN, **{f"{name}@": PLAIN[name] for name in ("keyreeve-signer", "keyreeve-keyserver")}}
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def test_the_samples_fit_together() -> None:
    agent = load_config(AgentConfig, CONFIG / "agent.toml")
    server = load_keyserver_config(CONFIG / "keyserver.toml")
    signer = load_config(SignerConfig, CONFIG / "signer.toml")
    ca = load_ca_config(CONFIG / "ca.toml")
    assert agent.trust_domain == server.trust_domain == ca.trust_domain
    assert agent.ca.address.rsplit(":", 1)[1] == ca.listen.rsplit(":", 1)[1]
    assert agent.ca.attest_address.rsplit(":", 1)[1] == ca.attest_listen.rsplit(":", 1)[1]
    assert ca.key_cluster.addresses == agent.key_server.addresses
    assert ca.key_cluster.admin_socket == server.admin_socket
    assert server.spiffe_id == agent.key_server_id
    assert agent.key_server.addresses[0].rsplit(":", 1)[1] == server.listen.rsplit(":", 1)[1]
    assert signer.default_name == "hsm"
    assert signer.listen.allowed_uids


def _unit(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (UNITS / f"{name}.service").read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def test_units_and_samples_name_the_same_paths() -> None:
    signer = load_config(SignerConfig, CONFIG / "signer.toml")
    server = load_keyserver_config(CONFIG / "keyserver.toml")
    unit = _unit("keyreeve-signer")
    assert str(server.signer_socket) in unit["ExecStart"][0]
    credentials = {f"/run/credentials/keyreeve-signer.service/{each.split(':')[0]}" for each in unit["LoadCredential"]}
    assert {str(signer.sealing.passphrase_file), str(signer.backend[0].pin_file)} == credentials


def test_the_signer_has_no_network_and_a_user_of_its_own() -> None:
    unit = _unit("keyreeve-signer")
    assert unit["PrivateNetwork"] == ["yes"]
    assert unit["RestrictAddressFamilies"] == ["AF_UNIX"]
    users = [_unit(name)["User"][0] for name in PLAIN]
    assert len(set(users)) == len(users)
    assert all(_unit(name)["LimitCORE"] == ["0"] for name in EXPOSURE)


def test_units_of_pairs_differ_from_the_plain_ones_in_their_names_alone() -> None:
    """Above all their hardening is the same."""
    own = {"Description", "Before", "After", "Requires", "Conflicts", "Environment", "ExecStart", "RuntimeDirectory"}
    for name in ("keyreeve-signer", "keyreeve-keyserver"):
        plain, of_pair = _unit(name), _unit(f"{name}@")
        differ = {key for key in plain.keys() | of_pair.keys() if plain.get(key) != of_pair.get(key)}
        assert differ <= {*own, "RuntimeDirectoryPreserve"}
    socket = "/run/keyreeve-signer-%i/signer.sock"
    assert socket in _unit("keyreeve-signer@")["ExecStart"][0]
    assert socket in _unit("keyreeve-keyserver@")["ExecStart"][0]
    assert "--pair %i/${PAIRS}" in _unit("keyreeve-keyserver@")["ExecStart"][0]


def test_the_signer_may_lock_itself_down() -> None:
    """systemd's filter set @system-service leaves these calls out; memory is locked only where there is no limit."""
    unit = _unit("keyreeve-signer")
    assert unit["LimitMEMLOCK"] == ["infinity"]
    allowed = {word for line in unit["SystemCallFilter"] if not line.startswith("~") for word in line.split()}
    assert allowed >= {"seccomp", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"}


def test_the_front_end_gets_to_the_signers_socket_and_is_known_there() -> None:
    """The socket is 0660 of the signer's group; SO_PEERCRED shows other users only outside a user namespace."""
    signer, front_end = _unit("keyreeve-signer"), _unit("keyreeve-keyserver")
    assert signer["Group"] == front_end["SupplementaryGroups"]
    assert "PrivateUsers" not in signer


def test_the_agent_gets_its_directories() -> None:
    """`name:other` is a symbolic link to systemd, not a mode; the join token has to lie where the agent may remove it."""
    unit = _unit("keyreeve-agent")
    assert unit["RuntimeDirectory"] == ["keyreeve keyreeve-agent"]
    assert unit["ExecStartPre"] == ["/bin/chmod 0700 /run/keyreeve-agent"]
    token = load_config(AgentConfig, CONFIG / "agent.toml").join_token_file
    assert token is not None
    assert token.parent == Path("/var/lib") / unit["StateDirectory"][0]


@needs_systemd
@pytest.mark.parametrize("name", EXPOSURE)
def test_systemd_reads_the_unit(name: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", str(UNITS / f"{name}.service")],
        capture_output=True, text=True, check=False, env={**os.environ, "SYSTEMD_LOG_TARGET": "console"},
    )  # fmt: skip
    # Only our own units, and not that the program is missing here.
    said = [line for line in done.stderr.splitlines() if "keyreeve" in line and "is not executable" not in line]
    assert not said


@needs_systemd
def test_systemd_reads_the_drop_in_for_a_card(tmp_path: Path) -> None:
    """And with it the signer gets vfio, a group, and none of the rest of /dev."""
    unit = tmp_path / "keyreeve-signer.service"
    drop_in = tmp_path / "keyreeve-signer.service.d/qat.conf"
    drop_in.parent.mkdir()
    unit.write_text((UNITS / unit.name).read_text())
    drop_in.write_text((UNITS / "keyreeve-signer-qat.conf").read_text())
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)],
        capture_output=True, text=True, check=False, env={**os.environ, "SYSTEMD_LOG_TARGET": "console"},
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "keyreeve" in line and "is not executable" not in line]
    assert not said
    settings = [line for line in drop_in.read_text().splitlines() if "=" in line and not line.startswith("#")]
    assert [line for line in settings if line.startswith("DeviceAllow=")] == [
        "DeviceAllow=/dev/vfio/vfio rw",
        "DeviceAllow=char-vfio rw",
    ]
    assert "DevicePolicy=closed" in unit.read_text().splitlines()


@needs_systemd
@pytest.mark.parametrize(("name", "most"), EXPOSURE.items())
def test_the_unit_is_hardened(name: str, most: float) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={int(most * 10)}", "--no-pager",
         str(UNITS / f"{name}.service")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout.splitlines()[-1:]


def test_the_nginx_example_is_what_nginx_reads(tmp_path: Path) -> None:
    """With certificates and a key of the test's own in the place of the agent's files."""
    from keyreeve_testing.pki import TestPki

    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    if not Path(nginx).exists():
        pytest.skip("needs nginx")
    svid = TestPki().svid("/web")
    current = tmp_path / "current"
    current.mkdir()
    svid.write(current, "chain")
    (current / "key.pem").write_bytes(svid.key_pem)
    (current / "bundle.pem").write_bytes(TestPki().bundle_pem)
    server = (NGINX / "keyreeve.conf").read_text().replace("/var/lib/keyreeve-agent/nginx/current", str(current))
    server = server.replace("443", "127.0.0.1:18443")
    conf = tmp_path / "nginx.conf"
    conf.write_text(f"pid {tmp_path}/pid;\nevents {{}}\nhttp {{\n{server}\n}}\n")
    done = subprocess.run([nginx, "-t", "-e", "stderr", "-p", str(tmp_path), "-c", str(conf)],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_no_example_holds_a_private_key() -> None:
    texts: dict[str, Any] = {
        str(path): path.read_text() for path in (ROOT / "deploy").rglob("*") if path.is_file() and path.suffix != ".pyc"
    }
    assert not [name for name, text in texts.items() if "PRIVATE KEY" in text]
