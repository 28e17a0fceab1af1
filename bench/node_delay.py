"""HAProxy with `ssl-mode-async` on one thread before a signer that is delayed: `python bench/node_delay.py [--delay-ms 50] [--at-once 256]`.

The rate of full handshakes with and without the delay, at the same concurrency; rounds of both are interleaved. With one handshake after
another a delay of 50 ms would leave 20 a second. Needs what node_handshakes.py needs. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from node_handshakes import CLIENTS, answering_agent, one_round, proxy, write_key


def measure(
    *, delay_ms: int = 50, at_once: int = 256, handshakes: int = 3000, rounds: int = 3, key_type: str = "ec-p256"
) -> dict[str, Any]:
    """Handshakes per second (median of the rounds) and their ratio. `at_once` is of all clients together."""
    rates: dict[str, list[float]] = {"immediate": [], "delayed": []}
    with tempfile.TemporaryDirectory(prefix="keyreeve-bench-") as name, ExitStack() as stack:
        running = {}
        for kind, delay in (("immediate", 0), ("delayed", delay_ms)):
            directory = Path(name) / kind
            directory.mkdir(mode=0o755)
            files = write_key(directory, key_type, directory / "s")
            stack.enter_context(answering_agent(directory / "s", {f"k-{key_type}": files.local}, delay_ms=delay))
            running[kind] = stack.enter_context(proxy("haproxy", directory, files, files.remote))
            one_round(running[kind], 200, clients=CLIENTS, at_once=at_once // CLIENTS)
        for _ in range(rounds):
            for kind, each in running.items():
                taken = one_round(each, handshakes // rounds, clients=CLIENTS, at_once=at_once // CLIENTS)
                rates[kind].append(taken.per_second)
    found = {kind: round(median(each)) for kind, each in rates.items()}
    return {
        "delay_ms": delay_ms,
        "at_once": at_once,
        "handshakes_per_second": found,
        "ratio": round(found["delayed"] / found["immediate"], 3),
        "most_that_the_delay_allows": round(at_once / (delay_ms / 1000)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delay-ms", type=int, default=50)
    parser.add_argument("--at-once", type=int, default=256)
    parser.add_argument("--handshakes", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", choices=("json",), default="json")
    arguments = parser.parse_args()
    result = measure(
        delay_ms=arguments.delay_ms,
        at_once=arguments.at_once,
        handshakes=arguments.handshakes,
        rounds=arguments.rounds,
    )
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
