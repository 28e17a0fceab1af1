"""Serves a process's metrics over HTTP in Prometheus's text format. Needs the extra `telemetry`; nothing else imports prometheus_client.

It answers GET with numbers and nothing else, in a thread of its own; bind it to loopback or to a network of the monitoring's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from threading import Thread
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIServer

from keyreeve_common.errors import ConfigInvalid
from keyreeve_common.metrics import METRICS, SECONDS_BUCKETS, Distribution, Metric, MetricKind, Sample
from keyreeve_common.telemetry import log, log_exception

if TYPE_CHECKING:
    from prometheus_client.core import Metric as PrometheusMetric

Source = Callable[[], Iterable[Sample]]
_BOUNDS = [*(f"{bound:g}" for bound in SECONDS_BUCKETS), "+Inf"]


class MetricsServer:
    """`start` serves until `close`. A source that fails is logged and left out: a scrape never fails for one of them."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self._sources = tuple(sources)
        self._running: tuple[WSGIServer, Thread] | None = None

    def start(self, address: str) -> int:
        """The port it serves at. `address` is HOST:PORT; port 0 takes any. Raises: ConfigInvalid."""
        try:
            from prometheus_client import CollectorRegistry, start_http_server  # noqa: PLC0415 - an extra
        except ImportError:
            raise ConfigInvalid(
                "telemetry.metrics_listen: prometheus_client is not installed; install this package with its extra `telemetry`"
            ) from None
        registry = CollectorRegistry()
        registry.register(_Collector(self._sources))
        host, _, port = address.rpartition(":")
        try:
            self._running = start_http_server(int(port), host.strip("[]"), registry)
        except OSError as error:
            raise ConfigInvalid(f"telemetry.metrics_listen: {address} cannot be bound: {error.strerror}") from None
        bound = int(self._running[0].server_port)
        log("metrics_listening", address=f"{host}:{bound}")
        return bound

    def close(self) -> None:
        if self._running is not None:
            server, thread = self._running
            server.shutdown()
            server.server_close()
            thread.join()
            self._running = None


class _Collector:
    def __init__(self, sources: tuple[Source, ...]) -> None:
        self._sources = sources

    def describe(self) -> list[Any]:
        return []  # else the registry would collect once to learn the names

    def collect(self) -> Iterator[PrometheusMetric]:
        by_name: dict[str, list[Sample]] = defaultdict(list)
        for source in self._sources:
            try:
                for sample in source():
                    by_name[sample.name].append(sample)
            except Exception:
                log_exception("metrics_source_failed")
        for name, samples in by_name.items():
            yield _family(METRICS[name], samples)


def _family(metric: Metric, samples: list[Sample]) -> PrometheusMetric:
    from prometheus_client.core import (  # noqa: PLC0415 - an extra
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    if metric.kind is MetricKind.HISTOGRAM:
        family: Any = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for sample in samples:
            assert isinstance(sample.value, Distribution)  # noqa: S101 - the kinds of one name agree
            buckets = list(zip(_BOUNDS, accumulate(sample.value.counts), strict=True))
            family.add_metric(sample.labels, buckets, sum_value=sample.value.total)
        return family  # type: ignore[no-any-return]
    kind = CounterMetricFamily if metric.kind is MetricKind.COUNTER else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=metric.labels)
    for sample in samples:
        family.add_metric(sample.labels, sample.value)
    return family  # type: ignore[no-any-return]
