"""Frames of the sign socket and key references: round trips, the committed vectors, and every way to be malformed."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import example, given
from hypothesis import strategies as st
from keyreeve_common.errors import (
    CLASS_BY_CODE,
    CODE_BY_WIRE,
    RENDERINGS,
    ErrorCode,
    InvalidRequest,
    KeyNotFound,
    KeyreeveError,
    KeyReferenceInvalid,
    MalformedFrame,
    MessageTooLarge,
    RateLimited,
    error_from_code,
    error_from_wire,
)
from keyreeve_common.grpc_edge import error_from_proto, error_to_proto
from keyreeve_common.key_id import KeyId
from keyreeve_common.key_reference import (
    KeyReference,
    parse_key_reference_der,
    parse_key_reference_pem,
    parse_key_reference_pkcs8,
)
from keyreeve_common.purposes import MAX_MESSAGE_BYTES
from keyreeve_common.sign_socket import (
    MAX_FRAME_BYTES,
    PingFrame,
    PongFrame,
    RefusedFrame,
    SignedFrame,
    SignFrame,
    parse_agent_frame,
    parse_client_frame,
    splitter,
)
from keyreeve_common.wire import LENGTH_BYTES, u32

VECTORS = Path(__file__).parents[2] / "vectors"
key_ids = st.from_regex(r"[a-z0-9-]{1,64}", fullmatch=True).map(KeyId)
sign_frames = st.builds(
    SignFrame,
    request_id=st.integers(0, 2**32 - 1),
    deadline_ms=st.integers(1, 60_000),
    scheme=st.integers(0, 65_535),
    purpose=st.integers(0, 255),
    key_id=key_ids,
    message=st.binary(max_size=300),
)


def frame_of(data: bytes) -> bytes:
    (frame,) = splitter().feed(data)
    return frame


@given(sign_frames)
def test_sign_frame_round_trip(frame: SignFrame) -> None:
    assert parse_client_frame(frame_of(frame.to_bytes())) == frame


@given(st.lists(sign_frames, max_size=5), st.data())
def test_frames_survive_any_cut_of_the_stream(frames: list[SignFrame], data: st.DataObject) -> None:
    stream = b"".join(frame.to_bytes() for frame in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    cutter = splitter()
    got = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += cutter.feed(stream[start:end])
    assert [parse_client_frame(frame) for frame in got] == frames
    assert cutter.pending == 0


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_client_frame_parser(data: bytes) -> None:
    try:
        frame = parse_client_frame(data)
    except InvalidRequest:
        return
    assert frame.to_bytes()[LENGTH_BYTES:] == data  # what is accepted has exactly one encoding


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_agent_frame_parser(data: bytes) -> None:
    try:
        parse_agent_frame(data)
    except MalformedFrame:
        return


@given(sign_frames, st.data())
def test_a_frame_cut_short_or_with_a_tail_is_malformed(frame: SignFrame, data: st.DataObject) -> None:
    whole = frame.to_bytes()[LENGTH_BYTES:]
    end = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(MalformedFrame):
        parse_client_frame(whole[:end])
    with pytest.raises(MalformedFrame):
        parse_client_frame(whole + b"\x00")


def test_agent_frames_round_trip() -> None:
    assert parse_agent_frame(frame_of(SignedFrame(9, b"sig").to_bytes())) == SignedFrame(9, b"sig")
    assert parse_agent_frame(frame_of(PongFrame(b"abcd").to_bytes())) == PongFrame(b"abcd")
    assert parse_client_frame(frame_of(PingFrame(b"abcd").to_bytes())) == PingFrame(b"abcd")
    limited = RateLimited("too many", retry_after=timedelta(milliseconds=1500))
    back = parse_agent_frame(frame_of(RefusedFrame(3, limited).to_bytes()))
    assert isinstance(back, RefusedFrame)
    assert type(back.error) is RateLimited
    assert (back.error.detail, back.error.retry_after) == ("too many", timedelta(milliseconds=1500))


def test_oversize_message_names_the_limit() -> None:
    frame = SignFrame(1, 1000, 0x0403, 1, KeyId("k"), b"m" * (MAX_MESSAGE_BYTES + 1)).to_bytes()
    with pytest.raises(MessageTooLarge, match="65537 bytes, the limit is 65536"):
        parse_client_frame(frame[LENGTH_BYTES:])


@pytest.mark.parametrize("length", [0, 1, MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_frame_length_out_of_bounds_is_refused_before_anything_is_read(length: int) -> None:
    with pytest.raises(MalformedFrame, match="allowed are 2 to 66000"):
        splitter().feed(u32(length))


@pytest.mark.parametrize("deadline_ms", [0, 60_001])
def test_deadline_out_of_bounds_is_malformed(deadline_ms: int) -> None:
    frame = SignFrame(1, deadline_ms, 0x0403, 1, KeyId("k"), b"").to_bytes()
    with pytest.raises(MalformedFrame, match="deadline_ms"):
        parse_client_frame(frame[LENGTH_BYTES:])


def spki_of(key: PrivateKeyTypes) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


SPKI = spki_of(ec.derive_private_key(7, ec.SECP256R1()))


@pytest.mark.parametrize(
    "key",
    [
        ec.derive_private_key(7, ec.SECP256R1()),
        ec.derive_private_key(7, ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.from_private_bytes(b"7" * 32),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["p256", "p384", "ed25519", "rsa2048"],
)
def test_key_reference_round_trip_in_every_envelope(key: PrivateKeyTypes) -> None:
    reference = KeyReference(KeyId("k-1"), "/run/keyreeve/sign.sock", spki_of(key))
    assert parse_key_reference_der(reference.to_der()) == reference
    assert parse_key_reference_pem(reference.to_pem()) == reference
    assert parse_key_reference_pkcs8(reference.to_pkcs8_der()) == reference


def test_key_reference_cut_at_any_byte_is_refused() -> None:
    reference = KeyReference(KeyId("k-1"), "/run/keyreeve/sign.sock", SPKI)
    der, pem, pkcs8 = reference.to_der(), reference.to_pem(), reference.to_pkcs8_der()
    for end in range(len(der)):
        with pytest.raises(KeyReferenceInvalid):
            parse_key_reference_der(der[:end])
    for end in range(len(pem.rstrip())):
        with pytest.raises(KeyReferenceInvalid):
            parse_key_reference_pem(pem[:end])
    for end in range(len(pkcs8)):
        with pytest.raises(KeyReferenceInvalid):
            parse_key_reference_pkcs8(pkcs8[:end])
    with pytest.raises(KeyReferenceInvalid):
        parse_key_reference_der(der + b"\x00")


@given(st.integers(0, 138), st.integers(1, 255))
def test_changed_key_reference_is_another_reference_or_refused(at: int, flip: int) -> None:
    reference = KeyReference(KeyId("k-1"), "/run/keyreeve/sign.sock", SPKI)
    der = bytearray(reference.to_der())
    der[at % len(der)] ^= flip
    try:
        assert parse_key_reference_der(bytes(der)) != reference
    except KeyReferenceInvalid:
        return


@pytest.mark.parametrize(
    ("key_id", "socket"),
    [("", "/s"), ("K", "/s"), ("k" * 65, "/s"), ("k", "relative"), ("k", "/" + "s" * 107), ("k", "/a\x00b")],
)
def test_key_reference_with_bad_fields_is_refused(key_id: str, socket: str) -> None:
    with pytest.raises(KeyReferenceInvalid):
        KeyReference(KeyId(key_id), socket, SPKI)


def test_key_reference_of_an_unsupported_key_is_refused() -> None:
    with pytest.raises(KeyReferenceInvalid, match="EC P-256"):
        KeyReference(KeyId("k"), "/s", spki_of(ec.derive_private_key(7, ec.SECP521R1())))


def test_committed_vectors_still_hold() -> None:
    reference = json.loads((VECTORS / "key_reference.json").read_text())
    parsed = parse_key_reference_der(bytes.fromhex(reference["der"]))
    assert (parsed.key_id, parsed.socket) == (reference["key_id"], reference["socket"])
    assert parse_key_reference_pkcs8(bytes.fromhex(reference["pkcs8_der"])) == parsed
    assert parse_key_reference_pem(reference["pem"]) == parsed
    frames = json.loads((VECTORS / "sign_socket.json").read_text())
    sign = parse_client_frame(frame_of(bytes.fromhex(frames["sign"])))
    assert sign == SignFrame(
        7, 2000, 0x0403, 1, KeyId("k-0123456789abcdef"), sign.message if isinstance(sign, SignFrame) else b""
    )


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_error_code_maps_both_ways(code: ErrorCode) -> None:
    rendering = RENDERINGS[code]
    assert CODE_BY_WIRE[rendering.wire] is code
    by_wire = error_from_wire(rendering.wire, "why")
    by_name = error_from_code(code.value, "why")
    assert type(by_wire) is type(by_name) is CLASS_BY_CODE[code]
    assert by_wire.code is by_name.code is code
    assert error_from_proto(error_to_proto(by_name)).code is code


def test_wire_numbers_are_unique() -> None:
    assert len(CODE_BY_WIRE) == len(RENDERINGS) == len(ErrorCode)


def test_every_error_code_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "errors.md").read_text()
    missing = [code.value for code in ErrorCode if f"| `{code.value}` | {RENDERINGS[code].wire} |" not in text]
    assert missing == []


@given(st.text(max_size=3000))
@example("x" * 1019 + " and more")
def test_a_detail_is_one_line_within_its_bound(text: str) -> None:
    detail = KeyreeveError(text).detail
    assert "\n" not in detail
    assert len(detail.encode()) <= 1024
    assert KeyreeveError(detail).detail == detail, "what a peer makes of it on arrival is what was sent"


def test_a_missing_key_and_a_forbidden_key_look_alike() -> None:
    assert KeyNotFound().detail == "no such key, or no grant for this caller"
