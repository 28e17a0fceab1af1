"""Which system calls a process may still make: a seccomp filter for all its threads, made by the system's libseccomp.

Two kinds. `allow_only` is for our own code (the signer): what is named is let through, what is named as forbidden fails with EPERM, and all
else fails with ENOSYS, as on a kernel that lacks it: a newer libc or interpreter falls back. `deny` is for a worker, whose vendor's module may
need what we cannot know. A denied call is an error to its caller, and a record in the kernel's audit log where that takes errors; it does not
kill, so that a bug of ours is no outage. Spec: seccomp(2), seccomp_rule_add(3).
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

_LIBRARY = "libseccomp.so.2"
_ALLOW = 0x7FFF0000
_KILL_PROCESS = 0x8000_0000
_ATTRIBUTE_BAD_ARCHITECTURE, _ATTRIBUTE_TSYNC, _ATTRIBUTE_LOG = 2, 4, 6
_UNKNOWN_CALL = -1


class Compare(IntEnum):
    NE, LT, LE, EQ, GE, GT, MASKED_EQ = range(1, 8)


@dataclass(frozen=True, slots=True)
class Argument:
    """A condition on argument `index`: `value`, or for MASKED_EQ `value` is the mask and `masked` what it has to leave."""

    index: int
    compare: Compare
    value: int
    masked: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """A system call by its name; all `arguments` have to hold."""

    name: str
    arguments: tuple[Argument, ...] = ()


class _ArgumentCompare(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def allow_only(allowed: Iterable[Call], *, forbidden: Iterable[Call]) -> None:
    """From now on, in every thread. Raises: OSError."""
    with _Filter(_fail(errno.ENOSYS)) as made:
        for call in allowed:
            made.add(_ALLOW, call)
        for call in forbidden:
            made.add(_fail(errno.EPERM), call)
        made.load()


def deny(forbidden: Iterable[Call], *, absent: Iterable[Call]) -> None:
    """From now on, in every thread; `absent` fail with ENOSYS. Raises: OSError."""
    with _Filter(_ALLOW) as made:
        for call in forbidden:
            made.add(_fail(errno.EPERM), call)
        for call in absent:
            made.add(_fail(errno.ENOSYS), call)
        made.load()


def _fail(number: int) -> int:
    return 0x00050000 | number


class _Filter:
    def __init__(self, default: int) -> None:
        self._library = _load_library()
        self._context = self._library.seccomp_init(default)
        if not self._context:
            raise OSError(errno.ENOMEM, "libseccomp made no filter")

    def __enter__(self) -> _Filter:
        # Older kernels lack the log flag; every kernel since 3.17 has TSYNC.
        self._library.seccomp_attr_set(self._context, _ATTRIBUTE_LOG, 1)
        _check(self._library.seccomp_attr_set(self._context, _ATTRIBUTE_TSYNC, 1))
        # A call by the numbers of another architecture: libseccomp's own default ends the one thread that makes it, and the others go on.
        _check(self._library.seccomp_attr_set(self._context, _ATTRIBUTE_BAD_ARCHITECTURE, _KILL_PROCESS))
        return self

    def __exit__(self, *_: object) -> None:
        self._library.seccomp_release(self._context)

    def add(self, action: int, call: Call) -> None:
        number = self._library.seccomp_syscall_resolve_name(call.name.encode())
        if number == _UNKNOWN_CALL:
            return  # younger than this libseccomp: what it knows is all that it lets through
        conditions = [_ArgumentCompare(each.index, each.compare, each.value, each.masked) for each in call.arguments]
        array = (_ArgumentCompare * len(conditions))(*conditions)
        _check(self._library.seccomp_rule_add_array(self._context, action, number, len(conditions), array))

    def load(self) -> None:
        _check(self._library.seccomp_load(self._context))


def _load_library() -> ctypes.CDLL:
    """Raises: OSError."""
    library = ctypes.CDLL(_LIBRARY)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = (ctypes.c_uint32,)
    library.seccomp_release.restype = None
    library.seccomp_release.argtypes = (ctypes.c_void_p,)
    library.seccomp_attr_set.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32)
    library.seccomp_syscall_resolve_name.argtypes = (ctypes.c_char_p,)
    library.seccomp_rule_add_array.argtypes = (
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_ArgumentCompare),
    )  # fmt: skip
    library.seccomp_load.argtypes = (ctypes.c_void_p,)
    return library


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, f"libseccomp: {errno.errorcode.get(-result, result)}")
