"""An installation as its configuration files describe it. The doctor reads them as plain TOML: the services alone know their meaning."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVICES = ("ca", "keyserver", "signer", "agent")


@dataclass(frozen=True)
class ConfigFile:
    """One service's file; `values` is empty where it cannot be read as TOML."""

    service: str
    path: Path
    values: dict[str, Any]

    def text(self, *keys: str) -> str | None:
        value = self._value(*keys)
        return value if isinstance(value, str) and value else None

    def integer(self, *keys: str) -> int | None:
        """None also for what is no number: the service itself says so when it reads its file."""
        value = self._value(*keys)
        return value if type(value) is int else None

    def _value(self, *keys: str) -> Any:
        value: Any = self.values
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def file(self, *keys: str) -> Path | None:
        """A path in the file; relative ones are relative to the file, as the services take them."""
        text = self.text(*keys)
        return self.path.resolve().parent / text if text else None

    def tables(self, key: str) -> list[ConfigFile]:
        """The tables of an array, each as if it were a file of its own."""
        value = self.values.get(key)
        rows = value if isinstance(value, list) else []
        return [ConfigFile(self.service, self.path, row) for row in rows if isinstance(row, dict)]

    def secrets(self) -> Iterator[tuple[str, Path]]:
        """Every secret file that the configuration names: keys that end in _file and hold a PIN, passphrase, password, token or key."""
        yield from _secrets(self.values, "", self.path.resolve().parent)


_SECRET_KEYS = {"pin_file", "passphrase_file", "password_file", "join_token_file", "secret_id_file", "token_file"}


def _secrets(values: dict[str, Any], where: str, base: Path) -> Iterator[tuple[str, Path]]:
    for key, value in values.items():
        name = f"{where}{key}"
        if isinstance(value, dict):
            yield from _secrets(value, f"{name}.", base)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    yield from _secrets(item, f"{name}[{index}].", base)
        elif isinstance(value, str) and key in _SECRET_KEYS:
            yield name, base / value


@dataclass(frozen=True)
class Installation:
    """What is configured on this host, and where the doctor is to look for the rest."""

    config_dir: Path
    files: dict[str, ConfigFile]
    ca_socket: Path
    key_server_socket: Path
    provider: Path | None
    proxy_user: str

    def of(self, service: str) -> ConfigFile | None:
        return self.files.get(service)


def read_config_files(config_dir: Path) -> dict[str, ConfigFile]:
    """The files that are there; keyserver.toml may say that signer.toml is elsewhere."""
    found: dict[str, ConfigFile] = {}
    for service in SERVICES:
        path = config_dir / f"{service}.toml"
        if service == "signer" and "keyserver" in found:
            path = found["keyserver"].file("signer_config") or path
        if path.exists():
            found[service] = ConfigFile(service, path, _read(path))
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
