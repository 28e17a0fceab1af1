"""Runs a command of this Python as another user, also where the interpreter lies in a home that only root enters.

Then the command gets a mount namespace of its own, in which that home holds the interpreter alone and is open; the machine stays as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

TARGET_UID, OTHER_UID, THIRD_UID = 64_901, 64_902, 64_903
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to run processes as other users")

_OPEN_HOME = """set -e
aside=$(mktemp -d)
mount --make-rprivate /
mount --bind "$2" "$aside"
mount -t tmpfs -o mode=755 none "$1"
mkdir -p "$2"
mount --move "$aside" "$2"
rmdir "$aside"
shift 2
exec "$@"
"""


def command_as(uid: int, command: list[str]) -> list[str]:
    """The command, run by this uid, without groups or capabilities."""
    return with_open_home(["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--", *command])


def with_open_home(command: list[str]) -> list[str]:
    """The command, which may become another user by itself and then still runs this Python."""
    closed = _closed_home()
    if closed is None:
        return command
    return ["unshare", "--mount", "sh", "-c", _OPEN_HOME, "sh", str(closed), sys.base_prefix, *command]


@cache
def _closed_home() -> Path | None:
    """The uppermost directory on the way to the interpreter that other users may not enter."""
    path = Path(sys.base_prefix)
    return next((each for each in reversed(path.parents) if not each.stat().st_mode & 0o001), None)


@cache
def users_can_be_changed() -> bool:
    if os.geteuid() != 0:
        return False
    command = command_as(TARGET_UID, [sys.executable, "-c", "import keyreeve_keyserver.signer"])
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


@contextmanager
def directory_of(uid: int) -> Iterator[Path]:
    """A new directory that this user owns and reaches, unlike those of pytest."""
    path = Path(tempfile.mkdtemp(prefix="keyreeve-"))
    path.chmod(0o755)
    os.chown(path, uid, uid)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def give(path: Path, uid: int) -> None:
    """All of a directory to this user."""
    for each in (path, *path.rglob("*")):
        os.chown(each, uid, uid, follow_symlinks=False)
