"""A replica that cannot reach its catalog: it serves from memory for a configured time, then refuses, and says both."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from keyreeve_common.errors import KeyreeveError
from keyreeve_common.grpc_edge import error_from_rpc
from keyreeve_common.v1 import keyserver_pb2
from keyreeve_testing.keyserver import KeyServerRig, Stubs, verify_p256
from keyreeve_testing.postgres import PostgresServer, postgres_is_installed, running_postgres
from keyreeve_testing.replicas import running_replicas

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(not postgres_is_installed(), reason="PostgreSQL is not installed"),
]
AGENT = "keyreeve/agent/a"
LIMIT_S = 4


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with running_postgres() as server:
        yield server


@pytest.mark.parametrize("outage", ["frozen", "killed"])
def test_from_cache_and_then_not_at_all(tmp_path: Path, postgres: PostgresServer, outage: str) -> None:
    catalog = f'max_staleness = "{LIMIT_S}s"'
    with running_replicas(tmp_path, "a", postgres.make_database(), catalog=catalog) as (rig,):
        agent = rig.pki.svid(AGENT)
        key = rig.create_key()
        rig.grant(key.key_id, agent.spiffe_id)
        with rig.caller(agent) as stubs:
            verify_p256(key.spki_der, stubs.sign(key.key_id))
            assert not health(stubs).serving_from_cache
            mark = len(rig.process.events)
            (postgres.freeze if outage == "frozen" else postgres.kill)()
            try:
                check_outage(rig, stubs, key, mark)
            finally:
                (postgres.thaw if outage == "frozen" else postgres.start)()
            rig.process.wait_event("catalog_current_again", after=mark)
            verify_p256(key.spki_der, stubs.sign(key.key_id))
            assert health(stubs).serving
            rig.revoke(key.key_id, agent.spiffe_id)
            assert refusal(stubs, key).code.value == "key_not_found"


def test_restart_while_the_catalog_is_away(tmp_path: Path, postgres: PostgresServer) -> None:
    with running_replicas(tmp_path, "a", postgres.make_database()) as (rig,):
        agent = rig.pki.svid(AGENT)
        key = rig.create_key()
        rig.grant(key.key_id, agent.spiffe_id)
        postgres.stop()
        try:
            mark = len(rig.process.events)
            os.kill(rig.pids()[1], signal.SIGKILL)
            assert rig.process.wait_event("waiting_for_catalog", after=mark)["code"] == "unavailable"
        finally:
            postgres.start()
        rig.process.wait_ready()
        with rig.caller(agent) as stubs:
            verify_p256(key.spki_der, stubs.sign(key.key_id))


def check_outage(rig: KeyServerRig, stubs: Stubs, key: keyserver_pb2.Key, mark: int) -> None:
    begun = rig.process.wait_event("serving_from_cache", after=mark)
    assert begun["max_staleness_s"] == LIMIT_S
    verify_p256(key.spki_der, stubs.sign(key.key_id))
    said = health(stubs)
    assert (said.serving, said.serving_from_cache) == (True, True)
    assert 2 <= said.catalog_staleness_s <= LIMIT_S
    with rig.local() as local:
        assert "serving from cache" in health(local).detail
    ended = rig.process.wait_event("refusing_without_catalog", after=mark)
    assert (ended["level"], ended["max_staleness_s"]) == ("error", LIMIT_S)
    error = refusal(stubs, key)
    assert error.code.value == "unavailable"
    assert f"catalog.max_staleness allows {LIMIT_S} s" in error.detail
    said = health(stubs)
    assert (said.serving, said.serving_from_cache) == (False, False)
    assert said.catalog_staleness_s > LIMIT_S


def refusal(stubs: Stubs, key: keyserver_pb2.Key) -> KeyreeveError:
    with pytest.raises(grpc.RpcError) as caught:
        stubs.sign(key.key_id)
    return error_from_rpc(caught.value)


def health(stubs: Stubs) -> keyserver_pb2.HealthResponse:
    return stubs.health.Check(keyserver_pb2.HealthRequest(), timeout=20)
