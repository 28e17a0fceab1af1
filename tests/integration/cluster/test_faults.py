"""Two replicas under load: whatever ends, stops or restarts one of them fails no signature. Every signature is verified."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import pytest
from keyreeve_client.agent.balancer import State
from keyreeve_client.agent.key_cluster import KeyCluster
from keyreeve_testing.cluster import Cluster, load_on, stopped
from keyreeve_testing.keyserver import KeyServerRig

CALLERS = 16
SOME = 150


async def until_ready(client: KeyCluster, index: int) -> None:
    async with asyncio.timeout(60):
        while client.balancer.replicas[index].state is not State.READY:
            await asyncio.sleep(0.02)


async def settle(cluster: Cluster, client: KeyCluster) -> None:
    """Both replicas know the key and serve it."""
    await asyncio.to_thread(cluster.wait_known, cluster.keys["p256"][0])
    await cluster.sign(client, "p256")


def kill_signer(rig: KeyServerRig) -> None:
    os.kill(rig.pids()[0], signal.SIGKILL)


def kill_front_end(rig: KeyServerRig) -> None:
    os.kill(rig.pids()[1], signal.SIGKILL)


@pytest.mark.parametrize("kill", [kill_signer, kill_front_end])
async def test_a_process_killed_under_load_fails_no_signature(
    cluster: Cluster, kill: Callable[[KeyServerRig], None]
) -> None:
    rig = cluster.rigs[0]
    async with cluster.client() as client:
        await settle(cluster, client)
        async with load_on(cluster, client, "p256", callers=CALLERS) as load:
            await load.progress(SOME)
            mark = len(rig.process.events)
            kill(rig)
            await asyncio.to_thread(rig.process.wait_event, "ready", after=mark)
            await load.progress(SOME)
            await until_ready(client, 0)
    assert load.failures == {}
    assert client.balancer.replicas[0].faults > 0  # the kill met requests


async def test_a_killed_replica_fails_no_signature_and_is_taken_back(cluster: Cluster) -> None:
    rig = cluster.rigs[1]
    async with cluster.client() as client:
        await settle(cluster, client)
        async with load_on(cluster, client, "p256", callers=CALLERS) as load:
            await load.progress(SOME)
            await asyncio.to_thread(rig.process.kill_group)
            await load.progress(SOME)
            assert client.balancer.replicas[1].state is State.EJECTED
            await asyncio.to_thread(rig.process.start_ready)
            await until_ready(client, 1)
            answered = client.balancer.replicas[1].answers
            await load.progress(SOME)
            assert client.balancer.replicas[1].answers > answered
    assert load.failures == {}


async def test_rolling_restarts_fail_no_signature(cluster: Cluster) -> None:
    async with cluster.client() as client:
        await settle(cluster, client)
        async with load_on(cluster, client, "p256", callers=CALLERS) as load:
            await load.progress(SOME)
            marks = [len(rig.process.events) for rig in cluster.rigs]
            for index in (0, 1, 0):
                rig = cluster.rigs[index]
                assert await asyncio.to_thread(rig.process.terminate) == 0
                await load.progress(SOME // 3)
                await asyncio.to_thread(rig.process.start_ready)
                await until_ready(client, index)
                await load.progress(SOME // 3)
    assert load.failures == {}
    for rig, mark, times in zip(cluster.rigs, marks, (2, 1), strict=True):
        events = [entry["event"] for entry in rig.process.events[mark:] if "event" in entry]
        assert events.count("draining") == times
        assert "killed" not in events  # each drained in time


async def test_a_stopped_replica_fails_no_signature(cluster: Cluster) -> None:
    """SIGSTOP: nothing is refused and nothing is closed, there is only silence."""
    async with cluster.client() as client:
        await settle(cluster, client)
        async with load_on(cluster, client, "p256", callers=CALLERS) as load:
            await load.progress(SOME)
            with stopped(cluster.rigs[0]):
                async with asyncio.timeout(30):
                    while client.balancer.replicas[0].state is not State.EJECTED:
                        await asyncio.sleep(0.02)
                await load.progress(SOME)
                await asyncio.sleep(2)  # the length of the fault, not a wait for something
            await until_ready(client, 0)
            await load.progress(SOME)
    assert load.failures == {}


async def test_a_killed_signer_of_the_only_replica_left_is_waited_out(cluster: Cluster) -> None:
    """Both at once: one is gone, the other's signer is killed. Requests wait for the restart within their deadline."""
    async with cluster.client() as client:
        await settle(cluster, client)
        async with load_on(cluster, client, "p256", callers=4, deadline_ms=30_000) as load:
            await load.progress(20)
            await asyncio.to_thread(cluster.rigs[1].process.kill_group)
            await load.progress(20)
            mark = len(cluster.rigs[0].process.events)
            kill_signer(cluster.rigs[0])
            await asyncio.to_thread(cluster.rigs[0].process.wait_event, "ready", after=mark)
            await load.progress(20)
    assert load.failures == {}
    await asyncio.to_thread(cluster.rigs[1].process.start_ready)
