"""X.509-SVIDs a second: `python bench/issuance.py [--count 5000] [--database postgresql] [--output json]`.

The CA's own code runs in this process, the key server (by mutual TLS, with policy, purpose checks and audit) and PostgreSQL in theirs; the
processor time of each is told apart. Every SVID is linted, on record before it is signed, verified, and in the inventory. `per_core` is what one
core would issue if it did nothing else than the part named. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, process_time
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from issuance_rig import TD, IssuanceRig, running_rig
from keyreeve_ca.domain.records import SvidRecord
from keyreeve_ca.issuance_service import issue_x509_svids
from keyreeve_ca.service import SvidOrder
from keyreeve_common.identity import SpiffeId

SHAPES = {  # callers at a time, orders of one caller
    "batch": (2, 256),
    "agents": (16, 10),
    "lone": (1, 1),
}


def orders(rig: IssuanceRig, count: int, prefix: str) -> list[SvidOrder]:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return [
        SvidOrder(rig.ca.policy.workload, SpiffeId(TD, f"/{prefix}/{number}"), key, f"{prefix}{number}")
        for number in range(count)
    ]


def measure_shape(rig: IssuanceRig, shape: str, count: int) -> dict[str, Any]:
    callers, size = SHAPES[shape]
    asked = orders(rig, count, shape)
    parts = [asked[start : start + size] for start in range(0, count, size)]
    issue_x509_svids(rig.ca, orders(rig, 8, f"warm-{shape}"))

    def issue(part: Sequence[SvidOrder]) -> int:
        return sum(isinstance(each, SvidRecord) for each in issue_x509_svids(rig.ca, part))

    rig.statements.reset()
    before = (process_time(), rig.key_server_seconds(), rig.database_seconds(), monotonic())
    with ThreadPoolExecutor(callers) as pool:
        issued = sum(pool.map(issue, parts))
    after = (process_time(), rig.key_server_seconds(), rig.database_seconds(), monotonic())
    ca, key_server, database, wall = (end - start for start, end in zip(before, after, strict=True))
    busy = {"ca": ca, "key_server": key_server, "database": database, "all": ca + key_server + database}
    return {
        "issued": issued,
        "of": count,
        "per_second": round(issued / wall),
        "cpu_us_per_svid": {name: round(seconds / issued * 1e6) for name, seconds in busy.items()},
        "per_core": {name: round(issued / seconds) for name, seconds in busy.items() if seconds},
        "statements_per_svid": round(rig.statements.count / issued, 3),
        "transactions_per_svid": round(rig.statements.transactions / issued, 3),
    }


def measure(count: int = 5000, database: str = "postgresql") -> dict[str, Any]:
    """Figures by shape; a lone caller issues a tenth."""
    with (
        tempfile.TemporaryDirectory(prefix="keyreeve-bench-") as name,
        running_rig(Path(name), database=database) as rig,
    ):
        shapes = {shape: measure_shape(rig, shape, count // 10 if shape == "lone" else count) for shape in SHAPES}
    return {"database": database, "shapes": shapes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--database", choices=("postgresql", "sqlite"), default="postgresql")
    parser.add_argument("--output", choices=("text", "json"), default="text")
    arguments = parser.parse_args()
    figures = measure(arguments.count, arguments.database)
    if arguments.output == "json":
        sys.stdout.write(json.dumps(figures) + "\n")
        return 0
    for shape, found in figures["shapes"].items():
        sys.stdout.write(f"{shape:8} {json.dumps(found)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
