"""Spans of the requests that their callers trace: the front end's own, and those that the signer measured and cannot send itself.

A request that nobody traces costs one look at its flag. Only requests whose context says so are traced here: an agent decides, within its rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from keyreeve_common.purposes import Purpose
from keyreeve_common.trace import is_sampled
from keyreeve_common.tracing import Attributes, Span, Tracing

from keyreeve_keyserver import frames
from keyreeve_keyserver.frames import Signed, SignItem, SignResult
from keyreeve_keyserver.frontend.signer_link import OnResults

REQUEST = "keyserver.sign"
_PURPOSES = {int(purpose): purpose.label for purpose in Purpose}


class RequestTraces:
    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    def follow(self, items: Sequence[SignItem], on_results: OnResults) -> tuple[Sequence[SignItem], OnResults]:
        """The items with their spans as new parents, and `on_results` that ends each span with its item's result."""
        if not any(is_sampled(item.trace) for item in items):
            return items, on_results
        spans = {item.id: self._begin(item) for item in items if is_sampled(item.trace)}
        traced = [replace(item, trace=spans[item.id].trace) if item.id in spans else item for item in items]

        def ended(results: Sequence[SignResult]) -> None:
            for result in results:
                if (span := spans.pop(result.id, None)) is not None:
                    span.end(error="" if isinstance(result, Signed) else result.error.code.value)
            on_results(results)

        return traced, ended

    def add(self, spans: Sequence[frames.Span]) -> None:
        """What the signer measured."""
        for span in spans:
            attributes = {"keyreeve.detail": span.detail} if span.detail else {}
            self._tracing.add(
                span.name,
                span.trace,
                start_ns=span.start_us * 1000,
                end_ns=span.end_us * 1000,
                attributes=attributes,
            )

    def _begin(self, item: SignItem) -> Span:
        attributes: Attributes = {
            "keyreeve.purpose": _PURPOSES.get(item.purpose, "unknown"),
            "keyreeve.scheme": item.scheme,
        }
        return self._tracing.child(REQUEST, item.trace, attributes)
