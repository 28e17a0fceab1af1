"""An OTLP/gRPC receiver that keeps the spans it is sent. Spec: OTLP 1.x, opentelemetry.proto.collector.trace.v1."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """Ids in hexadecimal; `parent_id` is "" for a root; `error` is the status message of a failed one."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    error: str
    attributes: dict[str, Any] = field(hash=False)


class OtlpReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    """As a context manager it listens on loopback; `endpoint` is what a service's configuration names."""

    def __init__(self) -> None:
        self._spans: list[ReceivedSpan] = []
        self._arrived = Condition()
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self._port = self._server.add_insecure_port("127.0.0.1:0")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> OtlpReceiver:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None)

    def Export(self, request: Any, context: Any) -> Any:
        with self._arrived:
            self._spans += [
                _received(resource, span)
                for resource in request.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            ]
            self._arrived.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans_of(self, trace_id: str, names: set[str], *, within: float = 30.0) -> dict[str, ReceivedSpan]:
        """The spans of one trace by name, once all these names are there. Raises: AssertionError."""

        def found() -> dict[str, ReceivedSpan]:
            return {span.name: span for span in self._spans if span.trace_id == trace_id}

        with self._arrived:
            complete = self._arrived.wait_for(lambda: names <= found().keys(), within)
            assert complete, f"of {sorted(names)} came {sorted(found())} within {within:g} s"
            return found()

    @property
    def trace_ids(self) -> set[str]:
        with self._arrived:
            return {span.trace_id for span in self._spans}


def _received(resource: Any, span: Any) -> ReceivedSpan:
    service = next((each.value.string_value for each in resource.resource.attributes if each.key == "service.name"), "")
    attributes = {
        each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value") for each in span.attributes
    }
    return ReceivedSpan(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        error=span.status.message,
        attributes=attributes,
    )
