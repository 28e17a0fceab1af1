"""Which files a process may still reach, and that it may signal and connect to nothing outside: Linux Landlock by its three system calls.

A ruleset holds what the running kernel knows; what it does not know yet is left out and named by the ABI. The rules bind the calling thread and
what it makes afterwards, so `confine` is called while there is one thread. Spec: landlock(7), linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path

from keyreeve_keyserver.hardening.process import check

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_CREATE_RULESET_VERSION, _RULE_PATH_BENEATH = 1, 1
_SCOPE_ABSTRACT_UNIX_SOCKET, _SCOPE_SIGNAL = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


class Access(IntFlag):
    EXECUTE = 1
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


READ = Access.READ_FILE | Access.READ_DIR
WRITE = (
    READ | Access.WRITE_FILE | Access.TRUNCATE | Access.REFER
    | Access.MAKE_REG | Access.MAKE_DIR | Access.REMOVE_FILE | Access.REMOVE_DIR
)  # fmt: skip
SOCKET = Access.MAKE_SOCK | Access.REMOVE_FILE
DEVICE = Access.READ_FILE | Access.WRITE_FILE | Access.IOCTL_DEV
_OF_A_FILE = Access.EXECUTE | Access.WRITE_FILE | Access.READ_FILE | Access.TRUNCATE | Access.IOCTL_DEV
# ABI: the rights on files that came with it, and the last bit of them.
_FILE_RIGHTS = {1: 1 << 13, 2: 1 << 14, 3: 1 << 15, 5: 1 << 16}
_NET_ABI, _SCOPE_ABI = 4, 6


@dataclass(frozen=True, slots=True)
class Rule:
    """`path` and what lies below it; left out where it does not exist."""

    path: Path
    access: Access


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("access", ctypes.c_uint64), ("parent", ctypes.c_int32))


def abi() -> int:
    """The Landlock ABI of the running kernel. Raises: OSError where it has none, or it is switched off."""
    return _call(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)


def confine(rules: Iterable[Rule], *, tcp: bool, unix_abstract: bool = False) -> int:
    """Leaves this thread the files of `rules`, and TCP only where `tcp`; the ABI that did it. Raises: OSError."""
    version = abi()
    handled = max(bits for since, bits in _FILE_RIGHTS.items() if since <= version) - 1
    net = 3 if version >= _NET_ABI and not tcp else 0
    scoped = 0
    if version >= _SCOPE_ABI:
        scoped = _SCOPE_SIGNAL | (0 if unix_abstract else _SCOPE_ABSTRACT_UNIX_SOCKET)
    ruleset = _Ruleset(handled, net, scoped)
    # An older kernel takes a longer structure where what it does not know is zero.
    descriptor = _call(_CREATE_RULESET, ctypes.byref(ruleset), ctypes.sizeof(ruleset), 0)
    try:
        for rule in rules:
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                _add(descriptor, rule, handled)
        _call(_RESTRICT_SELF, descriptor, 0)
    finally:
        os.close(descriptor)
    return version


def _add(ruleset: int, rule: Rule, handled: int) -> None:
    parent = os.open(rule.path, os.O_PATH | os.O_CLOEXEC)
    try:
        access = int(rule.access) & handled
        if not stat.S_ISDIR(os.fstat(parent).st_mode):
            access &= int(_OF_A_FILE)
        if access:
            attribute = _PathBeneath(access, parent)
            _call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(attribute), 0)
    finally:
        os.close(parent)


def _call(number: int, *arguments: object) -> int:
    passed = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return check(_libc.syscall(ctypes.c_long(number), *passed))
