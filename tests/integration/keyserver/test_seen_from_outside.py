"""A running key server seen from outside: its metrics, and the canary that says whether signatures are made."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from time import monotonic

import grpc
import pytest
from keyreeve_common.v1 import keyserver_pb2
from keyreeve_testing.keyserver import KeyServerRig
from keyreeve_testing.pki import Svid
from keyreeve_testing.processes import free_port
from keyreeve_testing.softhsm import make_softhsm_token, softhsm_is_installed
from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, frozenset[str]], float]


@dataclass
class Watched:
    rig: KeyServerRig
    agent: Svid
    metrics_port: int

    def scrape(self) -> Samples:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return {
            (sample.name, frozenset(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def health(self) -> keyserver_pb2.HealthResponse:
        with self.rig.local() as local:
            return local.health.Check(keyserver_pb2.HealthRequest(), timeout=20)

    def wait_health(self, good: Callable[[keyserver_pb2.HealthResponse], bool]) -> keyserver_pb2.HealthResponse:
        deadline, pause = monotonic() + 20, Event()
        while not good(found := self.health()):
            assert monotonic() < deadline, found
            pause.wait(0.05)
        return found


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    directory = tmp_path_factory.mktemp("ks")
    token = make_softhsm_token(directory / "softhsm") if softhsm_is_installed() else None
    port = free_port()
    extra = f'[telemetry]\nmetrics_listen = "127.0.0.1:{port}"\n[canary]\ninterval = "100ms"\ntimeout = "20s"\n'
    with KeyServerRig(directory, extra=extra, token=token).running() as rig:
        yield Watched(rig, rig.pki.svid("keyreeve/agent/a"), port)


def test_canary_sings_for_each_backend(watched: Watched) -> None:
    backends = {"software"} | ({"hsm"} if watched.rig.token else set())
    health = watched.wait_health(lambda found: all(backend.canary.good for backend in found.backends))
    assert {backend.name for backend in health.backends} == backends
    assert health.serving
    assert all(backend.canary.took.ToTimedelta().total_seconds() > 0 for backend in health.backends)
    found = watched.scrape()
    for backend in backends:
        assert found[("keyreeve_keyserver_canary_up", frozenset({backend}))] == 1
        assert found[("keyreeve_keyserver_canary_seconds_count", frozenset({backend}))] >= 1


def test_requests_are_counted_once_by_purpose_and_outcome(watched: Watched) -> None:
    key = watched.rig.create_key("counted")
    watched.rig.grant(key.key_id, watched.agent.spiffe_id)
    signed = ("keyreeve_keyserver_requests_total", frozenset({"tls13_client_verify", "ok"}))
    unknown = ("keyreeve_keyserver_requests_total", frozenset({"tls13_server_verify", "key_not_found"}))
    mismatch = ("keyreeve_keyserver_requests_total", frozenset({"tls13_server_verify", "purpose_mismatch"}))
    before = watched.scrape()
    with watched.rig.caller(watched.agent) as caller:
        for key_id, message in (("k-nobody-knows", None), (key.key_id, b"not a handshake")):
            with pytest.raises(grpc.RpcError):
                caller.sign(key_id, **({"message": message} if message else {}))
        for _ in range(3):
            caller.sign(key.key_id)
    after = watched.scrape()
    assert after[unknown] - before.get(unknown, 0) == 1
    assert after[mismatch] - before.get(mismatch, 0) == 1
    assert signed not in after, "nothing was signed for that purpose"
    assert after[("keyreeve_keyserver_request_seconds_count", frozenset({"ecdsa_secp256r1_sha256"}))] >= 3
    assert after[("keyreeve_keyserver_signer_connected", frozenset())] == 1
    assert after[("keyreeve_signer_signatures_total", frozenset({"software", "ecdsa_secp256r1_sha256"}))] >= 3
    assert after[("keyreeve_signer_refusals_total", frozenset({"purpose_mismatch"}))] >= 1
    assert after[("keyreeve_signer_backend_up", frozenset({"software"}))] == 1
    assert after[("keyreeve_signer_keys_loaded", frozenset())] >= 1
    assert after[("keyreeve_signer_audit_up", frozenset())] == 1
    assert (
        after[("keyreeve_signer_audit_records_total", frozenset())]
        > before[("keyreeve_signer_audit_records_total", frozenset())]
    )
    assert after[("keyreeve_signer_protections_off", frozenset())] >= 0
    # A canary may be under way at one look, never at all of them.
    queue = ("keyreeve_keyserver_queue_requests", frozenset({"ec-p256/software"}))
    assert any(watched.scrape()[queue] == 0 for _ in range(100))
    assert after[("keyreeve_keyserver_quarantined_holders", frozenset())] == 0
    assert after[("keyreeve_keyserver_catalog_staleness_seconds", frozenset())] >= 0


def test_canary_that_falls_silent_is_told_by_health_and_metrics(watched: Watched) -> None:
    watched.wait_health(lambda found: all(backend.canary.good for backend in found.backends))
    with watched.rig.local() as local:
        (canary,) = [
            key
            for key in local.keys.ListKeys(keyserver_pb2.ListKeysRequest(label="keyreeve canary"), timeout=20).keys
            if key.backend == "software"
        ]
        local.keys.DisableKey(keyserver_pb2.DisableKeyRequest(key_id=canary.key_id), timeout=20)
        health = watched.wait_health(lambda found: not found.serving)
        assert "canary of software" in health.detail
        assert "keyreeve key enable" in watched.wait_health(lambda found: "key enable" in found.detail).detail
        assert watched.scrape()[("keyreeve_keyserver_canary_up", frozenset({"software"}))] == 0
        local.keys.EnableKey(keyserver_pb2.EnableKeyRequest(key_id=canary.key_id), timeout=20)
    watched.wait_health(lambda found: found.serving)
    watched.rig.process.wait_event("canary_sings_again")


def test_no_label_holds_an_identity_or_a_key(watched: Watched) -> None:
    labels = {label for _, values in watched.scrape() for label in values}
    assert not [label for label in labels if "spiffe" in label or label.startswith("k-")]


def test_metrics_that_cannot_be_served_stop_the_start_by_name(tmp_path: Path, watched: Watched) -> None:
    extra = f'[telemetry]\nmetrics_listen = "127.0.0.1:{watched.metrics_port}"\n'
    rig = KeyServerRig(tmp_path, extra=extra)
    with rig.process as process:
        process.start()
        refused = process.wait_event("front_end_failed")
        assert refused["code"] == "config_invalid"
        assert "metrics_listen" in refused["detail"]
