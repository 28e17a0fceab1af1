"""A fresh SoftHSM token per test, in a directory of its own. Needs Debian's softhsm2."""

from __future__ import annotations

import os
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
    module: Path = field(default=MODULE)

    @property
    def pin(self) -> str:
        return self.pin_file.read_text().strip()


def softhsm_is_installed() -> bool:
    return MODULE.exists() and shutil.which("softhsm2-util") is not None


def make_softhsm_token(directory: Path, label: str = "keyreeve-test") -> SoftHsmToken:
    """Makes a token in `directory`, which is created. The PIN is random and stands only in its file, mode 0600."""
    store = directory / "tokens"
    store.mkdir(parents=True)
    conf = directory / "softhsm2.conf"
    conf.write_text(
        f"directories.tokendir = {store}\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n"
    )
    pin_file = directory / "pin"
    pin_file.touch(mode=0o600)
    pin = secrets.token_hex(8)
    pin_file.write_text(pin + "\n")
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", label, "--pin", pin, "--so-pin", secrets.token_hex(8)],
        env={**os.environ, "SOFTHSM2_CONF": str(conf)},
        check=True,
        capture_output=True,
    )
    return SoftHsmToken(directory=store, label=label, pin_file=pin_file, conf=conf)
