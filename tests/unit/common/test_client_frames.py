"""The bulk reading of the sign socket: the same as the strict reading of each frame, however the stream is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common import client_frames
from keyreeve_common.client_frames import BadFrame, ClientFrames, TakenFrame
from keyreeve_common.errors import ErrorCode, InvalidRequest, MalformedFrame, MessageTooLarge
from keyreeve_common.key_id import KeyId
from keyreeve_common.sign_socket import (
    MAX_FRAME_BYTES,
    PingFrame,
    SignFrame,
    parse_client_frame,
    request_id_of,
    splitter,
)
from keyreeve_common.wire import u32

KEY_IDS = st.sampled_from([KeyId("k"), KeyId("key-web"), KeyId("a" * 64)])
SIGN_FRAMES = st.builds(
    SignFrame,
    request_id=st.integers(0, 2**32 - 1),
    deadline_ms=st.integers(1, 60_000),
    scheme=st.integers(0, 2**16 - 1),
    purpose=st.integers(0, 255),
    key_id=KEY_IDS,
    message=st.binary(max_size=200),
)
FRAMES = SIGN_FRAMES | st.builds(PingFrame, st.binary(min_size=4, max_size=4))
NOT_QUITE = st.builds(  # a good frame with one byte changed, its length among them
    lambda frame, at, byte: bytes((*frame[: at % len(frame)], byte, *frame[at % len(frame) + 1 :])),
    SIGN_FRAMES.map(SignFrame.to_bytes),
    st.integers(0, 10_000),
    st.integers(0, 255),
)
CHUNKS = st.lists(FRAMES.map(lambda frame: frame.to_bytes()) | NOT_QUITE | st.binary(max_size=40), max_size=6)


def one_by_one(stream: bytes) -> list[tuple[object, ...]]:
    """What the splitter and the strict parser make of it, in the words of `shown`."""
    found: list[tuple[object, ...]] = []
    at = 0
    while len(stream) - at >= 4:
        end = at + 4 + int.from_bytes(stream[at : at + 4], "big")
        try:
            frames = splitter().feed(stream[at : min(end, len(stream))])
        except MalformedFrame as error:
            return [*found, (0, error.code, error.detail, True)]
        if not frames:
            break
        try:
            found.append((parse_client_frame(frames[0]),))
        except MessageTooLarge as error:
            found.append((request_id_of(frames[0]), error.code, error.detail, False))
        except InvalidRequest as error:
            return [*found, (request_id_of(frames[0]), ErrorCode.MALFORMED_FRAME, error.detail, True)]
        at = end
    return found


def shown(taken: list[TakenFrame]) -> list[tuple[object, ...]]:
    return [
        (frame.request_id, frame.error.code, frame.error.detail, frame.final)
        if isinstance(frame, BadFrame)
        else (frame,)
        for frame in taken
    ]


@given(CHUNKS, st.data())
def test_any_cut_of_any_stream_reads_as_frame_by_frame(chunks: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(chunks)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    frames, got = ClientFrames(), list[TakenFrame]()
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += frames.feed(stream[start:end])
    assert shown(got) == one_by_one(stream)


@given(st.lists(FRAMES, min_size=1, max_size=3))
def test_byte_by_byte(frames: list[SignFrame | PingFrame]) -> None:
    reading, got = ClientFrames(), list[TakenFrame]()
    for byte in b"".join(frame.to_bytes() for frame in frames):
        got += reading.feed(bytes((byte,)))
    assert got == frames
    assert reading.pending == 0


def test_a_malformed_frame_in_the_middle_leaves_what_came_before_and_ends_the_stream() -> None:
    good = SignFrame(7, 1000, 0x0403, 1, KeyId("key-web"), b"m")
    frames = ClientFrames()
    first, bad = frames.feed(good.to_bytes() + b"\x00\x00\x00\x02\x09\x01" + good.to_bytes())
    assert first == good
    assert isinstance(bad, BadFrame)
    assert bad.final
    assert frames.feed(good.to_bytes()) == []
    assert frames.pending == 0


@pytest.mark.parametrize("length", [0, 1, MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_a_length_out_of_bounds_is_refused_before_its_bytes_come(length: int) -> None:
    (bad,) = ClientFrames().feed(u32(length))
    assert isinstance(bad, BadFrame)
    assert bad.final


def test_no_more_is_kept_than_one_frame() -> None:
    frames = ClientFrames()
    assert frames.feed(u32(MAX_FRAME_BYTES) + bytes(MAX_FRAME_BYTES - 1)) == []
    assert frames.pending == MAX_FRAME_BYTES + 3
    (bad,) = frames.feed(bytes(1))
    assert isinstance(bad, BadFrame)


def test_key_ids_that_are_remembered_are_bounded() -> None:
    frames = ClientFrames()
    for number in range(client_frames._MAX_KNOWN_KEY_IDS + 10):
        (frame,) = frames.feed(SignFrame(1, 1, 0, 0, KeyId(f"k-{number}"), b"").to_bytes())
        assert isinstance(frame, SignFrame)
        assert frame.key_id == f"k-{number}"
    assert len(client_frames._KNOWN_KEY_IDS) <= client_frames._MAX_KNOWN_KEY_IDS
