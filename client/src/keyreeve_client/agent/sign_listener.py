"""The socket file of the sign socket: replaced without a moment in which it has the wrong mode, and never in place of something else."""

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
        return _bind_beside_and_rename(path, mode)
    except OSError as error:
        raise ConfigInvalid(f"{path}: sign socket cannot be made: {error.strerror}") from error


def _bind_beside_and_rename(path: Path, mode: int) -> socket.socket:
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    beside = f".{os.getpid()}.s"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside, dir_fd=directory)
        listener.bind(f"/proc/self/fd/{directory}/{beside}")  # short, however long the directory's name is
        os.chmod(beside, mode, dir_fd=directory)
        listener.listen(BACKLOG)
        listener.setblocking(False)
        os.rename(beside, path.name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        listener.close()
        with contextlib.suppress(OSError):
            os.unlink(beside, dir_fd=directory)
        raise
    finally:
        os.close(directory)
    return listener


def remove_sign_socket(path: Path) -> None:
    """On an orderly stop."""
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
