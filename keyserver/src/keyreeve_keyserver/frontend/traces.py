"""Spans of the requests that their callers trace: the front end's own, and those that the signer measured and cannot send itself.

A request that nobody traces costs one look at its flag. Only requests whose context says so are traced here: an agent decides. Always true:
no more than MAX_TRACED_PER_S a second are, whatever callers ask for, and none where tracing is off; the others go on unmarked, so the
signer measures nothing for them either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic

from keyreeve_common.purposes import Purpose
from keyreeve_common.trace import is_sampled, unsampled
from keyreeve_common.tracing import Attributes, Span, Tracing

from keyreeve_keyserver import frames
from keyreeve_keyserver.frames import PackedItems, Signed, SignItem, SignResult
from keyreeve_keyserver.frontend.signer_link import OnResults

REQUEST = "keyserver.sign"
MAX_TRACED_PER_S = 500  # each costs about as much as several signatures
_PURPOSES = {int(purpose): purpose.label for purpose in Purpose}


class RequestTraces:
    def __init__(self, tracing: Tracing, clock_s: Callable[[], float] = monotonic) -> None:
        self._tracing = tracing
        self._clock_s = clock_s
        self._left = MAX_TRACED_PER_S
        self._second = 0.0  # when the one began that `_left` is of

    def follow(self, items: Sequence[SignItem], on_results: OnResults) -> tuple[Sequence[SignItem], OnResults]:
        """The items with their spans as new parents, and `on_results` that ends each span with its item's result."""
        if not (items.sampled if isinstance(items, PackedItems) else any(is_sampled(item.trace) for item in items)):
            return items, on_results
        spans: dict[int, Span] = {}
        traced = [self._followed(item, spans) if is_sampled(item.trace) else item for item in items]

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

    def _followed(self, item: SignItem, spans: dict[int, Span]) -> SignItem:
        if not self._tracing.records or not self._has_room():
            return item._replace(trace=unsampled(item.trace))
        span = spans[item.id] = self._begin(item)
        return item._replace(trace=span.trace)

    def _has_room(self) -> bool:
        now = self._clock_s()
        if now - self._second >= 1:
            self._second, self._left = now, MAX_TRACED_PER_S
        self._left -= 1
        return self._left >= 0

    def _begin(self, item: SignItem) -> Span:
        attributes: Attributes = {
            "keyreeve.purpose": _PURPOSES.get(item.purpose, "unknown"),
            "keyreeve.scheme": item.scheme,
        }
        return self._tracing.child(REQUEST, item.trace, attributes)
