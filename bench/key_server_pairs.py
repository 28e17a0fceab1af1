"""One pair of front end and signer beside several on one port: `python bench/key_server_pairs.py [--pairs 2] [--rounds 4] [--seconds 2]`.

Two key servers stand side by side and sign in turn for the same callers: processes with several mTLS connections each, which keep batches under
way on a stream. `per_s` is by the wall clock, where callers share the processors with the key server; `cores` says how many the key server's own
processes used, `cpu_us` what a signature cost them. JSON goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Semaphore, Thread
from typing import Any

import grpc
from keyreeve_common.v1 import keyserver_pb2
from keyreeve_testing.keyserver import KeyServerRig, Stubs, sign_item
from keyreeve_testing.pki import tls_name
from keyreeve_testing.processes import descendants_of
from pkcs11_pool import Tally, cpu_seconds

BATCH, BATCHES, CONNECTIONS = 32, 4, 4


def stream(stubs: Stubs, key_id: str, seconds: float, counts: list[int]) -> None:
    """Keeps `BATCHES` batches under way for so long, and appends how many signatures came."""
    # Ids are not to be used twice at a time.
    made = [
        keyserver_pb2.SignBatch(items=[sign_item(first + number, key_id) for number in range(BATCH)])
        for first in range(0, 4 * BATCHES * BATCH, BATCH)
    ]
    room, end, signed = Semaphore(BATCHES), time.monotonic() + seconds, 0

    def batches() -> Iterator[keyserver_pb2.SignBatch]:
        for batch in cycle(made):
            room.acquire()
            if time.monotonic() >= end:
                return
            yield batch

    left = 0
    for answer in stubs.signing.SignStream(batches()):
        signed += sum(bool(result.signature) for result in answer.results)
        left += len(answer.results)
        while left >= BATCH:
            left -= BATCH
            room.release()
    counts.append(signed)


def caller(
    address: str, server_name: str, credentials: tuple[bytes, bytes, bytes], key_id: str, link: Connection
) -> None:
    """For each number of seconds that comes, signs as long over all its connections and tells how often. Ends with its link."""
    with ExitStack() as stack:
        all_stubs = []
        for number in range(CONNECTIONS):
            options = [("grpc.ssl_target_name_override", server_name), ("grpc.channel_id", number)]
            channel = grpc.secure_channel(
                address, grpc.ssl_channel_credentials(*credentials), [*options, ("grpc.use_local_subchannel_pool", 1)]
            )
            all_stubs.append(Stubs(stack.enter_context(channel)))
            all_stubs[-1].sign(key_id)
        link.send(0)
        while seconds := link.recv():
            counts: list[int] = []
            threads = [Thread(target=stream, args=(stubs, key_id, seconds, counts)) for stubs in all_stubs]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            link.send(sum(counts))


class Side:
    """A key server with so many pairs, and its callers."""

    def __init__(self, stack: ExitStack, directory: Path, *, pairs: int, callers: int) -> None:
        self.rig = KeyServerRig(directory, extra=f"[supervisor]\npairs = {pairs}\n" if pairs > 1 else "")
        text = self.rig.signer_toml.read_text()
        self.rig.signer_toml.write_text(text.replace("[audit]", '[audit]\nfsync = "off"'))
        stack.enter_context(self.rig.running())
        if pairs > 1:
            self.rig.process.wait_event("ready", lambda entry: entry["pair"] == pairs)
        svid = self.rig.pki.svid("keyreeve/agent/bench")
        key_id = self.rig.create_key().key_id
        self.rig.grant(key_id, svid.spiffe_id)
        time.sleep(1)  # until the grant is known to all pairs: twice the poll interval would do
        context = multiprocessing.get_context("spawn")
        self.links = []
        for _ in range(callers):
            ours, theirs = context.Pipe()
            credentials = (self.rig.pki.bundle_pem, svid.key_pem, svid.chain_pem)
            opens = (f"127.0.0.1:{self.rig.port}", tls_name(self.rig.spiffe_id), credentials, key_id, theirs)
            process = context.Process(target=caller, args=opens, daemon=True)
            process.start()
            ours.recv()
            self.links.append(ours)
            stack.callback(process.join)
            stack.callback(ours.send, 0)
        self.tally = Tally()

    def run(self, seconds: float, *, counted: bool = True) -> None:
        pids = [self.rig.process.pid, *descendants_of(self.rig.process.pid)]
        cpu, wall = cpu_seconds(pids), time.monotonic()
        for link in self.links:
            link.send(seconds)
        signed = sum(link.recv() for link in self.links)
        if counted:
            self.tally.add(signed, time.monotonic() - wall, cpu_seconds(pids) - cpu)

    def figures(self) -> dict[str, float]:
        return {**self.tally.figures(), "cores": round(self.tally.cpu_s / self.tally.wall_s, 2)}


def measure(*, pairs: int = 2, callers: int = 2, rounds: int = 4, seconds: float = 2.0) -> dict[str, Any]:
    """Figures of one pair and of `pairs`, and the ratio of their throughputs."""
    with tempfile.TemporaryDirectory(prefix="keyreeve-bench-") as name, ExitStack() as stack:
        sides = {
            "one": Side(stack, Path(name) / "one", pairs=1, callers=callers),
            "several": Side(stack, Path(name) / "several", pairs=pairs, callers=callers),
        }
        for side in sides.values():
            side.run(min(seconds, 0.5), counted=False)
        for _ in range(rounds):
            for side in sides.values():
                side.run(seconds)
        figures = {which: side.figures() for which, side in sides.items()}
    ratio = round(figures["several"]["per_s"] / figures["one"]["per_s"], 3)
    return {"pairs": pairs, "callers": callers, **figures, "ratios": {"throughput": ratio}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--callers", type=int, default=2, help="processes")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    found = measure(
        pairs=arguments.pairs, callers=arguments.callers, rounds=arguments.rounds, seconds=arguments.seconds
    )
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
