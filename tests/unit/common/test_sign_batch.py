"""Packed batches come back, have one encoding, and hold to their bounds; a scan finds what a reading finds."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import ErrorCode, MalformedFrame, TokenUnavailable, error_from_code
from keyreeve_common.key_id import KeyId
from keyreeve_common.sign_batch import (
    NO_TRACE,
    PackedItems,
    Refused,
    Signed,
    SignItem,
    all_signed,
    deadlines_of,
    ids_of,
    open_items,
    pack_items,
    pack_results,
    read_results,
    scan_items,
    scan_results,
    split_count,
    uses_of,
    with_count,
)

U32 = st.integers(0, 0xFFFFFFFF)
ITEMS = st.builds(
    SignItem,
    id=U32,
    key_id=st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=64).map(KeyId),
    scheme=st.integers(0, 0xFFFF),
    purpose=st.integers(0, 255),
    deadline_ms=U32,
    message=st.binary(max_size=300),
    trace=st.binary(min_size=24, max_size=24).map(lambda tail: b"\x01" + tail),
)
RESULTS = st.one_of(
    st.builds(Signed, U32, st.binary(min_size=1, max_size=1024)),
    st.builds(
        lambda number, code, text: Refused(number, error_from_code(code, text, timedelta(seconds=1))),
        U32,
        st.sampled_from([code.value for code in ErrorCode]),
        st.text(st.characters(codec="utf-8"), max_size=60),
    ),
)
ITEM = SignItem(7, KeyId("key-1"), 0x0403, 1, 2_000, b"message", b"\x01" * 24 + b"\x00")


@given(st.lists(ITEMS, min_size=1, max_size=6))
def test_items_come_back_and_a_scan_sees_their_columns(items: list[SignItem]) -> None:
    packed = with_count(len(items), pack_items(items))
    found = open_items(packed)
    assert list(found) == items
    assert len(found) == len(items)
    assert found[0] == items[0]
    assert (ids_of(found), uses_of(found), deadlines_of(found)) == (ids_of(items), uses_of(items), deadlines_of(items))
    assert found.sampled == any(item.trace[-1] & 1 for item in items)
    assert with_count(len(found), pack_items(found)) == packed


@given(st.lists(RESULTS, min_size=1, max_size=6))
def test_results_come_back_and_a_scan_sees_whether_all_are_signed(results: list[Signed | Refused]) -> None:
    data = pack_results(results)
    found = scan_results(data, len(results))
    assert ids_of(found) == ids_of(results)
    assert all_signed(found) == all(isinstance(result, Signed) for result in results)
    assert not all_signed(results)  # of a plain list nobody knows without a look
    assert pack_results(found) == data
    assert pack_results(read_results(data, len(results))) == data


@given(st.lists(ITEMS, min_size=1, max_size=3), st.data())
def test_every_cut_and_every_extra_byte_is_refused(items: list[SignItem], data: st.DataObject) -> None:
    packed = with_count(len(items), pack_items(items))
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(MalformedFrame):
        open_items(packed[:cut])
    with pytest.raises(MalformedFrame, match="1 bytes after"):
        open_items(packed + b"\x00")


@given(st.lists(RESULTS, min_size=1, max_size=3), st.data())
def test_every_cut_of_results_is_refused(results: list[Signed | Refused], data: st.DataObject) -> None:
    packed = pack_results(results)
    cut = data.draw(st.integers(0, len(packed) - 1))
    for parse in (scan_results, read_results):
        with pytest.raises(MalformedFrame):
            parse(packed[:cut], len(results))


@given(st.binary(max_size=200), st.integers(1, 4))
def test_noise_is_malformed_or_canonical(noise: bytes, count: int) -> None:
    try:
        found = scan_items(noise, count)
    except MalformedFrame:
        return
    assert pack_items(found) == noise


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\x00",
        with_count(0, b""),
        with_count(257, pack_items([ITEM] * 257)),
        with_count(2, pack_items([ITEM])),
        with_count(1, pack_items([ITEM._replace(trace=NO_TRACE)])),
        with_count(1, pack_items([ITEM._replace(key_id=KeyId(""))])),
        with_count(1, pack_items([ITEM._replace(key_id=KeyId("Key"))])),
        with_count(1, pack_items([ITEM._replace(key_id=KeyId("k" * 65))])),
        with_count(1, pack_items([ITEM._replace(message=bytes(65_537))])),
    ],
)
def test_what_breaks_a_bound_is_refused(packed: bytes) -> None:
    with pytest.raises(MalformedFrame):
        open_items(packed)


@pytest.mark.parametrize("signature", [b"", bytes(1_025)])
def test_a_signature_has_its_bounds(signature: bytes) -> None:
    for parse in (scan_results, read_results):
        with pytest.raises(MalformedFrame, match="signature has"):
            parse(pack_results([Signed(1, signature)]), 1)


def test_the_longest_message_fits() -> None:
    item = ITEM._replace(message=bytes(65_536))
    assert isinstance(open_items(with_count(1, pack_items([item]))), PackedItems)


def test_no_message_stands_in_what_is_logged() -> None:
    assert "message" not in repr(ITEM)
    assert "gone" in str(Refused(1, TokenUnavailable("gone")).error)


def test_count_and_encodings_are_split() -> None:
    assert split_count(with_count(3, b"abc")) == (3, b"abc")
