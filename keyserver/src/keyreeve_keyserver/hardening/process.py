"""Protections of one process by prctl, rlimit and mlockall: no core, no tracer, no way back to privileges, memory that is not swapped.

Each function either holds when it returns, or raises OSError with the reason. Spec: prctl(2), mlockall(2).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal

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
