"""A fresh SoftHSM token per test, in a directory of its own. Needs Debian's softhsm2."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

MODULE = Path("/usr/lib/softhsm/libsofthsm2.so")


@dataclass(frozen=True, slots=True)
class SoftHsmToken:
    """`directory` holds the token store, `conf` is what SOFTHSM2_CONF names, `pin_file` holds the user PIN."""

    directory: Path
    label: str
    pin_file: Path
    conf: Path
    serial: str
    module: Path = field(default=MODULE)

    @property
    def pin(self) -> str:
        return self.pin_file.read_text().strip()


def softhsm_is_installed() -> bool:
    return MODULE.exists() and shutil.which("softhsm2-util") is not None


def make_softhsm_token(directory: Path, label: str = "keyreeve-test", *, pin_name: str = "pin") -> SoftHsmToken:
    """Makes a token in `directory`, which is created, or holds tokens already. The PIN is random and stands only in its file, mode 0600."""
    store = directory / "tokens"
    store.mkdir(parents=True, exist_ok=True)
    conf = directory / "softhsm2.conf"
    conf.write_text(
        f"directories.tokendir = {store}\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n"
    )
    pin_file = directory / pin_name
    pin_file.touch(mode=0o600)
    pin = secrets.token_hex(8)
    pin_file.write_text(pin + "\n")
    before = _serials(conf)
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", label, "--pin", pin, "--so-pin", secrets.token_hex(8)],
        env={**os.environ, "SOFTHSM2_CONF": str(conf)},
        check=True,
        capture_output=True,
    )
    (serial,) = _serials(conf) - before
    return SoftHsmToken(serial=serial, directory=store, label=label, pin_file=pin_file, conf=conf)


def _serials(conf: Path) -> set[str]:
    shown = subprocess.run(
        ["softhsm2-util", "--show-slots"],
        env={**os.environ, "SOFTHSM2_CONF": str(conf)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return set(re.findall(r"^\s*Serial number:\s*([0-9a-f]+)\s*$", shown, re.MULTILINE))
