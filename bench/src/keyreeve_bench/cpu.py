"""Processor time of a process and all its descendants, from /proc.

What a child used counts for its parent once it was waited for (cutime, cstime), so a worker that ends during a measurement is not lost.
Spec: proc_pid_stat(5).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from keyreeve_common.errors import Unavailable

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_AFTER_NAME = 3  # the first field after the name is field 3 of the manual page
_PARENT, _UTIME, _CSTIME, _START = 4, 14, 17, 22


@dataclass(frozen=True, slots=True)
class ProcessTime:
    """`ticks`: own user and system time, and that of children that were waited for. `started` tells a reused pid apart."""

    pid: int
    parent: int
    ticks: int
    started: int


def parse_stat(text: str) -> ProcessTime:
    """One /proc/PID/stat. The name, in parentheses, may hold anything, parentheses too. Raises: ValueError."""
    head, found, tail = text.rpartition(")")
    fields = tail.split()
    if not found or len(fields) <= _START - _AFTER_NAME:
        raise ValueError("not a line of /proc/PID/stat")
    times = fields[_UTIME - _AFTER_NAME : _CSTIME - _AFTER_NAME + 1]
    return ProcessTime(
        pid=int(head.split("(", 1)[0]),
        parent=int(fields[_PARENT - _AFTER_NAME]),
        ticks=sum(int(time) for time in times),
        started=int(fields[_START - _AFTER_NAME]),
    )


def tree_of(root: int, processes: Iterable[ProcessTime]) -> list[ProcessTime]:
    """`root` and its descendants. Raises: Unavailable when root is not among them."""
    by_pid = {process.pid: process for process in processes}
    if root not in by_pid:
        raise Unavailable(f"process {root} of the benchmark is gone")
    children: dict[int, list[int]] = {}
    for process in by_pid.values():
        children.setdefault(process.parent, []).append(process.pid)
    found, pending = [], [root]
    while pending:
        pid = pending.pop()
        found.append(by_pid[pid])
        pending += children.get(pid, [])
    return found


def tree_seconds(root: int) -> float:
    """Processor seconds of `root` and all its descendants so far. Resolution: a clock tick (10 ms). Raises: Unavailable."""
    return sum(process.ticks for process in tree_of(root, _all_processes())) / _TICKS_PER_SECOND


def tree_pids(root: int) -> list[int]:
    """`root` and its descendants. Raises: Unavailable."""
    return [process.pid for process in tree_of(root, _all_processes())]


def _all_processes() -> Iterator[ProcessTime]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError):  # it ended meanwhile
                yield parse_stat(Path(f"/proc/{name}/stat").read_text(errors="replace"))
