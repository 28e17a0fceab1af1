"""The agent on a whole Keyreeve: `python bench/node_agent.py [--seconds 4] [--lone 2000] [--output json]`.

Latency of one request at a time from the sign socket to a signature and back, and under load (256 outstanding) the processor time of each
process for one signature. Key server with policy, purpose checks and audit log, mTLS, a P-256 software key, all on loopback. Processor time
comes from /proc/PID/stat, so other programs on the machine change it less than they change latency. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keyreeve_testing.stack import Stack, StackConfig

LOAD = Path(__file__).with_name("node_load.py")
PATH = "/bench/load"
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, of all its threads, without its children: to the nanosecond where the kernel keeps schedstat.

    Spec: proc_pid_stat(5), fields 14 and 15; Documentation/scheduler/sched-stats.rst, the first number of schedstat.
    """
    try:
        return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9
    except OSError:  # a thread that ended meanwhile, or a kernel without it
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS


@contextmanager
def loaded_stack() -> Iterator[tuple[Stack, str]]:
    """A stack with a P-256 software key that this user may use over the sign socket; the key's id."""
    with (
        tempfile.TemporaryDirectory(prefix="keyreeve-bench-") as directory,
        Stack(StackConfig(Path(directory) / "stack", served=(), client=None)) as stack,
    ):
        stack.create_entry("load", PATH, backend="software", selector=f"unix:uid:{os.geteuid()}")
        yield stack, str(stack.svid_of(PATH)["key_id"])


def run_load(socket: Path, key_id: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(LOAD), "--socket", str(socket), "--key-id", key_id, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def measure(*, seconds: float = 4.0, lone: int = 2000, connections: int = 64, depth: int = 4) -> dict[str, Any]:
    """`cpu_us` is microseconds of processor time for one signature, by process."""
    with loaded_stack() as (stack, key_id):
        run_load(stack.sign_socket, key_id, "--lone", "100")
        alone = run_load(stack.sign_socket, key_id, "--lone", str(lone))
        pids = {role: found for role, found in stack.pids().items() if role in ("agent", "front end", "signer")}
        before = {role: sum(map(cpu_seconds, found)) for role, found in pids.items()}
        options = ("--connections", str(connections), "--depth", str(depth), "--seconds", str(seconds))
        busy = run_load(stack.sign_socket, key_id, *options)
        spent = {role: sum(map(cpu_seconds, found)) - before[role] for role, found in pids.items()}
    signed = busy["requests"] - busy["refused"]
    cpu_us = {role: round(each / max(signed, 1) * 1e6, 1) for role, each in spent.items()}
    return {"lone": alone, "load": {**busy, "outstanding": connections * depth, "cpu_us": cpu_us}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--lone", type=int, default=2000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--output", choices=("json",), default="json")
    arguments = parser.parse_args()
    result = measure(
        seconds=arguments.seconds, lone=arguments.lone, connections=arguments.connections, depth=arguments.depth
    )
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
