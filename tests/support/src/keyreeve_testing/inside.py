"""Code that runs inside a process of the key host, as an attacker's would: it puts on the real protections, then tries what they forbid.

`python -m keyreeve_testing.inside signer|worker|nothing JSON` prints one JSON object: each act, and "done" or the name of the error. JSON has
`write` (a directory that is allowed), and `secret` (a file that is not), and for a worker `reads`, `writes` and `network`, and
`anywhere` where its files are not confined.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keyreeve_keyserver.hardening.lockdown import (
    Protections,
    Reach,
    confine_signer_calls,
    confine_signer_files,
    confine_worker,
    protect_self,
)
from keyreeve_keyserver.hardening.process import prctl

_libc = ctypes.CDLL(None, use_errno=True)
_F_SETOWN = 8
_NUMBERS = {
    "keyctl": 250,
    "bpf": 321,
    "userfaultfd": 323,
    "io_uring_setup": 425,
    "clone3": 435,
    "memfd_create": 319,
    "unshare": 272,
}


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)


def _numbered(name: str) -> None:
    if _libc.syscall(_NUMBERS[name], 0, 0, 0, 0, 0) == -1:
        raise OSError(ctypes.get_errno(), name)


def _close(*sockets: socket.socket) -> None:
    for each in sockets:
        each.close()


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _thread() -> None:
    seen: list[int] = []
    thread = threading.Thread(target=seen.append, args=(1,))
    thread.start()
    thread.join()
    assert seen


def _acts(paths: dict[str, Any]) -> dict[str, Callable[[], object]]:
    secret, write = Path(paths["secret"]), Path(paths["write"])
    parent = os.getppid()
    return {
        "socket: TCP": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).close(),
        "socket: UDP": lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close(),
        "socket: Unix": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).close(),
        "socket: netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
        "socket: packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
        "socketpair": lambda: _close(*socket.socketpair()),
        "exec": lambda: subprocess.run(["/bin/true"], check=True),
        "fork": _fork,
        "ptrace the parent": lambda: _call("ptrace", 16, parent, None, None),
        "read the parent's memory": lambda: open(f"/proc/{parent}/mem", "rb").close(),
        "process_vm_readv": lambda: _call("process_vm_readv", parent, None, 0, None, 0, 0),
        "signal the parent": lambda: os.kill(parent, signal.SIGCONT),
        "mount": lambda: _call("mount", b"none", b"/mnt", b"no such file system", 0, None),
        "chroot": lambda: os.chroot("/"),
        "setuid": lambda: os.setuid(os.getuid()),
        "chown": lambda: os.chown(write, os.getuid(), -1),
        "open to traces again": lambda: prctl(4, 1),
        "raise the core limit": lambda: resource.setrlimit(resource.RLIMIT_CORE, (1, 1)),
        "writable code": lambda: mmap.mmap(-1, 4096, prot=7).close(),
        **{name: functools.partial(_numbered, name) for name in _NUMBERS},
        "read the secret": secret.read_bytes,
        "open the secret to others": lambda: secret.chmod(0o604),
        "truncate the secret": lambda: os.truncate(secret, 0),
        "signal the parent by a descriptor": lambda: fcntl.fcntl(0, _F_SETOWN, parent),
        "read a user's file": lambda: Path("/etc/shadow").read_bytes(),
        "list the root": lambda: os.listdir("/"),
        "write elsewhere": lambda: (secret.parent / "new").write_text(""),
        "link the secret to where it may read": lambda: os.link(secret, write / "link"),
        "write where it may": lambda: (write / "new").write_text("x"),
        "thread": _thread,
    }  # fmt: skip


def main() -> int:
    kind, paths = sys.argv[1], json.loads(sys.argv[2])
    protections = Protections()
    if kind != "nothing":
        protect_self(protections)
    if kind == "signer":
        confine_signer_files(protections, writes=[Path(paths["write"])], sockets=[])
        confine_signer_calls(protections)
    elif kind == "worker":
        reads = tuple(Path(each) for each in paths["reads"])
        writes = (Path(paths["write"]), *(Path(each) for each in paths["writes"]))
        reach = Reach(network=paths["network"], reads=None if paths.get("anywhere") else reads, writes=writes)
        confine_worker(protections, reach)
    results: dict[str, str] = {}
    for name, act in _acts(paths).items():
        try:
            act()
        except (OSError, ValueError) as error:
            results[name] = errno.errorcode.get(getattr(error, "errno", None) or 0, type(error).__name__)
        else:
            results[name] = "done"
    sys.stdout.write(json.dumps({"protections": protections.describe(), "acts": results}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
