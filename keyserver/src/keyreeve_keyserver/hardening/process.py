"""Protections of one process by prctl, rlimit and mlockall: no core, no tracer, no way back to privileges, memory that is not swapped.

Each function either holds when it returns, or raises OSError with the reason. Spec: prctl(2), mlockall(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
from pathlib import Path

PR_SET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 3, 4, 38
_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int = 0) -> int:
    """Raises: OSError."""
    zero = ctypes.c_ulong(0)
    return check(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero))


def check(result: int) -> int:
    """The result of a call of libc. Raises: OSError where it is -1."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def forbid_cores() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def forbid_tracing() -> None:
    """No process without CAP_SYS_PTRACE attaches to us, reads our memory, descriptors or environment; no core is written."""
    prctl(PR_SET_DUMPABLE, 0)


def forbid_new_privileges() -> None:
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def end_with_parent(parent: int) -> None:
    """SIGKILL to us when `parent`, which has to be our parent, ends. Raises: ProcessLookupError where it has ended already."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise ProcessLookupError(f"process {parent} is not our parent")


MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
_PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 47, 4
_CAPABILITY_VERSION_3, _CAP_IPC_LOCK = 0x20080522, 14


def lock_memory() -> None:
    """What is touched from now on stays in memory, and so do the pages that are there already.

    Only without a limit, which CAP_SYS_RESOURCE lifts and CAP_IPC_LOCK passes over: under one, an allocation would fail in the middle of work.
    Raises: OSError, ValueError.
    """
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    if resource.getrlimit(resource.RLIMIT_MEMLOCK) != infinite:
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, infinite)
        except (ValueError, OSError):
            if not _has_capability(_CAP_IPC_LOCK):
                raise
    check(_libc.mlockall(ctypes.c_int(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT)))


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def drop_capabilities() -> None:
    """Leaves this thread none, and none to gain; to be called while there is one thread.

    CAP_IPC_LOCK stays where it was: `lock_memory` may stand on it, and it reaches nothing. Spec: capabilities(7). Raises: OSError.
    """
    if not _capabilities("CapPrm"):
        return  # nor may it have any later, with no_new_privileges; and a unit's filter may forbid to ask
    kept = 1 << _CAP_IPC_LOCK if _has_capability(_CAP_IPC_LOCK) else 0
    prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    for number in range(64):
        try:
            prctl(_PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno == errno.EINVAL:
                break  # past the last one that this kernel knows
            if error.errno == errno.EPERM:
                break  # without CAP_SETPCAP the bounding set stays, and no_new_privileges keeps us from using it
            raise
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)  # effective, permitted, inheritable; then their high halves
    check(_libc.capset(ctypes.byref(header), ctypes.byref(sets)))


def _has_capability(number: int) -> bool:
    return bool(_capabilities("CapEff") >> number & 1)


def _capabilities(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind + ":")).split()[1], 16)
