"""opencryptoki's software token: a module that is not SoftHSM. Needs root and Debian's opencryptoki; its daemon runs while a test does.

Its paths are fixed, so there is one such token on a machine: tests take turns by a lock, and a token that is not ours is left alone.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MODULE = Path("/usr/lib/x86_64-linux-gnu/opencryptoki/libopencryptoki.so.0")
LABEL = "keyreeve-test"
_STORE = Path("/var/lib/opencryptoki/swtok")
_LOCK = Path("/var/lock/keyreeve-opencryptoki.lock")
_SLOT, _FIRST_SO_PIN, _SO_PIN, _FIRST_PIN, _PIN = "3", "87654321", "76543210", "12345670", "24681357"


@dataclass(frozen=True, slots=True)
class OpencryptokiToken:
    module: Path
    label: str
    pin_file: Path


def opencryptoki_is_usable() -> bool:
    return MODULE.exists() and shutil.which("pkcsslotd") is not None and os.geteuid() == 0


@contextmanager
def opencryptoki_token(directory: Path) -> Iterator[OpencryptokiToken]:
    """A fresh token. Raises: RuntimeError where the machine's token is somebody's."""
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _empty_own_token()
        daemon = _start_daemon()
        try:
            _initialise()
            pin_file = directory / "pin"
            pin_file.touch(mode=0o600)
            pin_file.write_text(_PIN)
            yield OpencryptokiToken(MODULE, LABEL, pin_file)
        finally:
            if daemon is not None:
                _stop_daemon(daemon)


def _empty_own_token() -> None:
    data = _STORE / "NVTOK.DAT"
    if not data.exists():
        return
    if LABEL.encode() not in data.read_bytes():
        raise RuntimeError("opencryptoki's software token is in use: the test leaves it alone")
    for path in (*_STORE.glob("*.DAT"), *_STORE.glob("MK_*"), *(_STORE / "TOK_OBJ").glob("*")):
        path.unlink()


def _start_daemon() -> int | None:
    """The daemon's process, or None where one ran before."""
    if _daemon() is not None:
        return None
    subprocess.run(["pkcsslotd"], check=True, capture_output=True)
    deadline = time.monotonic() + 20
    while (daemon := _daemon()) is None or _SLOT not in _slots():
        if time.monotonic() > deadline:
            raise RuntimeError("pkcsslotd does not start, or shows no software token")
        time.sleep(0.05)
    return daemon


def _slots() -> set[str]:
    shown = subprocess.run(["pkcsconf", "-t"], check=False, capture_output=True, text=True).stdout
    return set(re.findall(r"^Token #(\d+)", shown, re.MULTILINE))


def _daemon() -> int | None:
    for program in Path("/proc").glob("[0-9]*/exe"):
        with suppress(OSError):  # gone meanwhile, or ended and not reaped
            if program.readlink().name == "pkcsslotd":
                return int(program.parent.name)
    return None


def _stop_daemon(daemon: int) -> None:
    os.kill(daemon, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while _daemon() == daemon and time.monotonic() < deadline:
        time.sleep(0.05)


def _initialise() -> None:
    """The token insists that both PINs are changed after they were set."""
    _pkcsconf("-I", "-S", _FIRST_SO_PIN, answer=LABEL + "\n")
    _pkcsconf("-P", "-S", _FIRST_SO_PIN, "-n", _SO_PIN)
    _pkcsconf("-u", "-S", _SO_PIN, "-n", _FIRST_PIN)
    _pkcsconf("-p", "-U", _FIRST_PIN, "-n", _PIN)


def _pkcsconf(*arguments: str, answer: str = "") -> None:
    subprocess.run(["pkcsconf", "-c", _SLOT, *arguments], input=answer, text=True, check=True, capture_output=True)
