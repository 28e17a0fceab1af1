"""P-256 traffic beside a flood of RSA-4096 on one key server: `python bench/overload.py [--seconds 10] [--rate 200] [--output json]`.

Open loop: P-256 requests leave at a fixed rate, whether or not earlier ones were answered, and their latency counts from when they were to leave
(no coordinated omission). The flood comes from a process and an agent of its own. Ratios are of one run; nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.synchronize import Event as ProcessEvent
from pathlib import Path
from time import monotonic
from typing import Any

from keyreeve_client.channel import ReloadingChannel, SvidFiles
from keyreeve_client.sign_client import SignStreamClient
from keyreeve_common.errors import KeyreeveError
from keyreeve_common.identity import SpiffeId
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.v1 import types_pb2
from keyreeve_testing.keyserver import MESSAGE, KeyServerRig
from keyreeve_testing.pki import Svid

FLOOD_OUTSTANDING = 256
LIMITS = '[limits]\nqueue_time = "1s"\n'


@dataclass(frozen=True, slots=True)
class Target:
    """What a client process needs to reach the key server as one agent."""

    address: str
    server_id: str
    directory: Path
    key_id: str

    @asynccontextmanager
    async def client(self) -> AsyncIterator[SignStreamClient]:
        files = SvidFiles(self.directory / "key.pem", self.directory / "chain.pem", self.directory / "bundle.pem")
        channel = ReloadingChannel(self.address, files, server_id=SpiffeId.parse(self.server_id))
        client = SignStreamClient(channel.current)
        yield client
        await client.close()
        await channel.close()


async def one_signature(client: SignStreamClient, key_id: str, scheme: SignatureScheme, deadline_s: float) -> str:
    """`ok`, or the error's code."""
    try:
        await client.sign(
            key_id, scheme, Purpose.TLS13_SERVER_VERIFY, message=MESSAGE, deadline=timedelta(seconds=deadline_s)
        )
    except KeyreeveError as error:
        return error.code.value
    return "ok"


async def open_loop(target: Target, *, rate: float, seconds: float) -> dict[str, Any]:
    async with target.client() as client:
        return await _open_loop(client, target, rate=rate, seconds=seconds)


async def _open_loop(client: SignStreamClient, target: Target, *, rate: float, seconds: float) -> dict[str, Any]:
    await one_signature(client, target.key_id, SignatureScheme.ECDSA_SECP256R1_SHA256, 20)
    took: list[float] = []
    codes: Counter[str] = Counter()

    async def request(due: float) -> None:
        code = await one_signature(client, target.key_id, SignatureScheme.ECDSA_SECP256R1_SHA256, 5)
        codes[code] += 1
        took.append(monotonic() - due)

    began = monotonic()
    tasks = []
    for number in range(int(rate * seconds)):
        due = began + number / rate
        await asyncio.sleep(max(due - monotonic(), 0))
        tasks.append(asyncio.create_task(request(due)))
    await asyncio.gather(*tasks)
    took.sort()
    shown = {
        f"p{share:g}_ms": round(took[min(int(len(took) * share / 100), len(took) - 1)] * 1000, 2)
        for share in (50, 99, 99.9)
    }
    return {**shown, "requests": len(took), "codes": dict(codes)}


def flood(target: Target, stop: ProcessEvent, results: multiprocessing.Queue[dict[str, int]]) -> None:
    async def run() -> Counter[str]:
        codes: Counter[str] = Counter()

        async def caller(client: SignStreamClient) -> None:
            while not stop.is_set():
                code = await one_signature(client, target.key_id, SignatureScheme.RSA_PSS_RSAE_SHA256, 2)
                codes[code] += 1
                if code != "ok":
                    await asyncio.sleep(0.25)

        async with target.client() as client:
            await asyncio.gather(*(caller(client) for _ in range(FLOOD_OUTSTANDING)))
        return codes

    results.put(dict(asyncio.run(run())))


def target_of(rig: KeyServerRig, directory: Path, svid: Svid, key_id: str) -> Target:
    directory.mkdir()
    for name, content in (("key", svid.key_pem), ("chain", svid.chain_pem), ("bundle", rig.pki.bundle_pem)):
        (directory / f"{name}.pem").write_bytes(content)
    rig.grant(key_id, svid.spiffe_id)
    return Target(f"127.0.0.1:{rig.port}", rig.spiffe_id, directory, key_id)


def measure(seconds: float, rate: float, *, sync: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="keyreeve-bench-") as name:
        where = Path(name)
        rig = KeyServerRig(where / "ks", extra=LIMITS)
        if not sync:  # the disk's syncs are another matter: without them the processor alone decides
            rig.signer_toml.write_text(rig.signer_toml.read_text().replace("[audit]", '[audit]\nfsync = "off"'))
        with rig.running():
            fast_key = rig.create_key("p256").key_id
            slow_key = rig.create_key("rsa", key_type=types_pb2.KEY_TYPE_RSA_4096).key_id
            fast = target_of(rig, where / "fast", rig.pki.svid("keyreeve/agent/fast"), fast_key)
            slow = target_of(rig, where / "slow", rig.pki.svid("keyreeve/agent/slow"), slow_key)
            alone = asyncio.run(open_loop(fast, rate=rate, seconds=seconds))
            context = multiprocessing.get_context("spawn")
            stop, results = context.Event(), context.Queue()
            flooding = context.Process(target=flood, args=(slow, stop, results))
            flooding.start()
            rig.process.wait_event("load_shed", timeout=60)
            beside = asyncio.run(open_loop(fast, rate=rate, seconds=seconds))
            stop.set()
            flooded = results.get(timeout=60)
            flooding.join()
    ratios = {key.removesuffix("_ms"): round(beside[key] / alone[key], 2) for key in alone if key.endswith("_ms")}
    return {"p256_alone": alone, "p256_beside_flood": beside, "ratios": ratios, "flood": flooded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rate", type=float, default=200, help="P-256 requests per second")
    parser.add_argument("--sync", action="store_true", help="with audit.fsync = always")
    parser.add_argument("--output", choices=("text", "json"), default="text")
    arguments = parser.parse_args()
    found = measure(arguments.seconds, arguments.rate, sync=arguments.sync)
    if arguments.output == "json":
        sys.stdout.write(json.dumps(found) + "\n")
        return
    for name, value in found.items():
        sys.stdout.write(f"{name}: {json.dumps(value)}\n")


if __name__ == "__main__":
    main()
