"""Metrics: the one table of their names, and the plain numbers that a process counts them in. Pure; prometheus_export shows them.

Labels are few and bounded: no key id, no SPIFFE ID, nothing that a caller chooses. A `MetricSet` belongs to one process; the signer, which has
no network, hands a snapshot of its own to the front end as JSON.
Spec: Prometheus data model and naming (base units, `_total` for counters); docs/metrics.md lists every name.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from keyreeve_common.errors import MalformedFrame

Labels = tuple[str, ...]
SECONDS_BUCKETS: Final = (
    0.0002,
    0.0005,
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
)


class MetricKind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """`labels` in the order in which values give them. A counter's name ends in `_total`, a time's in `_seconds`."""

    name: str
    kind: MetricKind
    help: str
    labels: Labels = ()


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, MetricKind.COUNTER, text, labels)


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, MetricKind.GAUGE, text, labels)


def _seconds(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, MetricKind.HISTOGRAM, text, labels)


_ALL = (
    # front end
    _counter("keyreeve_keyserver_requests_total", "requests for a signature, by how they ended", "purpose", "code"),
    _seconds(
        "keyreeve_keyserver_request_seconds", "from arrival at the front end to the result, signed ones", "scheme"
    ),
    _counter("keyreeve_keyserver_batches_total", "batches handed to the signer"),
    _gauge("keyreeve_keyserver_requests_in_flight", "requests that wait for the signer now"),
    _gauge("keyreeve_keyserver_queue_requests", "requests taken on, by class of keys (key type/backend)", "queue"),
    _gauge("keyreeve_keyserver_quarantined_holders", "holders in quarantine now"),
    _gauge("keyreeve_keyserver_streams", "open streams of agents"),
    _gauge("keyreeve_keyserver_signer_connected", "1 while a signer serves"),
    _gauge("keyreeve_keyserver_catalog_staleness_seconds", "since the catalog was last read"),
    _gauge("keyreeve_keyserver_svid_expiry_timestamp_seconds", "when the front end's own SVID ends, Unix time"),
    _gauge("keyreeve_keyserver_canary_up", "1 while the last canary signature of this backend was good", "backend"),
    _seconds("keyreeve_keyserver_canary_seconds", "one canary signature, through the whole key server", "backend"),
    # signer, shown by the front end
    _counter("keyreeve_signer_signatures_total", "signatures released, by backend and scheme", "backend", "scheme"),
    _counter("keyreeve_signer_refusals_total", "requests that the signer refused, by error", "code"),
    _seconds("keyreeve_signer_backend_seconds", "one lane of a batch at its backend, waiting included", "backend"),
    _gauge("keyreeve_signer_keys_loaded", "keys loaded now"),
    _gauge("keyreeve_signer_backend_up", "1 while the backend serves", "backend"),
    _gauge("keyreeve_signer_backend_workers", "workers that can sign now", "backend"),
    _gauge("keyreeve_signer_backend_waiting", "requests that wait for a worker", "backend"),
    _gauge(
        "keyreeve_signer_engine_fallback", "1 while software keys are not signed with the fastest engine", "backend"
    ),
    _counter(
        "keyreeve_signer_engine_requests_total", "requests given to an engine of software keys", "backend", "engine"
    ),
    _gauge("keyreeve_signer_audit_up", "1 while the audit log takes records; absent where none is configured"),
    _counter("keyreeve_signer_audit_records_total", "records in the audit log"),
    _gauge("keyreeve_signer_audit_unpublished_records", "records that no signed checkpoint covers yet"),
    _gauge("keyreeve_signer_protections_off", "protections of the signer that this host does not give"),
    # agent
    _counter("keyreeve_agent_requests_total", "requests of local processes, by how they ended", "code"),
    _seconds("keyreeve_agent_request_seconds", "from a frame's arrival to its answer, signed ones"),
    _gauge("keyreeve_agent_connections", "connections of local processes"),
    _gauge("keyreeve_agent_requests_in_flight", "requests of local processes that wait now"),
    _gauge("keyreeve_agent_svids", "identities that this agent may serve"),
    _gauge("keyreeve_agent_svid_expiry_timestamp_seconds", "when the agent's own SVID ends, Unix time"),
    _gauge("keyreeve_agent_key_servers_available", "key servers that answered last"),
    _counter("keyreeve_agent_batches_total", "batches sent to key servers"),
    _counter("keyreeve_agent_batched_requests_total", "requests in those batches, second ones and repeats among them"),
    _counter("keyreeve_agent_hedges_total", "second requests sent because the first took longer than usual"),
    _counter("keyreeve_agent_ejections_total", "times that a key server was taken out of use"),
    _gauge("keyreeve_agent_ca_connected", "1 while the CA's stream of assignments is open"),
    # CA
    _counter("keyreeve_ca_rpcs_total", "calls, by method and how they ended", "method", "code"),
    _seconds("keyreeve_ca_rpc_seconds", "unary calls", "method"),
    _gauge("keyreeve_ca_agents_connected", "agents with an open stream of assignments"),
    _gauge("keyreeve_ca_authority_expiry_timestamp_seconds", "when the active issuing authority ends, Unix time"),
)
METRICS: Final[Mapping[str, Metric]] = {metric.name: metric for metric in _ALL}


@dataclass(slots=True)
class Distribution:
    """A histogram's numbers: one count for each bucket of SECONDS_BUCKETS and one above them, not cumulative."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS_BUCKETS) + 1))
    total: float = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        self.counts[bisect_left(SECONDS_BUCKETS, seconds)] += times
        self.total += seconds * times


@dataclass(frozen=True, slots=True)
class Sample:
    """One metric with one set of label values, at one moment."""

    name: str
    labels: Labels
    value: float | Distribution


class MetricSet:
    """The numbers of one process. Its methods are called on the event loop; `snapshot` from any thread."""

    def __init__(self) -> None:
        self._counters: dict[tuple[str, Labels], float] = {}
        self._distributions: dict[tuple[str, Labels], Distribution] = {}
        self._gauges: dict[str, Callable[[], Iterable[tuple[Labels, float]]]] = {}

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        key = (name, labels)
        self._counters[key] = self._counters.get(key, 0) + by

    def observe(self, name: str, *labels: str, seconds: float, times: int = 1) -> None:
        key = (name, labels)
        found = self._distributions.get(key)
        if found is None:
            found = self._distributions[key] = Distribution()
        found.add(seconds, times)

    def gauge(self, name: str, read: Callable[[], float | None]) -> None:
        """A gauge without labels, read at each look; None: there is nothing to show now."""

        def one() -> Iterable[tuple[Labels, float]]:
            value = read()
            return () if value is None else (((), value),)

        self._gauges[name] = one

    def gauges(self, name: str, read: Callable[[], Iterable[tuple[Labels, float]]]) -> None:
        """A gauge with labels: all its values, read at each look. Also for a counter that is kept elsewhere."""
        self._gauges[name] = read

    def snapshot(self) -> list[Sample]:
        samples = [Sample(name, labels, value) for (name, labels), value in list(self._counters.items())]
        samples += [
            Sample(name, labels, Distribution(list(found.counts), found.total))
            for (name, labels), found in list(self._distributions.items())
        ]
        for name, read in list(self._gauges.items()):
            samples += [Sample(name, labels, value) for labels, value in read()]
        return samples


def samples_to_json(samples: Iterable[Sample]) -> list[list[Any]]:
    """`[name, [label, ...], number]`; a histogram's number is `[microseconds in all, count, ...]`. Whole numbers only, as frames want."""
    shown: list[list[Any]] = []
    for sample in samples:
        value = sample.value
        number: Any = [round(value.total * 1e6), *value.counts] if isinstance(value, Distribution) else round(value)
        shown.append([sample.name, list(sample.labels), number])
    return shown


def samples_from_json(value: object) -> list[Sample]:
    """What `samples_to_json` made; names that this program does not know are left out. Raises: MalformedFrame."""
    try:
        return [_sample(*entry) for entry in _list(value) if _list(entry)[0] in METRICS]
    except (TypeError, ValueError, IndexError):
        raise MalformedFrame("metrics are not samples") from None


def _sample(name: str, labels: object, number: object) -> Sample:
    metric = METRICS[name]
    texts = tuple(str(label) for label in _list(labels))
    if len(texts) != len(metric.labels):
        raise ValueError("labels")
    if metric.kind is not MetricKind.HISTOGRAM:
        return Sample(name, texts, float(int(number)))  # type: ignore[call-overload]  # TypeError is caught above
    total, *counts = (int(part) for part in _list(number))
    if len(counts) != len(SECONDS_BUCKETS) + 1:
        raise ValueError("buckets")
    return Sample(name, texts, Distribution(counts, total / 1e6))


def _list(value: object) -> Sequence[Any]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value
