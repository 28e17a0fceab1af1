"""Where a Vault or OpenBao server is and how a process of ours logs in to it. Secrets are paths to files, never values.

The same keys stand in signer.toml (`[backend.vault]`) and ca.toml (`[upstream.vault]`).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from keyreeve_common.errors import ConfigInvalid

KUBERNETES_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_PATH = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_ROLE_ID = re.compile(r"[\x21-\x7e]{1,4096}", re.ASCII)


class VaultLogin(StrEnum):
    """`token`: a token that somebody else puts into a file; it is renewed, and read again when the file changes."""

    APPROLE = "approle"
    KUBERNETES = "kubernetes"
    TOKEN = "token"  # noqa: S105 - the name of a method


@dataclass(frozen=True, slots=True, kw_only=True)
class VaultConfig:
    """`ca_file` empty: the system's certificate authorities. `login_mount` empty: the method's own name.

    Raises: ConfigInvalid.
    """

    address: str
    login: VaultLogin
    namespace: str = ""
    ca_file: Path | None = None
    insecure_http: bool = False
    login_mount: str = ""
    role_id: str = ""
    secret_id_file: Path | None = None
    role: str = ""
    jwt_file: Path | None = None
    token_file: Path | None = None
    request_timeout: timedelta = timedelta(seconds=5)

    def __post_init__(self) -> None:
        self._check_address()
        self._check_login()
        for name in ("namespace", "login_mount"):
            value = getattr(self, name)
            _require(not value or _PATH.fullmatch(value) is not None, f"{name} is not a path such as 'team/one'")
        _require(
            timedelta(milliseconds=100) <= self.request_timeout <= timedelta(minutes=1),
            "request_timeout: allowed are 100ms to 1m",
        )

    @property
    def auth_mount(self) -> str:
        return self.login_mount or self.login.value

    @property
    def secret_file(self) -> Path:
        """The one file that the process opens to log in, at each log-in anew."""
        chosen = {
            VaultLogin.APPROLE: self.secret_id_file,
            VaultLogin.KUBERNETES: self.jwt_file or KUBERNETES_TOKEN,
            VaultLogin.TOKEN: self.token_file,
        }[self.login]
        assert chosen is not None  # noqa: S101 - __post_init__ holds it
        return chosen

    def _check_address(self) -> None:
        try:
            parts = urlsplit(self.address)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise ConfigInvalid("address is not a URL such as 'https://vault.example.org:8200'") from None
        _require(
            parts.scheme in ("https", "http") and bool(host) and port != 0,
            "address is not a URL such as 'https://vault.example.org:8200'",
        )
        _require(
            parts.path in ("", "/") and not parts.query and not parts.fragment and parts.username is None,
            "address has more than scheme, host and port: mounts and namespace have keys of their own",
        )
        if parts.scheme == "https":
            _require(not self.insecure_http, "insecure_http is for an http address only")
            return
        _require(
            self.insecure_http and _is_loopback(host or ""),
            "address is plain http, which shows token and messages to the network: use https"
            " (http needs insecure_http = true and a loopback address)",
        )
        _require(self.ca_file is None, "ca_file is for an https address only")

    def _check_login(self) -> None:
        belongs = {
            "role_id": (VaultLogin.APPROLE, self.role_id, True),
            "secret_id_file": (VaultLogin.APPROLE, self.secret_id_file, True),
            "role": (VaultLogin.KUBERNETES, self.role, True),
            "jwt_file": (VaultLogin.KUBERNETES, self.jwt_file, False),
            "token_file": (VaultLogin.TOKEN, self.token_file, True),
        }
        for name, (method, value, needed) in belongs.items():
            if self.login is method:
                _require(bool(value) or not needed, f"{name} is missing: login = '{method.value}' needs it")
            else:
                _require(not value, f"{name} is for login = '{method.value}' only")
        _require(
            not self.login_mount or self.login is not VaultLogin.TOKEN, "login_mount: login = 'token' has no mount"
        )
        _require(not self.role_id or _ROLE_ID.fullmatch(self.role_id) is not None, "role_id is not one printable word")
        _require(not self.role or _NAME.fullmatch(self.role) is not None, "role is not a name")


def check_mount(path: str, key: str) -> None:
    """Raises: ConfigInvalid."""
    _require(_PATH.fullmatch(path) is not None, f"{key} is not a path such as 'transit'")


def check_vault_name(name: str, key: str) -> None:
    """Raises: ConfigInvalid."""
    _require(_NAME.fullmatch(name) is not None, f"{key} is not a name of letters, digits, '_', '.' and '-'")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ConfigInvalid(rule)
