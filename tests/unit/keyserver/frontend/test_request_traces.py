"""Callers mark what is to be traced; how much that costs here is not theirs to say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keyreeve_common.key_id import KeyId
from keyreeve_common.trace import is_sampled, make_trace, request_id_of
from keyreeve_common.tracing import Tracing
from keyreeve_keyserver.frames import Signed, SignItem, SignResult
from keyreeve_keyserver.frontend.traces import MAX_TRACED_PER_S, RequestTraces


class Span:
    def __init__(self, trace: bytes) -> None:
        self.trace = trace
        self.ended = 0

    def end(self, *, error: str = "") -> None:
        self.ended += 1


class Recording(Tracing):
    records = True

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def child(self, name: str, trace: bytes, attributes: Any) -> Span:
        self.spans.append(Span(trace))
        return self.spans[-1]


def marked(number: int) -> SignItem:
    return SignItem(number, KeyId("k-1"), 0x0403, 1, 1000, b"m", make_trace()[:-1] + b"\x01")


def follow(traces: RequestTraces, items: Sequence[SignItem]) -> Sequence[SignItem]:
    got: list[SignResult] = []
    followed, on_results = traces.follow(items, got.extend)
    on_results([Signed(item.id, b"s") for item in items])
    assert [result.id for result in got] == [item.id for item in items]
    assert [request_id_of(item.trace) for item in followed] == [request_id_of(item.trace) for item in items]
    return followed


def test_caller_that_marks_everything_gets_so_many_traced_in_a_second() -> None:
    now, tracing = 100.0, Recording()
    traces = RequestTraces(tracing, lambda: now)
    followed = follow(traces, [marked(number) for number in range(MAX_TRACED_PER_S + 50)])
    assert sum(is_sampled(item.trace) for item in followed) == MAX_TRACED_PER_S
    assert [span.ended for span in tracing.spans] == [1] * MAX_TRACED_PER_S
    assert not is_sampled(follow(traces, [marked(0)])[0].trace)
    now += 1
    assert is_sampled(follow(traces, [marked(0)])[0].trace)


def test_where_tracing_is_off_the_signer_measures_nothing() -> None:
    (followed,) = follow(RequestTraces(Tracing()), [marked(0)])
    assert not is_sampled(followed.trace)
