"""Frames: what is written is read back, and what breaks a rule of docs/protocol/signer-frames.md is refused as malformed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import (
    RENDERINGS,
    ErrorCode,
    InvalidRequest,
    KeyreeveError,
    MalformedFrame,
    TokenUnavailable,
    error_from_code,
)
from keyreeve_common.key_id import KeyId
from keyreeve_keyserver import frames

U32 = st.integers(0, 0xFFFFFFFF)
KEY_IDS = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=64).map(KeyId)
CALLERS = st.one_of(
    st.just("local"), st.text("abc/", max_size=0).map(lambda _: "spiffe://td.test/agent/a"), st.just("spiffe://td.test")
)
ITEMS = st.builds(
    frames.SignItem,
    id=U32,
    key_id=KEY_IDS,
    scheme=st.integers(0, 0xFFFF),
    purpose=st.integers(0, 255),
    deadline_ms=U32,
    message=st.binary(max_size=300),
    trace=st.binary(min_size=25, max_size=25),
)
BATCHES = st.builds(
    frames.SignBatch,
    batch_id=U32,
    caller=CALLERS,
    items=st.lists(ITEMS, min_size=1, max_size=8, unique_by=lambda item: item.id).map(tuple),
)
ERRORS = st.builds(
    lambda code, detail, ms: error_from_code(code, detail, timedelta(milliseconds=ms) if ms else None),
    st.sampled_from([code.value for code in ErrorCode]),
    st.text(st.characters(codec="utf-8"), max_size=80),
    U32,
)
RESULTS = st.one_of(
    st.builds(frames.Signed, U32, st.binary(min_size=1, max_size=1024)), st.builds(frames.Refused, U32, ERRORS)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda n: n != "op"), JSON)


def one_frame(data: bytes) -> bytes:
    (frame,) = frames.splitter().feed(data)
    return frame


def seen(error: KeyreeveError) -> tuple[Any, ...]:
    return type(error), error.code, error.detail, error.retry_after


@given(BATCHES)
def test_batch_comes_back(batch: frames.SignBatch) -> None:
    assert frames.parse_request_frame(one_frame(batch.to_bytes())) == batch


@given(U32, st.lists(RESULTS, min_size=1, max_size=8))
def test_results_come_back(batch_id: int, results: list[frames.SignResult]) -> None:
    parsed = frames.parse_answer_frame(one_frame(frames.SignResults(batch_id, tuple(results)).to_bytes()))
    assert isinstance(parsed, frames.SignResults)
    assert parsed.batch_id == batch_id
    for got, sent in zip(parsed.results, results, strict=True):
        assert got.id == sent.id
        if isinstance(sent, frames.Refused):
            assert isinstance(got, frames.Refused)
            assert seen(got.error) == seen(sent.error)
        else:
            assert got == sent


@given(U32, OBJECTS)
def test_control_comes_back(request_id: int, arguments: dict[str, Any]) -> None:
    control = frames.Control(request_id, "create_key", arguments)
    assert frames.parse_request_frame(one_frame(control.to_bytes())) == control
    ok = frames.ControlOk(request_id, arguments)
    assert frames.parse_answer_frame(one_frame(ok.to_bytes())) == ok


@given(U32, ERRORS)
def test_refusals_come_back(request_id: int, error: KeyreeveError) -> None:
    refused = frames.parse_answer_frame(one_frame(frames.ControlRefused(request_id, error).to_bytes()))
    assert isinstance(refused, frames.ControlRefused)
    assert seen(refused.error) == seen(error)
    malformed = frames.parse_answer_frame(one_frame(frames.Malformed(error).to_bytes()))
    assert isinstance(malformed, frames.Malformed)
    assert (malformed.error.code, malformed.error.detail) == (error.code, error.detail)


@given(st.binary(max_size=200), st.sampled_from([0x10, 0x20, 0x90, 0xA0, 0xAF, 0x8F, 0]))
def test_noise_is_malformed_or_canonical(noise: bytes, kind: int) -> None:
    for parse in (frames.parse_request_frame, frames.parse_answer_frame):
        for data in (noise, bytes((1, kind)) + noise):
            try:
                parsed = parse(data)
            except MalformedFrame:
                continue
            assert parse(one_frame(parsed.to_bytes())) is not None


@given(BATCHES, st.data())
def test_every_cut_and_every_extra_byte_is_refused(batch: frames.SignBatch, data: st.DataObject) -> None:
    frame = one_frame(batch.to_bytes())
    cut = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(MalformedFrame):
        frames.parse_request_frame(frame[:cut])
    with pytest.raises(MalformedFrame, match="1 bytes after the end"):
        frames.parse_request_frame(frame + b"\x00")


def item(**changes: Any) -> frames.SignItem:
    fields: dict[str, Any] = {
        "id": 1,
        "key_id": KeyId("k"),
        "scheme": 0x0403,
        "purpose": 1,
        "deadline_ms": 1000,
        "message": b"m",
    }
    return frames.SignItem(**{**fields, **changes})


def test_bounds_of_the_page() -> None:
    good = frames.SignBatch(7, "local", (item(),))
    assert one_frame(good.to_bytes())[:2] == b"\x02\x10"
    assert frames.parse_request_frame(one_frame(good.to_bytes())) == good
    refused = {
        "version 1": b"\x01" + one_frame(good.to_bytes())[1:],
        "type 0x90": b"\x02\x90" + one_frame(good.to_bytes())[2:],
        "allowed are 1 to 256": b"\x02\x10" + bytes(4) + b"\x00\x05local" + b"\x01\x01",
        "count is 0": b"\x02\x10" + bytes(4) + b"\x00\x05local" + b"\x00\x00",
        "caller": one_frame(frames.SignBatch(7, "http://x", (item(),)).to_bytes()),
        "key id": one_frame(frames.SignBatch(7, "local", (item(key_id=KeyId("UPPER")),)).to_bytes()),
        "same id": one_frame(frames.SignBatch(7, "local", (item(), item())).to_bytes()),
        "message has 65537 bytes": one_frame(frames.SignBatch(7, "local", (item(message=bytes(65537)),)).to_bytes()),
    }
    for text, frame in refused.items():
        with pytest.raises(MalformedFrame, match=text):
            frames.parse_request_frame(frame)


@pytest.mark.parametrize("length", [0, 1, frames.MAX_FRAME_BYTES + 1])
def test_frame_length_is_bounded(length: int) -> None:
    with pytest.raises(MalformedFrame):
        frames.splitter().feed(length.to_bytes(4, "big"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "1",
        '"op"',
        "{}",
        '{"op":1}',
        '{"op":"A"}',
        '{"op":"health","op":"health"}',
        '{"op":"health","x":1.5}',
        '{"op":"health","x":NaN}',
        '{"op":"health","x":"\\ud800"}',
        '{"op":"health"} x',
        '{"op":"health","x":' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"op":"health","x":' + "9" * 10_000 + "}",
    ],
)
def test_control_json_is_strict(text: str) -> None:
    body = text.encode()
    with pytest.raises(MalformedFrame):
        frames.parse_request_frame(b"\x02\x20" + bytes(4) + len(body).to_bytes(4, "big") + body)


def test_what_does_not_fit_is_not_sent() -> None:
    for build in (
        lambda: frames.SignBatch(1, "local", ()),
        lambda: frames.SignBatch(1, "local", tuple(item(id=n) for n in range(257))),
        lambda: frames.SignBatch(1, "local", tuple(item(id=n, message=bytes(65_536)) for n in range(200))),
        lambda: frames.SignResults(1, ()),
        lambda: frames.Control(1, "load_key", {"record": "x" * frames.MAX_CONTROL_BYTES}),
    ):
        with pytest.raises(InvalidRequest):
            build().to_bytes()


def test_every_error_code_crosses() -> None:
    for code in RENDERINGS:
        sent = frames.Refused(1, error_from_code(code.value, "why", timedelta(seconds=2)))
        parsed = frames.parse_answer_frame(one_frame(frames.SignResults(1, (sent,)).to_bytes()))
        assert isinstance(parsed, frames.SignResults)
        (got,) = parsed.results
        assert isinstance(got, frames.Refused)
        assert seen(got.error) == seen(sent.error)


def test_message_is_not_in_the_repr() -> None:
    assert "message" not in repr(item(message=b"to be signed"))
    assert frames.Refused(1, TokenUnavailable("gone")).error.detail == "gone"


SPANS = st.builds(
    frames.Span,
    st.binary(min_size=25, max_size=25),
    st.sampled_from(["signer.judge", "a_b.c"]),
    st.integers(0, 1000),
    st.integers(1000, 2**53 - 1),
    st.text(st.characters(codec="utf-8"), max_size=64),
)


@given(st.lists(SPANS, max_size=5).map(tuple))
def test_spans_cross(spans: tuple[frames.Span, ...]) -> None:
    assert frames.parse_answer_frame(one_frame(frames.Spans(spans).to_bytes())) == frames.Spans(spans)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"spans":1}',
        '{"spans":[[]]}',
        '{"spans":[["00","a",1,2,""]]}',
        '{"spans":[],"more":1}',
        f'{{"spans":[["{"00" * 25}","A",1,2,""]]}}',
        f'{{"spans":[["{"00" * 25}","a",2,1,""]]}}',
        f'{{"spans":[["{"00" * 25}","a",1,2,5]]}}',
        f'{{"spans":[["{"00" * 25}","a",1,{2**53},""]]}}',
        f'{{"spans":[["{"00" * 25}","a",1,2,"{"x" * 65}"]]}}',
    ],
)
def test_what_is_no_spans_is_malformed(text: str) -> None:
    with pytest.raises(MalformedFrame):
        frames.parse_answer_frame(b"\x02\x91" + len(text).to_bytes(4, "big") + text.encode())
