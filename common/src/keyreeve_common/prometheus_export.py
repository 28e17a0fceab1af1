"""Serves a process's metrics over HTTP in Prometheus's text format. Needs the extra `telemetry`; nothing else imports prometheus_client.

It answers GET with numbers and nothing else, in threads of its own; bind it to loopback or to a network of the monitoring's. Always true:
at most MAX_CONNECTIONS are served at once and the next is closed, and one that is silent for SILENCE_S is closed too, so that who reaches
the port costs this process a few threads, and other scrapes, at most.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from socket import AI_PASSIVE, SOCK_STREAM, getaddrinfo
from socketserver import ThreadingMixIn
from threading import BoundedSemaphore, Thread
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from keyreeve_common.errors import ConfigInvalid
from keyreeve_common.metrics import METRICS, SECONDS_BUCKETS, Distribution, Metric, MetricKind, Sample
from keyreeve_common.telemetry import log, log_exception

if TYPE_CHECKING:
    from prometheus_client.core import Metric as PrometheusMetric

MAX_CONNECTIONS = 16
SILENCE_S = 5
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
            from prometheus_client import CollectorRegistry, make_wsgi_app  # noqa: PLC0415 - an extra
        except ImportError:
            raise ConfigInvalid(
                "telemetry.metrics_listen: prometheus_client is not installed; install this package with its extra `telemetry`"
            ) from None
        registry = CollectorRegistry()
        registry.register(_Collector(self._sources))
        host, _, port = address.rpartition(":")
        try:
            server = _Server((host.strip("[]"), int(port)))
        except OSError as error:
            raise ConfigInvalid(f"telemetry.metrics_listen: {address} cannot be bound: {error.strerror}") from None
        server.set_app(make_wsgi_app(registry))
        thread = Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()
        self._running = server, thread
        bound = int(server.server_port)
        log("metrics_listening", address=f"{host}:{bound}")
        return bound

    def close(self) -> None:
        if self._running is not None:
            server, thread = self._running
            server.shutdown()
            server.server_close()
            thread.join()
            self._running = None


class _Handler(WSGIRequestHandler):
    timeout = SILENCE_S  # of each read and write

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not logged."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int]) -> None:
        self._room = BoundedSemaphore(MAX_CONNECTIONS)
        self.address_family = getaddrinfo(*address, type=SOCK_STREAM, flags=AI_PASSIVE)[0][0]
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that was silent or went away; a source that fails is logged where it is asked."""


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
