"""SVIDs as files for proxies that read files: chain.pem, key.pem (a key reference, no secret) and bundle.pem, replaced together.

    <directory>/current -> v7      what the proxy's configuration names: <directory>/current/chain.pem and so on
    <directory>/v7, v6             the present version and the one before, for a reload that is still reading
    <directory>/reloaded           the version that the reload command last took up
    <directory>/withdrawn          present while the CA does not assign the identity to this node

Always true: `current` names a whole version, at every moment and after every crash; nothing is written when nothing changed. A withdrawn
identity's files stay: they hold no secret, every signature is refused, and removing them would keep the whole proxy from starting.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from keyreeve_common.errors import ConfigInvalid, KeyreeveError
from keyreeve_common.files import storage_error, sync_directory, write_atomic

_VERSION = re.compile(r"v(\d{1,18})", re.ASCII)
_UNFINISHED = ".new"
CURRENT, RELOADED, WITHDRAWN = "current", "reloaded", "withdrawn"


@dataclass(frozen=True, slots=True)
class SvidFiles:
    """The content of one version."""

    chain_pem: bytes
    key_pem: bytes
    bundle_pem: bytes

    def by_name(self) -> dict[str, bytes]:
        return {"chain.pem": self.chain_pem, "key.pem": self.key_pem, "bundle.pem": self.bundle_pem}


@dataclass(frozen=True, slots=True)
class Ownership:
    """Whose the files are. With an owner or group nobody else may read them; without, everybody may."""

    owner: str | None = None
    group: str | None = None

    def ids(self) -> tuple[int, int]:
        """uid and gid. Raises: ConfigInvalid for an unknown name."""
        try:
            user = pwd.getpwnam(self.owner) if self.owner else None
            gid = grp.getgrnam(self.group).gr_gid if self.group else (user.pw_gid if user else os.getegid())
        except KeyError as error:
            raise ConfigInvalid(f"no such user or group: {error.args[0]}") from None
        return user.pw_uid if user else os.geteuid(), gid

    @property
    def restricted(self) -> bool:
        return self.owner is not None or self.group is not None


@dataclass(frozen=True, slots=True)
class FileSink:
    """One proxy's directory. All methods block and raise ConfigInvalid, StorageFull or Internal; old files are then untouched."""

    directory: Path
    ownership: Ownership

    def publish(self, files: SvidFiles) -> bool:
        """Makes `files` current; False when they were already."""
        try:
            self._prepare_directory()
            (self.directory / WITHDRAWN).unlink(missing_ok=True)
            if self._is_current(files):
                return False
            previous = self.current_version
            self._remove_unfinished()
            version = self._write_version(files)
            self._switch(version)
            self._prune({version, previous})
        except OSError as error:
            raise _typed(error, self.directory) from error
        return True

    def withdraw(self, reason: str) -> bool:
        """Marks the identity as not assigned any more; False when it was marked already, or never written."""
        self._check_links()
        marker = self.directory / WITHDRAWN
        if marker.exists() or self.current_version is None:
            return False
        write_atomic(marker, f"{reason}\n".encode())
        return True

    @property
    def current_version(self) -> str | None:
        try:
            return os.readlink(self.directory / CURRENT)
        except OSError:
            return None

    @property
    def reload_is_due(self) -> bool:
        """Whether the present version was never taken up by the reload command; survives a crash between the two."""
        try:
            return (self.directory / RELOADED).read_text().strip() != self.current_version
        except OSError:
            return self.current_version is not None

    def note_reload(self, version: str) -> None:
        write_atomic(self.directory / RELOADED, f"{version}\n".encode())

    def _prepare_directory(self) -> None:
        self._check_links()
        self.directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if status.st_uid not in _trusted() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise ConfigInvalid(
                    f"{self.directory}: only the agent's user may own and write this directory; "
                    f"run: chown {os.geteuid()} {self.directory} && chmod go-w {self.directory}"
                )
            self._give(descriptor)  # what was checked, whatever stands at the path by now
        finally:
            os.close(descriptor)

    def _check_links(self) -> None:
        """A proxy's user who owns a directory above this one could send the agent, often root, to somebody else's directory."""
        for path in (self.directory, *self.directory.parents):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                status = path.lstat()
                if stat.S_ISLNK(status.st_mode) and status.st_uid not in _trusted():
                    raise ConfigInvalid(
                        f"{path}: a symbolic link of user {status.st_uid}, which the agent does not follow"
                    )

    def _is_current(self, files: SvidFiles) -> bool:
        uid, gid = self.ownership.ids()
        current = self.directory / CURRENT
        for name, data in files.by_name().items():
            path = current / name
            try:
                status = path.stat()
                if path.read_bytes() != data or (status.st_uid, status.st_gid) != (uid, gid):
                    return False
            except OSError:
                return False
        return True

    def _versions(self) -> dict[str, int]:
        matches = (_VERSION.fullmatch(name) for name in os.listdir(self.directory))
        return {match.group(0): int(match.group(1)) for match in matches if match}

    def _write_version(self, files: SvidFiles) -> str:
        version = f"v{max(self._versions().values(), default=0) + 1}"
        unfinished = self.directory / _UNFINISHED
        unfinished.mkdir(mode=0o700)
        uid, gid = self.ownership.ids()
        for name, data in files.by_name().items():
            write_atomic(unfinished / name, data, mode=0o640 if self.ownership.restricted else 0o644, owner=(uid, gid))
        self._give(unfinished)
        sync_directory(unfinished)
        unfinished.rename(self.directory / version)
        return version

    def _give(self, directory: int | Path) -> None:
        """A directory stays the agent's, so that no proxy can replace what is in it; the group may look in."""
        group, mode = self.ownership.ids()[1], 0o750 if self.ownership.restricted else 0o755
        status = os.stat(directory)
        if status.st_gid != group:
            os.chown(directory, -1, group)
        if stat.S_IMODE(status.st_mode) != mode:
            os.chmod(directory, mode)

    def _switch(self, version: str) -> None:
        link = self.directory / f".{CURRENT}"
        link.unlink(missing_ok=True)
        link.symlink_to(version)
        link.rename(self.directory / CURRENT)
        sync_directory(self.directory)

    def _remove_unfinished(self) -> None:
        shutil.rmtree(self.directory / _UNFINISHED, ignore_errors=True)

    def _prune(self, kept: set[str | None]) -> None:
        for version in self._versions():
            if version not in kept:
                with contextlib.suppress(OSError):
                    shutil.rmtree(self.directory / version)


def _trusted() -> tuple[int, int]:
    return 0, os.geteuid()


def _typed(error: OSError, path: Path) -> KeyreeveError:
    if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
        return ConfigInvalid(f"{path}: {error.strerror}: {error.filename or path}")
    return storage_error(error, path)
