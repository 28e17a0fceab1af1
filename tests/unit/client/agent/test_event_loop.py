"""The agent's event loop: uvloop where it is there, Python's own where it is not."""

from __future__ import annotations

import ctypes.util
import subprocess
import sys

import pytest
from keyreeve_common import event_loop

# A process to which the kernel refuses io_uring as the agent's systemd unit does: SCMP_ACT_ALLOW, and EPERM for three calls.
WITHOUT_IO_URING = """
import asyncio, ctypes, os, sys
seccomp = ctypes.CDLL(sys.argv[1])
seccomp.seccomp_init.restype = ctypes.c_void_p
rules = ctypes.c_void_p(seccomp.seccomp_init(0x7FFF0000))
for name in (b"io_uring_setup", b"io_uring_enter", b"io_uring_register"):
    assert seccomp.seccomp_rule_add(rules, 0x00050001, seccomp.seccomp_syscall_resolve_name(name), 0) == 0
assert seccomp.seccomp_load(rules) == 0
from keyreeve_common import event_loop

async def look():
    server = await asyncio.start_server(lambda reader, writer: writer.write(b"served"), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    print(event_loop.loop_name(), (await reader.readexactly(6)).decode(), flush=True)
    os._exit(0)

event_loop.run(look())
"""


def name_of_loop() -> str:
    names: list[str] = []

    async def look() -> None:
        names.append(event_loop.loop_name())

    event_loop.run(look())
    return names[0]


def test_uvloop_is_used() -> None:
    pytest.importorskip("uvloop", reason="uvloop is not installed on this platform")
    assert name_of_loop() == "uvloop"


def test_uvloop_serves_where_io_uring_is_refused() -> None:
    pytest.importorskip("uvloop", reason="uvloop is not installed on this platform")
    library = ctypes.util.find_library("seccomp")
    if library is None:
        pytest.skip("needs libseccomp2")
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT_IO_URING, library], capture_output=True, text=True, timeout=60, check=False
    )
    assert (child.stdout, child.stderr) == ("uvloop served\n", "")


def test_without_uvloop_pythons_own_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert name_of_loop() == "asyncio"
