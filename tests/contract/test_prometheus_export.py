"""A process's metrics served over HTTP, read as Prometheus reads them. Needs prometheus_client, an extra of the members."""

from __future__ import annotations

import socket
import threading
import urllib.request
from typing import Any

import pytest
from keyreeve_common import prometheus_export
from keyreeve_common.errors import ConfigInvalid
from keyreeve_common.metrics import MetricSet
from keyreeve_common.prometheus_export import MetricsServer
from prometheus_client.parser import text_string_to_metric_families

REQUESTS = "keyreeve_keyserver_requests_total"
SECONDS = "keyreeve_keyserver_request_seconds"


@pytest.fixture
def served() -> Any:
    servers: list[MetricsServer] = []

    def serve(*sources: Any) -> str:
        servers.append(MetricsServer(sources))
        port = servers[-1].start("127.0.0.1:0")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    yield serve
    for server in servers:
        server.close()


def test_prometheus_reads_what_was_counted(served: Any) -> None:

    metrics = MetricSet()
    metrics.count(REQUESTS, "digest", "ok", by=3)
    metrics.observe(SECONDS, "ed25519", seconds=0.003)
    text = served(metrics.snapshot)
    samples = {
        (sample.name, frozenset(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples[(REQUESTS, frozenset({"digest", "ok"}))] == 3
    buckets = [samples[(f"{SECONDS}_bucket", frozenset({"ed25519", le}))] for le in ("0.002", "0.005", "+Inf")]
    assert buckets == [0, 1, 1]
    assert samples[(f"{SECONDS}_count", frozenset({"ed25519"}))] == 1


def test_a_source_that_fails_takes_no_other_with_it(served: Any) -> None:
    metrics = MetricSet()
    metrics.count(REQUESTS, "digest", "ok")

    def failing() -> Any:
        raise RuntimeError("gone")

    assert f'{REQUESTS}{{code="ok",purpose="digest"}} 1.0' in served(failing, metrics.snapshot)


def test_an_address_in_use_is_a_config_error(served: Any) -> None:
    first = MetricsServer([])
    port = first.start("127.0.0.1:0")
    with pytest.raises(ConfigInvalid, match="cannot be bound"):
        MetricsServer([]).start(f"127.0.0.1:{port}")
    first.close()


def test_connections_that_say_nothing_cost_few_threads_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus_export._Handler, "timeout", 0.5)
    server = prometheus_export.MetricsServer([])
    port, before = server.start("127.0.0.1:0"), threading.active_count()
    silent = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(60)]
    try:
        refused = [each for each in silent[prometheus_export.MAX_CONNECTIONS :] if each.recv(1) == b""]
        assert len(refused) == 60 - prometheus_export.MAX_CONNECTIONS
        assert threading.active_count() - before <= prometheus_export.MAX_CONNECTIONS
        assert all(each.recv(1) == b"" for each in silent)  # by their silence
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert answer.status == 200
    finally:
        for each in silent:
            each.close()
        server.close()


def test_it_listens_at_ipv6_too() -> None:
    server = MetricsServer([])
    port = server.start("[::1]:0")
    with urllib.request.urlopen(f"http://[::1]:{port}/metrics", timeout=10) as answer:
        assert answer.status == 200
    server.close()
