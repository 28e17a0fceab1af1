"""A whole agent process before two key servers: local programs notice nothing of the loss of one, and operators see it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

LONG = timedelta(seconds=20)


def test_the_loss_of_one_key_server_fails_nothing_and_is_seen(world: Any, until: Any) -> None:
    servers = [world.key_server, world.add_key_server()]
    world.ca.push(world.assignment())
    agent = world.start()
    for _ in range(20):
        assert world.sign(deadline=LONG)
    until(lambda: world.status()["signatures"] == 20)
    requests = [server["requests"] for server in world.status()["key_servers"]]
    assert sum(requests) >= 20
    used = requests.index(max(requests))  # one request at a time goes to whichever answered faster
    servers[used].stop()
    for _ in range(20):
        assert world.sign(deadline=LONG)
    lost = f"127.0.0.1:{servers[used].port}"  # on a busy machine the other one may have been slow once, before
    agent.wait_event("key_server_ejected", lambda event: event["address"] == lost)
    until(lambda: world.status()["key_servers"][used]["state"] == "ejected")
    out, serving = world.status()["key_servers"][used], world.status()["key_servers"][1 - used]
    assert (out["available"], serving["available"]) == (False, True), (out, serving)
    assert serving["address"] == f"127.0.0.1:{servers[1 - used].port}"
    assert serving["state"] == "ready"
    assert serving["latency_ms"]["ecdsa_secp256r1_sha256"]["p95"] > 0


def test_a_key_server_that_hangs_fails_nothing_where_there_is_another(world: Any, until: Any) -> None:
    servers = [world.key_server, world.add_key_server()]
    world.ca.push(world.assignment())
    world.start()
    for _ in range(20):
        assert world.sign(deadline=LONG)
    until(lambda: world.status()["signatures"] == 20)
    requests = [server["requests"] for server in world.status()["key_servers"]]
    used = requests.index(max(requests))
    servers[used].hold()
    try:
        for _ in range(20):
            assert world.sign(deadline=LONG)
    finally:
        servers[used].release()
