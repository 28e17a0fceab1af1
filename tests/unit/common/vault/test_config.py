from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from keyreeve_common.errors import ConfigInvalid
from keyreeve_common.vault.config import KUBERNETES_TOKEN, VaultConfig, VaultLogin

GOOD: dict[str, Any] = {
    "address": "https://vault.example.org:8200",
    "login": VaultLogin.APPROLE,
    "role_id": "role",
    "secret_id_file": Path("/s"),
}
TOKEN: dict[str, Any] = {"login": VaultLogin.TOKEN, "token_file": Path("/t")}


def test_secret_file_is_the_one_of_the_method() -> None:
    assert VaultConfig(**GOOD).secret_file == Path("/s")
    assert VaultConfig(address=GOOD["address"], **TOKEN).secret_file == Path("/t")
    kubernetes = VaultConfig(address=GOOD["address"], login=VaultLogin.KUBERNETES, role="r")
    assert (kubernetes.secret_file, kubernetes.auth_mount) == (KUBERNETES_TOKEN, "kubernetes")
    assert VaultConfig(**{**GOOD, "login_mount": "teams/approle"}).auth_mount == "teams/approle"


@pytest.mark.parametrize("address", ["http://127.0.0.1:8200", "http://[::1]:8200", "http://localhost:8200"])
def test_plain_http_is_for_loopback_when_asked_for(address: str) -> None:
    VaultConfig(address=address, insecure_http=True, **TOKEN)
    with pytest.raises(ConfigInvalid, match="insecure_http = true"):
        VaultConfig(address=address, **TOKEN)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"address": "vault.example.org"}, "is not a URL"),
        ({"address": "https://:8200"}, "is not a URL"),
        ({"address": "https://[v"}, "is not a URL"),
        ({"address": "https://vault.example.org:99999"}, "is not a URL"),
        ({"address": "ftp://vault.example.org"}, "is not a URL"),
        ({"address": "https://user:password@vault.example.org"}, "more than scheme, host and port"),
        ({"address": "https://vault.example.org/v1"}, "more than scheme, host and port"),
        ({"address": "https://vault.example.org?x=1"}, "more than scheme, host and port"),
        ({"address": "http://vault.example.org:8200", "insecure_http": True}, "a loopback address"),
        ({"address": "http://127.0.0.2.example.org", "insecure_http": True}, "a loopback address"),
        ({"insecure_http": True}, "for an http address only"),
        ({"role_id": ""}, "role_id is missing"),
        ({"role_id": "two words"}, "one printable word"),
        ({"secret_id_file": None}, "secret_id_file is missing"),
        ({"role": "r"}, "role is for login = 'kubernetes' only"),
        ({"token_file": Path("/t")}, "token_file is for login = 'token' only"),
        ({"namespace": "/team"}, "namespace is not a path"),
        ({"namespace": "team/../root"}, "namespace is not a path"),
        ({"login_mount": "a//b"}, "login_mount is not a path"),
    ],
)
def test_faults_are_named(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigInvalid) as refused:
        VaultConfig(**{**GOOD, **changes})
    assert rule in refused.value.detail
    assert "password" not in refused.value.detail
