"""How the front end's knowledge grows: `python bench/growth.py [--steps 10,1000,100000,1000000] [--holders 10000]`.

For each step a catalog (SQLite) with so many keys, and as many grants spread over the holders, is filled with rows as the key server writes
them; the sealed records are synthetic, since nothing here opens one. A process of its own then reads it as a front end does at its start, and
is asked for random grants and for keys that do not exist. Time is processor time; memory is what the process grew by. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from keyreeve_common.errors import KeyNotFound
from keyreeve_common.purposes import Purpose
from keyreeve_keyserver.catalog.catalog import Catalog
from keyreeve_keyserver.catalog.records import purposes_to_text, time_to_number
from keyreeve_keyserver.catalog.schema import changes, grants, keys
from keyreeve_keyserver.frontend.access import Access, CatalogThreads
from sqlalchemy import URL, create_engine, insert, update

PURPOSES = purposes_to_text(frozenset({Purpose.TLS13_SERVER_VERIFY, Purpose.TLS13_CLIENT_VERIFY}))
ROWS_AT_ONCE = 20_000
ASKED, POLLS = 20_000, 20
SPKI = bytes(91)
RECORD = bytes(420)  # as long as the sealed record of a P-256 key


def holder(number: int) -> str:
    return f"spiffe://example.org/keyreeve/agent/node-{number:06d}"


def key_id(number: int) -> str:
    return f"k-{number:026d}"


def fill(path: Path, count: int, holders: int) -> None:
    """A catalog with `count` keys and grants."""
    url = URL.create("sqlite", database=str(path))
    Catalog.open(url, busy_timeout=timedelta(seconds=60)).close()
    now = time_to_number(datetime.now(UTC))
    engine = create_engine(url)
    with engine.begin() as connection:
        for at in range(0, count, ROWS_AT_ONCE):
            numbers = range(at, min(at + ROWS_AT_ONCE, count))
            connection.execute(insert(keys), [key_row(number, now) for number in numbers])
            connection.execute(insert(grants), [grant_row(number, now, holders) for number in numbers])
        connection.execute(update(changes).values(counter=2 * count + 1))
    engine.dispose()


def key_row(number: int, now: int) -> dict[str, Any]:
    return {
        "key_id": key_id(number),
        "request_id": f"r-{number}",
        "request_digest": "0" * 64,
        "key_type": "ec-p256",
        "role": "handshake",
        "purposes": PURPOSES,
        "backend": "software",
        "label": f"spiffe://example.org/service-{number}",
        "state": "enabled",
        "spki_der": SPKI,
        "sealed_record": RECORD,
        "attributes": "{}",
        "created_at": now,
        "seq": 2 * number + 1,
    }


def grant_row(number: int, now: int, holders: int) -> dict[str, Any]:
    return {
        "key_id": key_id(number),
        "holder": holder(number % holders),
        "purposes": PURPOSES,
        "created_at": now,
        "seq": 2 * number + 2,
    }


def memory_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def read(path: Path, count: int, holders: int) -> dict[str, Any]:
    """What a front end that starts on this catalog takes."""
    catalog = Catalog.open(URL.create("sqlite", database=str(path)), busy_timeout=timedelta(seconds=60))
    threads = CatalogThreads(catalog)
    access = Access(threads, max_staleness=timedelta(hours=1))
    before, began_cpu, began = memory_bytes(), time.process_time(), time.monotonic()
    await access.refresh()
    loaded = {
        "start_seconds": round(time.monotonic() - began, 3),
        "start_cpu_seconds": round(time.process_time() - began_cpu, 3),
        "megabytes": round((memory_bytes() - before) / 1e6, 1),
    }
    now, chosen = datetime.now(UTC), random.Random(1)  # noqa: S311 - what is asked for, no secret
    numbers = [chosen.randrange(count) for _ in range(ASKED)]
    known = cpu_each(lambda number: access.authorize(holder(number % holders), key_id(number), 1, now), numbers)

    def stranger(number: int) -> None:
        with suppress(KeyNotFound):
            access.authorize(holder(number % holders), f"unknown-{number}", 1, now)

    unknown = cpu_each(stranger, numbers)
    await access.refresh()
    began_cpu = time.process_time()
    for _ in range(POLLS):
        await access.refresh()
    unchanged = (time.process_time() - began_cpu) / POLLS
    threads.close()
    return {**loaded, "authorize_us": known, "unknown_us": unknown, "poll_without_change_us": round(unchanged * 1e6)}


def cpu_each(ask: Any, numbers: list[int]) -> float:
    began = time.process_time()
    for number in numbers:
        ask(number)
    return round((time.process_time() - began) / len(numbers) * 1e6, 2)


def measure(steps: list[int], holders: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="keyreeve-growth-") as name:
        for count in steps:
            path = Path(name) / f"{count}.sqlite"
            fill(path, count, min(holders, count))
            command = [sys.executable, __file__, "--child", str(path), str(count), str(min(holders, count))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            size = sum(part.stat().st_size for part in Path(name).glob(f"{count}.sqlite*"))
            rows.append(
                {"keys": count, "grants": count, "catalog_megabytes": round(size / 1e6, 1), **json.loads(done.stdout)}
            )
            for part in Path(name).glob(f"{count}.sqlite*"):
                os.unlink(part)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", default="10,1000,100000,1000000")
    parser.add_argument("--holders", type=int, default=10_000)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        path, count, holders = arguments.child
        sys.stdout.write(json.dumps(asyncio.run(read(Path(path), int(count), int(holders)))) + "\n")
        return
    steps = [int(step) for step in arguments.steps.split(",")]
    sys.stdout.write(json.dumps(measure(steps, arguments.holders), indent=2) + "\n")


if __name__ == "__main__":
    main()
