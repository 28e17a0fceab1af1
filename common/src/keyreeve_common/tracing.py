"""Traces: a request's spans from agent to token, sent to an OTLP receiver. Off unless configured, and then for the sampled requests alone.

A span here is one step with a name, a beginning and an end. Contexts cross processes as the 25 bytes of keyreeve_common.trace. The signer has no
network: it hands its spans to the front end, which sends them (`add`).
Needs the extra `telemetry`; nothing else imports opentelemetry.
Spec: OpenTelemetry specification (trace), OTLP/gRPC; W3C Trace Context.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Protocol

from keyreeve_common.errors import ConfigInvalid
from keyreeve_common.telemetry import log
from keyreeve_common.telemetry_config import TelemetryConfig
from keyreeve_common.trace import is_sampled, make_trace, pack_trace, unpack_trace

Attributes = Mapping[str, str | int | bool]


class Span(Protocol):
    """A step under way. `trace` is the context to hand on."""

    @property
    def trace(self) -> bytes: ...

    def end(self, *, error: str = "") -> None:
        """`error` is an error code; "" for success."""


class Tracing:
    """Tracing that is off: requests get an id and nothing is recorded."""

    records = False

    def root(self, name: str, attributes: Attributes) -> Span:
        """The first span of a request that begins here, if it is drawn for tracing."""
        return _Unsampled(make_trace())

    def child(self, name: str, trace: bytes, attributes: Attributes) -> Span:
        return _Unsampled(trace)

    def add(self, name: str, trace: bytes, *, start_ns: int, end_ns: int, attributes: Attributes) -> None:
        """A span that another process measured. Times are of the Unix clock."""

    def close(self) -> None:
        """Sends what is left."""


class _Unsampled:
    __slots__ = ("trace",)

    def __init__(self, trace: bytes) -> None:
        self.trace = trace

    def end(self, *, error: str = "") -> None:
        return


def open_tracing(config: TelemetryConfig, service: str) -> Tracing:
    """Raises: ConfigInvalid where the extra is not installed."""
    if not config.otlp_endpoint:
        return Tracing()
    try:
        return _OtlpTracing(config, service)
    except ImportError:
        raise ConfigInvalid(
            "telemetry.otlp_endpoint: opentelemetry is not installed; install this package with its extra `telemetry`"
        ) from None


class _OtlpTracing(Tracing):
    records = True

    def __init__(self, config: TelemetryConfig, service: str) -> None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON  # noqa: PLC0415

        self._share = config.traces_per_million / 1_000_000
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=Resource({"service.name": service}))
        exporter = OTLPSpanExporter(
            endpoint=config.otlp_endpoint, insecure=config.otlp_endpoint.startswith("http://"), timeout=5
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("keyreeve")
        log("tracing", endpoint=config.otlp_endpoint, traces_per_million=config.traces_per_million)

    def root(self, name: str, attributes: Attributes) -> Span:
        if random.random() >= self._share:  # noqa: S311 - which requests are traced is no secret
            return _Unsampled(make_trace())
        return _OtlpSpan(self._tracer.start_span(name, attributes=dict(attributes)))

    def child(self, name: str, trace: bytes, attributes: Attributes) -> Span:
        if not is_sampled(trace):
            return _Unsampled(trace)
        return _OtlpSpan(self._tracer.start_span(name, context=_parent(trace), attributes=dict(attributes)))

    def add(self, name: str, trace: bytes, *, start_ns: int, end_ns: int, attributes: Attributes) -> None:
        if is_sampled(trace):
            span = self._tracer.start_span(
                name, context=_parent(trace), attributes=dict(attributes), start_time=start_ns
            )
            span.end(end_time=end_ns)

    def close(self) -> None:
        self._provider.shutdown()


class _OtlpSpan:
    __slots__ = ("_span", "trace")

    def __init__(self, span: Any) -> None:
        self._span = span
        context = span.get_span_context()
        self.trace = pack_trace(context.trace_id, context.span_id)

    def end(self, *, error: str = "") -> None:
        if error:
            from opentelemetry.trace import StatusCode  # noqa: PLC0415 - an extra

            self._span.set_status(StatusCode.ERROR, error)
        self._span.end()


def _parent(trace: bytes) -> Any:
    from opentelemetry.trace import (  # noqa: PLC0415 - an extra
        NonRecordingSpan,
        SpanContext,
        TraceFlags,
        set_span_in_context,
    )

    trace_id, span_id = unpack_trace(trace)
    flags = TraceFlags(TraceFlags.SAMPLED)
    return set_span_in_context(NonRecordingSpan(SpanContext(trace_id, span_id, is_remote=True, trace_flags=flags)))
