"""What an attacker tries against a process from outside, each with the plainest means: the result says what came of it.

Run in a process of its own, as the user given: `python -m keyreeve_testing.attacks PID|PATH` prints what each try gained or was refused with.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from keyreeve_testing.users import command_as

PTRACE_ATTACH, PTRACE_DETACH = 16, 17
_libc = ctypes.CDLL(None, use_errno=True)


def attach(pid: int) -> str:
    _call(_libc.ptrace(PTRACE_ATTACH, pid, None, None))
    os.waitpid(pid, 0)
    _libc.ptrace(PTRACE_DETACH, pid, None, None)
    return "attached"


def read_memory(pid: int) -> str:
    """/proc/PID/mem, where /proc/PID/maps says that there is some."""
    first = re.match(r"([0-9a-f]+)-", Path(f"/proc/{pid}/maps").read_text())
    assert first is not None
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(int(first.group(1), 16))
        return f"read {len(memory.read(64))}"


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read_by_call(pid: int) -> str:
    """process_vm_readv: its permission is checked before its addresses are, so that any address will do."""
    mine = ctypes.create_string_buffer(8)
    local = _Vector(ctypes.addressof(mine), 8)
    remote = _Vector(0x10000, 8)
    result = _libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if result == -1 and ctypes.get_errno() == 14:  # EFAULT: allowed, nothing was there
        return "allowed"
    _call(result)
    return f"read {result}"


def environment(pid: int) -> str:
    return f"read {len(Path(f'/proc/{pid}/environ').read_bytes())}"


def descriptors(pid: int) -> str:
    return ",".join(os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir())


def steal_descriptor(pid: int) -> str:
    pidfd = os.pidfd_open(pid)
    return f"got {_call(_libc.syscall(438, pidfd, 0, 0))}"


def connect(path: str) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect(path)
        return f"answered {len(connection.recv(64))}"


TRIES: dict[str, Callable[[int], str]] = {
    "attach": attach,
    "read_memory": read_memory,
    "read_by_call": read_by_call,
    "environment": environment,
    "descriptors": descriptors,
    "steal_descriptor": steal_descriptor,
}


def _call(result: int) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _result(attempt: Callable[[], str]) -> str:
    try:
        return f"gained: {attempt()}"
    except OSError as error:
        return f"refused: {type(error).__name__}"


def main() -> int:
    target = sys.argv[1]
    if target.startswith("/"):
        results = {"connect": _result(lambda: connect(target))}
    else:
        results = {name: _result(functools.partial(attempt, int(target))) for name, attempt in TRIES.items()}
    sys.stdout.write(json.dumps(results) + "\n")
    return 0


def attack_as(uid: int, target: int | Path) -> dict[str, str]:
    """What each try on this process, or on this socket file, came to for this user."""
    command = command_as(uid, [sys.executable, "-m", "keyreeve_testing.attacks", str(target)])
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    results: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return results


if __name__ == "__main__":
    sys.exit(main())
