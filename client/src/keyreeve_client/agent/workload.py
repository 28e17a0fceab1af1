"""Unix workload attestation: what the kernel says of the process at the other end of a Unix socket.

uid, gid and supplementary groups are those that the kernel recorded at connect. Path and sha256 are read from /proc and count only if the
process was alive, and the same, before and after the reading: by a pidfd (of the socket itself where the kernel has SO_PEERPIDFD), else by
its start time. The path counts only if in the agent's own view of the file system it names the very file that runs, so that a private mount
or a chroot cannot borrow a name. What may not be read is absent, never guessed.
"""

from __future__ import annotations

import errno
import grp
import hashlib
import os
import pwd
import select
import socket
import stat
import struct
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

from keyreeve_common.errors import RateLimited, Unauthenticated
from keyreeve_common.telemetry import log_warning

from keyreeve_client.agent.authorisation import Selector

_UCRED = struct.Struct("iII")
_SO_PEERGROUPS = 59
_SO_PEERPIDFD = 77
_MAX_OPTION_BYTES = 1024
_MAX_EXECUTABLE_BYTES = 1 << 30
_HASH_CACHE_SIZE = 256
PATH_KIND, SHA256_KIND = "unix:path", "unix:sha256"
COSTLY_KINDS = frozenset({PATH_KIND, SHA256_KIND})
_DESCRIPTORS_BACK = timedelta(milliseconds=250)
_PROC = Path("/proc")
_GONE = "the process that opened this connection is gone or out of sight; open a connection of your own"


@lru_cache(maxsize=8)
def _warn_once(reason: str) -> None:
    log_warning("workload_selector_absent", reason=reason, repeated="not logged again")


@lru_cache(maxsize=1024)
def _user_name(uid: int) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


@lru_cache(maxsize=1024)
def _group_name(gid: int) -> str | None:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return None


def forget_names() -> None:
    """Lets users and groups be looked up anew; called on each sync."""
    _user_name.cache_clear()
    _group_name.cache_clear()


def start_time_of(pid: int) -> int | None:
    """Start time in clock ticks since boot, None when there is no such process. Spec: proc_pid_stat(5), field 22."""
    try:
        text = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    fields = text[text.rfind(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


@dataclass
class _HashCache:
    """sha256 of executables by identity and times of the file, so that each is read once."""

    entries: OrderedDict[tuple[int, ...], str] = field(default_factory=OrderedDict)

    def digest(self, descriptor: int) -> str | None:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_EXECUTABLE_BYTES:
            return None
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        digest = self.entries.get(key)
        if digest is None:
            with os.fdopen(os.dup(descriptor), "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(descriptor)
            if (after.st_size, after.st_mtime_ns, after.st_ctime_ns) != key[2:]:
                return None
            self.entries[key] = digest
            while len(self.entries) > _HASH_CACHE_SIZE:
                self.entries.popitem(last=False)
        return digest


_HASHES = _HashCache()


class Peer:
    """The process that opened a connection. `close` it with the connection. Raises: Unauthenticated when it is gone already; RateLimited."""

    def __init__(self, connection: socket.socket) -> None:
        pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        self.pid, self.uid, self.gid = int(pid), int(uid), int(gid)
        if self.pid == 0:  # of a PID namespace that the agent cannot see
            raise Unauthenticated(_GONE)
        self._pidfd = _peer_pidfd(connection, self.pid)
        self._exit = select.poll()
        if self._pidfd is not None:
            self._exit.register(self._pidfd, select.POLLIN)
        self._start_time = start_time_of(self.pid)
        self._executable: tuple[int, int] | None = None
        self._costly: dict[str, Selector | None] = {}
        self.cheap = frozenset(_cheap_selectors(self.uid, self.gid, _supplementary_groups(connection, self.pid)))

    def close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def check_alive(self) -> None:
        """Raises: Unauthenticated when the process is gone: whoever holds the socket now was never attested."""
        if not self.alive:
            raise Unauthenticated(_GONE)

    @property
    def alive(self) -> bool:
        if self._pidfd is not None:
            return not self._exit.poll(0)
        return self._start_time is not None and start_time_of(self.pid) == self._start_time

    def selectors(self) -> frozenset[Selector]:
        """The selectors learnt so far, checked to be still those of this process. Raises: Unauthenticated."""
        if self._costly and self._executable_identity() != self._executable:
            self._costly.clear()
        self.check_alive()
        if not self._costly:
            return self.cheap
        return self.cheap | {selector for selector in self._costly.values() if selector is not None}

    def lacks(self, kinds: Iterable[str]) -> frozenset[str]:
        """Those of `kinds` that were not learnt yet."""
        return frozenset(kind for kind in kinds if kind not in self._costly)

    def learn(self, kinds: Iterable[str]) -> None:
        """Reads costly selectors; blocks for as long as hashing the executable takes. Raises: Unauthenticated."""
        self.check_alive()
        found: dict[str, Selector | None] = dict.fromkeys(kinds)
        link = _PROC / str(self.pid) / "exe"
        identity: tuple[int, int] | None = None
        try:
            descriptor = os.open(link, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            _warn_once(f"{type(error).__name__} when opening /proc/<pid>/exe; CAP_SYS_PTRACE is needed for other users")
        else:
            try:
                status = os.fstat(descriptor)
                identity = (status.st_dev, status.st_ino)
                if PATH_KIND in found:
                    found[PATH_KIND] = _path_selector(link, identity)
                if SHA256_KIND in found and (digest := _HASHES.digest(descriptor)) is not None:
                    found[SHA256_KIND] = Selector("unix", f"sha256:{digest}")
            finally:
                os.close(descriptor)
        self.check_alive()
        if identity != self._executable:
            self._costly.clear()
        self._executable = identity
        self._costly.update(found)

    def _executable_identity(self) -> tuple[int, int] | None:
        try:
            status = os.stat(_PROC / str(self.pid) / "exe")
        except OSError:
            return None
        return status.st_dev, status.st_ino


def _peer_pidfd(connection: socket.socket, pid: int) -> int | None:
    """None where the kernel has no pidfds at all. Raises: Unauthenticated, RateLimited."""
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise RateLimited("agent has no file descriptor left", retry_after=_DESCRIPTORS_BACK) from error
        if error.errno != errno.ENOPROTOOPT:
            raise Unauthenticated(_GONE) from error
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise Unauthenticated(_GONE) from error
    except OSError:
        return None


def _supplementary_groups(connection: socket.socket, pid: int) -> tuple[int, ...]:
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_OPTION_BYTES)
        return struct.unpack(f"{len(raw) // 4}I", raw)
    except OSError:  # an old kernel, or more groups than fit
        pass
    try:
        for line in (_PROC / str(pid) / "status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Groups:"):
                return tuple(int(gid) for gid in line.split()[1:])
    except OSError:
        _warn_once("supplementary groups cannot be read")
    return ()


def _cheap_selectors(uid: int, gid: int, groups: Iterable[int]) -> Iterable[Selector]:
    yield Selector("unix", f"uid:{uid}")
    yield Selector("unix", f"gid:{gid}")
    if (user := _user_name(uid)) is not None:
        yield Selector("unix", f"user:{user}")
    if (group := _group_name(gid)) is not None:
        yield Selector("unix", f"group:{group}")
    for extra in groups:
        yield Selector("unix", f"supplementary_gid:{extra}")
        if (name := _group_name(extra)) is not None:
            yield Selector("unix", f"supplementary_group:{name}")


def _path_selector(link: Path, identity: tuple[int, int]) -> Selector | None:
    try:
        path = os.readlink(link)
        status = os.stat(path)
    except OSError:
        return None
    return Selector("unix", f"path:{path}") if (status.st_dev, status.st_ino) == identity else None
