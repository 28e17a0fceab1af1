"""The context of a request: made anew where none is given, refused where it is not one."""

from __future__ import annotations

import pytest
from keyreeve_common.errors import InvalidRequest
from keyreeve_common.trace import TRACE_BYTES, TraceIds, checked_trace, is_sampled, make_trace, request_id_of


def test_given_context_is_kept_and_a_missing_one_made() -> None:
    given = bytes(range(1, TRACE_BYTES + 1))
    assert checked_trace(given) == given
    made = checked_trace(b"")
    assert len(made) == TRACE_BYTES
    assert made[16:] == bytes(9)
    assert make_trace() != make_trace()


def test_request_id_is_the_trace_id() -> None:
    assert request_id_of(bytes(range(TRACE_BYTES))) == "000102030405060708090a0b0c0d0e0f"


@pytest.mark.parametrize("given", [b"x", bytes(TRACE_BYTES), bytes(24), bytes([1] * 26)])
def test_what_is_no_context_is_refused(given: bytes) -> None:
    with pytest.raises(InvalidRequest, match="trace"):
        checked_trace(given)


def test_ids_drawn_together_differ_and_have_no_span() -> None:
    ids = TraceIds()
    made = [ids.make() for _ in range(1000)]
    assert len(set(made)) == len(made)
    assert {checked_trace(trace) for trace in made} == set(made)
    assert not any(is_sampled(trace) for trace in made)
