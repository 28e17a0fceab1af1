"""Metrics: counted numbers come back as samples, cross to another process whole, and are served as Prometheus reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import ConfigInvalid, MalformedFrame
from keyreeve_common.metrics import (
    METRICS,
    SECONDS_BUCKETS,
    Distribution,
    MetricKind,
    MetricSet,
    Sample,
    samples_from_json,
    samples_to_json,
)
from keyreeve_common.telemetry_config import TelemetryConfig

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"
REQUESTS = "keyreeve_keyserver_requests_total"
SECONDS = "keyreeve_keyserver_request_seconds"


def test_every_metric_is_documented_with_its_labels_and_no_other() -> None:
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| `keyreeve_")]
    written = {row[1].strip().strip("`"): row[2].strip().replace("`", "") for row in rows}
    assert written == {name: ", ".join(metric.labels) for name, metric in METRICS.items()}


def test_names_say_their_kind() -> None:
    for name, metric in METRICS.items():
        assert name.endswith("_total") == (metric.kind is MetricKind.COUNTER)
        if metric.kind is MetricKind.HISTOGRAM:
            assert name.endswith("_seconds")


def test_what_was_counted_is_in_the_snapshot() -> None:
    metrics = MetricSet()
    metrics.count(REQUESTS, "digest", "ok")
    metrics.count(REQUESTS, "digest", "ok", by=2)
    metrics.observe(SECONDS, "ed25519", seconds=0.003, times=4)
    metrics.gauge("keyreeve_keyserver_streams", lambda: 7)
    metrics.gauge("keyreeve_keyserver_svid_expiry_timestamp_seconds", lambda: None)
    found = {(sample.name, sample.labels): sample.value for sample in metrics.snapshot()}
    seen = found[(SECONDS, ("ed25519",))]
    assert found[(REQUESTS, ("digest", "ok"))] == 3
    assert found[("keyreeve_keyserver_streams", ())] == 7
    assert isinstance(seen, Distribution)
    assert seen.total == pytest.approx(0.012)
    assert seen.counts[SECONDS_BUCKETS.index(0.005)] == 4
    assert not [name for name, _ in found if "svid" in name]


@given(st.floats(0, 100))
def test_a_time_falls_into_the_first_bucket_that_holds_it(seconds: float) -> None:
    distribution = Distribution()
    distribution.add(seconds)
    at = distribution.counts.index(1)
    assert seconds <= [*SECONDS_BUCKETS, float("inf")][at]
    assert at == 0 or seconds > SECONDS_BUCKETS[at - 1]


def test_samples_cross_as_json() -> None:
    samples = [
        Sample(REQUESTS, ("digest", "ok"), 5.0),
        Sample(SECONDS, ("ed25519",), Distribution([1] * (len(SECONDS_BUCKETS) + 1), 2.5)),
    ]
    assert samples_from_json(samples_to_json(samples)) == samples
    assert samples_from_json([["keyreeve_of_a_later_release", [], 1]]) == []


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        [1],
        [[]],
        [[REQUESTS]],
        [[REQUESTS, ["one"], 1]],
        [[REQUESTS, ["digest", "ok"], "x"]],
        [[REQUESTS, ["digest", "ok"], None]],
        [[SECONDS, ["x"], 5]],
        [[SECONDS, ["x"], [1, 2]]],
        [[REQUESTS, 5, 1]],
    ],
)
def test_what_is_no_samples_is_malformed(value: Any) -> None:
    with pytest.raises(MalformedFrame):
        samples_from_json(value)


@pytest.mark.parametrize(
    "fields",
    [
        {"metrics_listen": "9464"},
        {"metrics_listen": "127.0.0.1:99999"},
        {"otlp_endpoint": "127.0.0.1:4317"},
        {"otlp_endpoint": "http://host:4317/path"},
        {"traces_per_million": -1},
        {"traces_per_million": 1_000_001},
    ],
)
def test_wrong_telemetry_config_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigInvalid):
        TelemetryConfig(**fields)
