"""agent.toml: what is accepted, and what is named when it is not."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path

import pytest
from keyreeve_client import agent
from keyreeve_client.agent.config import AgentConfig, CaConfig, KeyServerConfig, ProxyConfig, SignSocketConfig
from keyreeve_common.config import load_config
from keyreeve_common.errors import ConfigInvalid

MINIMAL = """
trust_domain = "example.org"
bundle_file = "bundle.pem"
[ca]
address = "ca:1"
attest_address = "ca:2"
[key_server]
addresses = ["ks:1"]
[sign_socket]
path = "/run/keyreeve/sign.sock"
"""
PROXY = """
[[proxy]]
name = "{name}"
spiffe_id = "spiffe://{td}/web"
directory = "{directory}"
"""


def load(tmp_path: Path, text: str) -> AgentConfig:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return load_config(AgentConfig, path)


def test_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    assert str(config.ca_id) == "spiffe://example.org/keyreeve/ca"
    assert str(config.key_server_id) == "spiffe://example.org/keyreeve/keyserver"
    assert config.state_dir == Path("/run/keyreeve-agent")
    assert config.bundle_file == tmp_path / "bundle.pem"
    assert config.sign_socket.mode_bits == 0o666
    assert config.proxy == ()


def test_proxies(tmp_path: Path) -> None:
    text = MINIMAL + PROXY.format(name="web", td="example.org", directory="/etc/nginx/keyreeve")
    config = load(tmp_path, text + 'reload_command = ["/usr/sbin/nginx", "-s", "reload"]\nreload_timeout = "3s"\n')
    assert config.proxy[0].reload_command == ("/usr/sbin/nginx", "-s", "reload")
    assert config.proxy[0].reload_timeout == timedelta(seconds=3)


def test_every_key_is_documented_and_the_example_loads(tmp_path: Path) -> None:
    readme = Path(agent.__file__).with_name("README.md").read_text()
    example = readme.split("```toml\n")[1].split("```")[0]
    load(tmp_path, example)
    for kind in (AgentConfig, CaConfig, KeyServerConfig, SignSocketConfig, ProxyConfig):
        for field in dataclasses.fields(kind):
            assert f"{field.name}" in example


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (MINIMAL.replace("sign.sock", "x" * 120), "sign_socket.*path"),
        (MINIMAL + 'mode = "rw"', "sign_socket.*mode"),
        (MINIMAL + "max_connections = 0", "sign_socket.*max_connections"),
        (MINIMAL.replace('["ks:1"]', "[]"), "key_server.*addresses"),
        (MINIMAL.replace('["ks:1"]', '["ks:1", "ks:1"]'), "key_server.*twice"),
        (MINIMAL.replace('["ks:1"]', '["ks:1"]\nhedge_percent = 90'), "key_server.*hedge_percent"),
        (MINIMAL.replace('["ks:1"]', '["ks:1"]\nhedge_floor = "0s"'), "key_server.*hedge_floor"),
        (MINIMAL.replace('["ks:1"]', '["ks:1"]\nsilence_timeout = "1ms"'), "key_server.*silence_timeout"),
        (MINIMAL.replace('["ks:1"]', '["ks:1"]\nmax_errors = 0'), "key_server.*max_errors"),
        (MINIMAL + "color = 1", "sign_socket.color: unknown key"),
        (MINIMAL + PROXY.format(name="a", td="other.org", directory="/a"), "proxy a: .*other.org"),
        (MINIMAL + 2 * PROXY.format(name="a", td="example.org", directory="/a"), "same name"),
        (
            MINIMAL + "".join(PROXY.format(name=name, td="example.org", directory="/a") for name in "ab"),
            "same directory",
        ),
        (
            MINIMAL + PROXY.format(name="a", td="example.org", directory="/a") + 'reload_command = ["nginx"]',
            "absolute path",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigInvalid, match=named):
        load(tmp_path, text)
