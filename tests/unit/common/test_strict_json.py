"""JSON in one strict reading and one spelling."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.strict_json import canonical_json, parse_strict_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), VALUES, max_size=4))
def test_what_is_written_is_read_again_and_has_one_spelling(value: dict[str, Any]) -> None:
    written = canonical_json(value)
    assert parse_strict_json(written) == value
    assert canonical_json(parse_strict_json(written)) == written
    assert parse_strict_json(written.decode()) == value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{} {}",
        b'{"a":1,"a":2}',
        b'{"a":{"b":1,"b":1}}',
        b'{"a":1.0}',
        b'{"a":1e3}',
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":"\\ud800"}',
        b'{"\\udfff":1}',
        b"\xff\xfe{\x00}\x00",
        b'{"a":"\xff"}',
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' + b"9" * 10_000 + b"}",
    ],
)
def test_other_readings_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - its text is not for showing
        parse_strict_json(data)
