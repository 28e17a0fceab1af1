"""Reload commands: status, output and time are bounded, whatever the program does."""

from __future__ import annotations

import os
import select
import time
from datetime import timedelta
from pathlib import Path

import pytest
from keyreeve_client.agent.reload_command import MAX_OUTPUT_BYTES, run_reload

SHELL = "/bin/sh"
SOON = timedelta(seconds=10)


async def test_success_and_failure() -> None:
    good = await run_reload([SHELL, "-c", "echo one; echo two >&2"], SOON)
    assert (good.ok, good.output) == (True, "one two")
    bad = await run_reload([SHELL, "-c", "echo no; exit 3"], SOON)
    assert (bad.ok, bad.exit_status, bad.output) == (False, 3, "no")


async def test_no_shell_reads_the_arguments(tmp_path: Path) -> None:
    result = await run_reload(["/bin/echo", "$(id)", "a;b", "*"], SOON)
    assert result.output == "$(id) a;b *"


async def test_endless_output_is_bounded_and_does_not_block_the_program() -> None:
    result = await run_reload([SHELL, "-c", "head -c 3000000 /dev/zero | tr '\\0' x"], SOON)
    assert result.ok
    assert len(result.output) == MAX_OUTPUT_BYTES


async def test_a_program_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    began = time.monotonic()
    result = await run_reload([SHELL, "-c", f"sleep 60 & echo $! > {pid_file}; wait"], timedelta(milliseconds=500))
    assert (result.ok, result.exit_status) == (False, None)
    assert time.monotonic() - began < 10
    assert _ends(int(pid_file.read_text()))


def _ends(pid: int) -> bool:
    """Whether the process ends soon: SIGKILL was sent, death takes its moment."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], 10)[0])
    finally:
        os.close(pidfd)


async def test_what_stays_in_the_background_is_not_waited_for() -> None:
    began = time.monotonic()
    result = await run_reload([SHELL, "-c", "sleep 30 & echo $!"], SOON)
    assert result.ok
    assert time.monotonic() - began < 10
    os.kill(int(result.output), 9)


async def test_a_missing_program_raises() -> None:
    with pytest.raises(FileNotFoundError):
        await run_reload(["/no/such/program"], SOON)


async def test_it_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        await run_reload(["/bin/true"], SOON)
    assert len(os.listdir("/proc/self/fd")) == before
