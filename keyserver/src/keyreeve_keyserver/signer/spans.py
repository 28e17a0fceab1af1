"""Spans that the signer measures for items whose context asks for it, in wall-clock microseconds. The front end sends them on."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from keyreeve_common.trace import is_sampled

from keyreeve_keyserver.backends.ports import SignRequest
from keyreeve_keyserver.frames import SignItem, Span

JUDGE, BACKEND, RECORD = "signer.judge", "signer.backend", "signer.record"


def now_us() -> int:
    return time.time_ns() // 1000


@dataclass(slots=True)
class SpanLog:
    """The steps of one batch. `traces` holds the sampled items alone, so that a batch that nobody traces costs one look at each flag."""

    traces: dict[int, bytes] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)

    @classmethod
    def of(cls, items: Iterable[SignItem]) -> SpanLog:
        return cls({item.id: item.trace for item in items if item.trace[-1] and is_sampled(item.trace)})

    def __bool__(self) -> bool:
        return bool(self.traces)

    def step(self, name: str, ids: Iterable[int], start_us: int, detail: str = "") -> None:
        """A step that began at `start_us` and ends now, for those of these items that are traced."""
        if self.traces:
            end_us = max(now_us(), start_us)
            self.spans += [Span(self.traces[n], name, start_us, end_us, detail) for n in ids if n in self.traces]

    def watched(self, ids: Iterable[int], requests: Iterable[SignRequest]) -> list[SignRequest]:
        """The requests of these items; those that are traced tell this log of their backend's own steps."""
        return [self._watched(item_id, request) for item_id, request in zip(ids, requests, strict=True)]

    def _watched(self, item_id: int, request: SignRequest) -> SignRequest:
        trace = self.traces.get(item_id)
        if trace is None:
            return request
        return request._replace(on_step=lambda name, start, end: self.spans.append(Span(trace, name, start, end)))

    def taken(self) -> tuple[Span, ...]:
        """The steps that were not taken yet."""
        taken, self.spans = tuple(self.spans), []
        return taken
