"""Files that must be whole or absent, and secrets that only their owner may read."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from pathlib import Path

from keyreeve_common.errors import ConfigInvalid, Internal, KeyreeveError, StorageFull

MAX_SECRET_BYTES = 4096
_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644, owner: tuple[int, int] | None = None) -> None:
    """Replaces `path` by `data`: a reader sees the old content or the new, a crash leaves one of them, and after the return the new.

    Raises: StorageFull; Internal for any other fault of the file system.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.new")
    try:
        temporary.unlink(
            missing_ok=True
        )  # what a crash left, or somebody laid there who keeps it open: never written to
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _write_all(descriptor, data)
            if owner is not None:
                os.fchown(descriptor, *owner)
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise storage_error(error, path) from error


def sync_directory(path: Path) -> None:
    """Makes the names in `path` outlast a crash. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def storage_error(error: OSError, path: Path) -> KeyreeveError:
    """Our error for a fault of the file system at `path`."""
    if error.errno in _FULL:
        return StorageFull(f"{path}: no space left on the device; free some, nothing was changed")
    return Internal(f"{path}: {error.strerror}")


def read_secret(path: Path) -> bytes:
    """The content of a secret file without its last line break.

    Raises: ConfigInvalid when it is missing, empty, over 4,096 bytes, or readable by other users.
    """
    try:
        descriptor = os.open(
            path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        )  # a pipe would keep us waiting for its writer
    except OSError as error:
        raise ConfigInvalid(f"{path}: secret file cannot be read: {error.strerror}") from error
    try:
        _require_secret(path, os.fstat(descriptor))
        data = os.read(descriptor, MAX_SECRET_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > MAX_SECRET_BYTES:
        raise ConfigInvalid(f"{path}: secret file is longer than {MAX_SECRET_BYTES} bytes")
    secret = data.removesuffix(b"\n").removesuffix(b"\r")
    if not secret:
        raise ConfigInvalid(f"{path}: secret file is empty")
    return secret


def check_secret_file(path: Path) -> None:
    """For whoever passes a secret file on and is not to know the secret: looks at the file, never into it.

    Raises: ConfigInvalid when it is missing, no regular file, or readable by other users.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigInvalid(f"{path}: secret file cannot be read: {error.strerror}") from error
    _require_secret(path, status)


def _require_secret(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigInvalid(f"{path}: secret is not a regular file")
    if status.st_mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ConfigInvalid(f"{path}: secret file is open to other users; run: chmod 600 {path}")


def make_private_directory(path: Path, *, mode: int = 0o700) -> None:
    """Makes `path` if it is absent. Raises: ConfigInvalid when it exists and others may write to it."""
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise ConfigInvalid(f"{path}: directory cannot be made: {error.strerror}") from error
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise ConfigInvalid(f"{path}: directory is writable by every user; run: chmod o-w {path}")
