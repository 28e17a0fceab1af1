"""The socket file of the sign socket: a stale one is replaced, anything else at its place is left alone."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from keyreeve_common.errors import ConfigInvalid

BACKLOG = 1024


def bind_sign_socket(path: Path, mode: int) -> socket.socket:
    """A listening socket at `path`; a stale socket file that a killed agent left is replaced. The caller holds the agent's lock.

    Raises: ConfigInvalid.
    """
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
            path.parent.chmod(0o755)
        if os.path.lexists(path) and not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigInvalid(f"{path}: exists and is not a socket; remove it or choose another sign_socket.path")
        return _bind(path, mode)
    except OSError as error:
        raise ConfigInvalid(f"{path}: sign socket cannot be made: {error.strerror}") from error


def _bind(path: Path, mode: int) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(str(path))  # under the agent's umask: nobody else connects before the mode is right
        path.chmod(mode)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def remove_sign_socket(path: Path) -> None:
    """On an orderly stop."""
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
