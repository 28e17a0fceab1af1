"""The blob of a wrapped key: it comes back, and anything else is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import SealedRecordInvalid
from keyreeve_common.schemes import KeyType
from keyreeve_keyserver.domain.wrapped_key import WrappedKey, parse_wrapped_key

KEYS = st.builds(
    WrappedKey,
    st.integers(0, 0xFFFFFFFF),
    st.sampled_from(KeyType),
    st.binary(min_size=1, max_size=64),
    st.binary(min_size=1, max_size=300),
)


@given(KEYS)
def test_round_trip(key: WrappedKey) -> None:
    assert parse_wrapped_key(key.to_bytes()) == key
    assert "wrapped=" not in repr(key)


@given(KEYS, st.data())
def test_cut_and_extended_blobs_are_refused(key: WrappedKey, data: st.DataObject) -> None:
    blob = key.to_bytes()
    for damaged in (blob[: data.draw(st.integers(0, len(blob) - 1))], blob + b"\x00"):
        with pytest.raises(SealedRecordInvalid):
            parse_wrapped_key(damaged)


@given(st.binary(max_size=120))
def test_noise_is_refused_or_has_one_encoding(noise: bytes) -> None:
    for blob in (noise, b"KRW1" + noise):
        try:
            key = parse_wrapped_key(blob)
        except SealedRecordInvalid:
            continue
        assert key.to_bytes() == blob
