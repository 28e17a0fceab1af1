"""An RSA-4096 flood, and a token that hangs, beside P-256 traffic on the same key server: the flood is shed, P-256 is not harmed.

The figures go to build/results/overload.json as ratios of one run; asserted is only what holds on any machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from time import monotonic

import pytest
from keyreeve_client.agent.key_cluster import KeyCluster
from keyreeve_common.errors import ErrorCode, KeyreeveError
from keyreeve_common.v1 import types_pb2
from keyreeve_testing.cluster import AGENT, Cluster
from keyreeve_testing.keyserver import KeyServerRig
from keyreeve_testing.pki import TestPki
from keyreeve_testing.softhsm import make_softhsm_token, softhsm_is_installed

RESULTS = Path(__file__).parents[3] / "build" / "results" / "overload.json"
RSA_PSS_SHA256 = 0x0804
MEASURE_S = 2.0
P256_CALLERS = 8
FLOOD = 300  # requests outstanding, some seconds of work for one thread
QUEUE_ITEMS = 200
LIMITS = f"[limits]\nqueue_items = {QUEUE_ITEMS}\nqueue_time = '400ms'"


@dataclass
class Measured:
    seconds: list[float] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)

    def at(self, percent: int) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


async def call_on(
    cluster: Cluster, client: KeyCluster, name: str, measured: Measured, *, until: float, deadline_ms: int
) -> None:
    while monotonic() < until:
        began = monotonic()
        try:
            await cluster.sign(client, name, deadline_ms)
            measured.seconds.append(monotonic() - began)
        except KeyreeveError as error:
            measured.codes[error.code.value] += 1
            pause = error.retry_after or timedelta()
            # As a client that keeps to what it was told; the flood shares this process with what is measured, so it is not to spin.
            await asyncio.sleep(max(pause.total_seconds(), 0.5))


async def run_p256(cluster: Cluster, client: KeyCluster) -> Measured:
    measured = Measured()
    until = monotonic() + MEASURE_S
    callers = (call_on(cluster, client, "p256", measured, until=until, deadline_ms=5_000) for _ in range(P256_CALLERS))
    await asyncio.gather(*callers)
    return measured


def as_ratios(alone: Measured, beside: Measured) -> dict[str, float]:
    return {
        "p50": round(beside.at(50) / alone.at(50), 2),
        "p99": round(beside.at(99) / alone.at(99), 2),
        "throughput": round(len(beside.seconds) / len(alone.seconds), 2),
    }


def write_results(name: str, values: dict[str, object]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**known, name: values}, indent=2) + "\n")
    sys.stdout.write(f"{name}: {json.dumps(values)}\n")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One key server on SQLite with small queues and a token; the agent holds a P-256, an RSA-4096 and a token's P-256 key."""
    where, pki = tmp_path_factory.mktemp("one"), TestPki()
    token = make_softhsm_token(where / "token") if softhsm_is_installed() else None
    rig = KeyServerRig(where / "ks", pki, extra=LIMITS, token=token)
    with rig.running():
        cluster = Cluster(where, [rig], pki, pki.svid(AGENT))
        cluster.add_key("p256")
        cluster.add_key("rsa", RSA_PSS_SHA256, key_type=types_pb2.KEY_TYPE_RSA_4096)
        if token is not None:
            cluster.add_key("token", backend="hsm")
        yield cluster


async def test_p256_is_unharmed_by_a_flood_of_rsa_4096(one: Cluster) -> None:
    # Each has an agent of its own, as in life; their processor time is this test's, so throughput here says little of the server's.
    async with one.client() as fast, one.client() as slow:
        await one.sign(fast, "p256")
        await one.sign(slow, "rsa", 20_000)
        alone = await run_p256(one, fast)
        flood, until = Measured(), monotonic() + 3600
        flooding = [
            asyncio.create_task(call_on(one, slow, "rsa", flood, until=until, deadline_ms=2_000)) for _ in range(FLOOD)
        ]
        async with asyncio.timeout(30):
            while not flood.codes["overloaded"]:
                await asyncio.sleep(0.02)
        beside = await run_p256(one, fast)
        for task in flooding:
            task.cancel()
        await asyncio.gather(*flooding, return_exceptions=True)
    write_results(
        "p256_beside_rsa4096_flood",
        {
            **as_ratios(alone, beside),
            "p256_alone_ms": {"p50": round(alone.at(50) * 1000, 1), "p99": round(alone.at(99) * 1000, 1)},
            "flood_outstanding": FLOOD,
            "flood_signed": len(flood.seconds),
            "flood_refused": dict(flood.codes),
        },
    )
    assert beside.seconds
    assert alone.codes == beside.codes == {}
    assert flood.seconds  # the flood is served, within its share
    assert flood.codes["overloaded"] > 0
    assert flood.codes["deadline_exceeded"] <= flood.codes["overloaded"]  # shed early, not timed out
    shed = one.rigs[0].process.events_named("load_shed")
    assert {line["key_class"] for line in shed} == {"rsa-4096/software"}
    assert all(line["outstanding"] <= QUEUE_ITEMS for line in shed)


async def test_one_agent_cannot_take_the_whole_queue(one: Cluster) -> None:
    """Another agent's RSA-4096 request is signed while the first one floods that class."""
    other = Cluster(one.directory / "other", one.rigs, one.pki, one.pki.svid("keyreeve/agent/b"), dict(one.keys))
    other.directory.mkdir()
    one.rigs[0].grant(one.keys["rsa"][0], other.agent.spiffe_id)
    async with one.client() as flooding_client, other.client() as patient:
        flood, until = Measured(), monotonic() + 3600
        tasks = [
            asyncio.create_task(call_on(one, flooding_client, "rsa", flood, until=until, deadline_ms=10_000))
            for _ in range(FLOOD)
        ]
        async with asyncio.timeout(30):
            while not flood.codes["overloaded"]:
                await asyncio.sleep(0.02)
        for _ in range(5):
            await other.sign(patient, "rsa", 20_000)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert set(flood.codes) <= {ErrorCode.OVERLOADED.value, ErrorCode.DEADLINE_EXCEEDED.value}


@contextmanager
def hanging_token(rig: KeyServerRig) -> Iterator[None]:
    """Stops the token's workers, as a network HSM that accepts everything and answers nothing."""
    workers = [int(line["pid"]) for line in rig.process.events_named("worker_open")]
    assert len(workers) == 1
    try:
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in workers:
            with suppress(ProcessLookupError):  # the pool gave it up and began another
                os.kill(pid, signal.SIGCONT)


@pytest.mark.skipif(not softhsm_is_installed(), reason="SoftHSM is not installed: there is no token to stop")
async def test_p256_is_unharmed_by_a_token_that_hangs(one: Cluster) -> None:
    """Both kinds of request come from one agent over one stream: neither it nor the key server lets one wait for the other."""
    async with one.client() as client:
        await one.sign(client, "p256", 20_000)
        await one.sign(client, "token", 20_000)
        alone = await run_p256(one, client)
        stuck, until = Measured(), monotonic() + 3600
        with hanging_token(one.rigs[0]):
            asking = [
                asyncio.create_task(call_on(one, client, "token", stuck, until=until, deadline_ms=1_500))
                for _ in range(P256_CALLERS * 8)
            ]
            async with asyncio.timeout(30):
                while not stuck.codes:
                    await asyncio.sleep(0.02)
            beside = await run_p256(one, client)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        async with asyncio.timeout(60):
            while True:
                try:
                    await one.sign(client, "token", 5_000)
                    break
                except KeyreeveError:
                    await asyncio.sleep(0.1)
    write_results("p256_beside_hanging_token", {**as_ratios(alone, beside), "token_refused": dict(stuck.codes)})
    assert beside.seconds
    assert alone.codes == beside.codes == {}
    assert not stuck.seconds
    assert set(stuck.codes) <= {"deadline_exceeded", "token_unavailable", "overloaded"}
