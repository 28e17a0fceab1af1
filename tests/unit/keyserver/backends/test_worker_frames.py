"""Frames of a backend worker: they come back, and noise is malformed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import ErrorCode, KeyreeveError, MalformedFrame, error_from_code
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_keyserver.backends import worker_frames as frames

REFS = st.text("abc019-", min_size=1, max_size=64)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)
ITEMS = st.builds(
    frames.TokenSignItem,
    REFS,
    st.sampled_from(SignatureScheme),
    st.integers(0, 2**64 - 1),
    st.binary(max_size=200),
    prehashed=st.booleans(),
    wrapped=st.binary(max_size=99),
)
QUESTIONS = st.one_of(
    st.just(frames.Open()),
    st.builds(frames.Create, REFS, REFS, st.sampled_from(KeyType)),
    st.builds(frames.Find, REFS, st.binary(max_size=99)),
    st.builds(frames.Destroy, REFS),
    st.just(frames.Ping()),
    st.builds(frames.Inspect, ref=REFS, wrapped=st.binary(max_size=64)),
    st.builds(frames.TokenSign, st.lists(ITEMS, min_size=1, max_size=5).map(tuple)),
    st.builds(frames.Box, st.booleans(), REFS, st.binary(min_size=12, max_size=12), st.binary(), st.binary()),
)
ERRORS = st.builds(lambda code: error_from_code(code.value, "why"), st.sampled_from(ErrorCode))
ANSWERS = st.one_of(
    st.builds(frames.Done, st.dictionaries(st.text("abc", max_size=3), st.integers())),
    st.builds(frames.Failed, ERRORS),
    st.builds(
        frames.TokenSigned,
        st.lists(st.binary(min_size=1, max_size=99) | ERRORS, min_size=1, max_size=frames.MAX_ITEMS).map(tuple),
    ),
    st.builds(frames.Boxed, st.binary(max_size=99)),
)


def one(data: bytes) -> bytes:
    (frame,) = frames.splitter().feed(data)
    return frame


def plain(value: Any) -> Any:
    """Errors have no `==`: compare what they say."""
    if isinstance(value, KeyreeveError):
        return value.code, value.detail
    if isinstance(value, frames.Failed):
        return plain(value.error)
    return [plain(outcome) for outcome in value.outcomes] if isinstance(value, frames.TokenSigned) else value


@given(QUESTIONS)
def test_questions_come_back(question: frames.Question) -> None:
    assert frames.parse_question(one(question.to_bytes())) == question


@given(ANSWERS)
def test_answers_come_back(answer: frames.Answer) -> None:
    assert plain(frames.parse_answer(one(answer.to_bytes()))) == plain(answer)


@given(QUESTIONS, st.data())
def test_cut_and_extended_questions_are_malformed(question: frames.Question, data: st.DataObject) -> None:
    frame = one(question.to_bytes())
    cut = data.draw(st.integers(0, len(frame) - 1))
    for changed in (frame[:cut], frame + b"\x00"):
        with pytest.raises(MalformedFrame):
            frames.parse_question(changed)


@given(st.binary(max_size=100), st.integers(0, 255))
def test_noise_is_malformed_or_has_one_encoding(noise: bytes, kind: int) -> None:
    frame = bytes((1, kind)) + noise
    try:
        question = frames.parse_question(frame)
    except MalformedFrame:
        return
    assert one(question.to_bytes()) == frame


def test_message_and_box_are_not_in_the_repr() -> None:
    item = frames.TokenSignItem("k", SignatureScheme.ED25519, 1, b"to be signed")
    box = frames.Box(decrypt=False, label="k", nonce=bytes(12), associated=b"header", data=b"pkcs8")
    assert "signed" not in repr(item)
    assert "pkcs8" not in repr(box)
