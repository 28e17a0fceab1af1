"""TLS 1.2's two forms: what the server signs over its ECDHE key, and what the client signs over the whole handshake."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import PurposeMismatch, PurposeNotPermitted
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.schemes import SignatureScheme
from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_keyserver.domain.purposes import check_request
from keyreeve_testing import tls12
from keyreeve_testing.tbs import (
    AUTHORITY_KEY,
    LEAF,
    LEAF_KEY,
    NOW,
    authority_record,
    certification_request_info,
    handshake_record,
)
from keyreeve_testing.tls12 import Transcript, changed, handshake, hello, join, key_exchange, vector

P256 = SignatureScheme.ECDSA_SECP256R1_SHA256
EXCHANGE, VERIFY = Purpose.TLS12_SERVER_KEY_EXCHANGE, Purpose.TLS12_CLIENT_VERIFY
EVERY = handshake_record(
    EXCHANGE, VERIFY, Purpose.TLS13_SERVER_VERIFY, Purpose.TLS13_CLIENT_VERIFY, Purpose.CERTIFICATE_REQUEST
)
GOOD = Transcript()
TOTALS = {0x0017: 133, 0x0018: 165, 0x0019: 201, 0x001D: 100, 0x001E: 124}


def judge(message: bytes, purpose: Purpose, record: KeyRecord = EVERY, scheme: SignatureScheme = P256) -> None:
    check_request(message, record, purpose=purpose, scheme=scheme, now=NOW)


def refused(message: bytes, purpose: Purpose, rule: str) -> None:
    with pytest.raises(PurposeMismatch, match=rule):
        judge(message, purpose)


# ServerKeyExchange


@pytest.mark.parametrize(("curve", "total"), TOTALS.items())
def test_each_curve_has_its_exact_form(curve: int, total: int) -> None:
    message = key_exchange(curve)
    assert len(message) == total
    judge(message, EXCHANGE)
    refused(message[:-1], EXCHANGE, "point is cut short")
    refused(message + b"\x00", EXCHANGE, "1 bytes too many")


def test_server_key_exchange_is_opt_in() -> None:
    with pytest.raises(PurposeNotPermitted, match="key was not created for tls12_server_key_exchange"):
        judge(key_exchange(), EXCHANGE, handshake_record())
    with pytest.raises(PurposeNotPermitted, match="key was not created for tls12_client_verify"):
        judge(GOOD.to_bytes(), VERIFY, handshake_record())
    with pytest.raises(PurposeNotPermitted, match="authority never signs for tls12_server_key_exchange"):
        judge(key_exchange(), EXCHANGE, authority_record())


def params(kind: int, rest: bytes) -> bytes:
    return tls12.RANDOMS + bytes((kind,)) + rest


OFF_CURVE = bytearray(tls12.point(0x0017))
OFF_CURVE[-1] ^= 1
COMPRESSED = (
    ec.derive_private_key(5, ec.SECP256R1()).public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
)
WRONG_EXCHANGES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "client_random is cut short"),
    "randoms alone": (bytes(64), "curve type is cut short"),
    "explicit prime curve": (params(1, bytes(80)), "curve type is 1, only 3"),
    "explicit char2 curve": (params(2, bytes(80)), "curve type is 2, only 3"),
    "finite-field DHE": (params(0, b"\x80" + bytes(128) + b"\x00\x01\x02\x00\x80" + bytes(128)), "curve type is 0"),
    "unknown curve": (params(3, b"\x00\x16" + vector(1, bytes(65))), "named curve 0x0016 is not one"),
    "brainpool": (params(3, b"\x00\x1a" + vector(1, bytes(65))), "named curve 0x001a is not one"),
    "length of another curve": (params(3, b"\x00\x18" + vector(1, tls12.point(0x0017))), "has 65 bytes, one of curve"),
    "compressed": (params(3, b"\x00\x17" + vector(1, COMPRESSED)), "has 33 bytes, one of curve 0x0017 has 65"),
    "hybrid": (params(3, b"\x00\x17" + vector(1, b"\x06" + tls12.point(0x17)[1:])), "not in uncompressed form"),
    "off the curve": (params(3, b"\x00\x17" + vector(1, bytes(OFF_CURVE))), "does not lie on its curve"),
    "infinity": (params(3, b"\x00\x17" + vector(1, b"\x04" + bytes(64))), "does not lie on its curve"),
    "TLS 1.3, server": (build_tls13_content(Purpose.TLS13_SERVER_VERIFY, bytes(32)), "curve type is 84"),
    "TLS 1.3, client": (build_tls13_content(Purpose.TLS13_CLIENT_VERIFY, bytes(48)), "curve type is 84"),
    "delegated credential": (b" " * 64 + b"TLS, server delegated credentials\x00" + bytes(60), "curve type is 84"),
    "transcript": (GOOD.to_bytes(), "message: "),
    "TBSCertificate": (LEAF.tbs(), "message: "),
    "request": (certification_request_info(LEAF_KEY), "message: "),
    "MD5 and SHA-1": (bytes(36), "server_random is cut short"),
    **{f"digest of {size}": (bytes(size), "is cut short") for size in (20, 28, 32, 48, 64)},
}


@pytest.mark.parametrize("name", WRONG_EXCHANGES)
def test_what_is_no_server_key_exchange_is_refused(name: str) -> None:
    message, rule = WRONG_EXCHANGES[name]
    refused(message, EXCHANGE, rule)


@given(st.sampled_from(sorted(TOTALS)), st.binary(min_size=64, max_size=64), st.integers(1, 2**200))
def test_any_randoms_and_any_point_pass(curve: int, randoms: bytes, scalar: int) -> None:
    share = None if curve in tls12.STRINGS else tls12.point(curve, scalar)
    judge(key_exchange(curve, randoms=randoms, share=share), EXCHANGE, handshake_record(EXCHANGE))


@given(st.sampled_from(sorted(TOTALS)), st.data())
def test_one_changed_byte_outside_the_randoms_is_refused(curve: int, data: st.DataObject) -> None:
    """X25519 and X448 take any string as a point, so there the point is free as well."""
    message = bytearray(key_exchange(curve))
    at = data.draw(st.integers(64, 67 if curve in tls12.STRINGS else len(message) - 1))
    message[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(PurposeMismatch):
        judge(bytes(message), EXCHANGE)


# A second form


def test_a_request_that_reads_as_a_key_exchange_is_refused_where_the_key_has_both() -> None:
    """Possible with Ed25519, whose SPKI is short: the attributes of a request hold a curve and a point where the other form has them."""
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from keyreeve_common.schemes import KeyType
    from keyreeve_keyserver.domain.der import INTEGER, OCTET_STRING, OID, SEQUENCE, SET, encode
    from keyreeve_testing.tbs import spki

    key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))
    share = b"\x03\x00\x1e" + vector(1, bytes(56))
    # version, empty name, SPKI of 44 bytes; then an attribute with an OCTET STRING that ends where the message ends.
    head = encode(INTEGER, b"\x00") + encode(SEQUENCE) + spki(key)
    for padding in range(64):
        for oid in (bytes.fromhex("2a0304"), bytes.fromhex("2a03")):
            value = encode(SET, encode(OCTET_STRING, bytes(padding) + share))
            message = encode(SEQUENCE, head, encode(0xA0, encode(SEQUENCE, encode(OID, oid), value)))
            if len(message) == TOTALS[0x1E] and message[64:].startswith(b"\x03\x00\x1e"):
                break
        else:
            continue
        break
    else:
        pytest.fail("no message of both forms was made")
    scheme = SignatureScheme.ED25519

    def record(*purposes: Purpose) -> KeyRecord:
        return handshake_record(*purposes, key=key, key_type=KeyType.ED25519)

    for purpose, other in ((EXCHANGE, Purpose.CERTIFICATE_REQUEST), (Purpose.CERTIFICATE_REQUEST, EXCHANGE)):
        judge(message, purpose, record(purpose), scheme)
        with pytest.raises(
            PurposeMismatch, match=f"{purpose.label}: the message has the form of {other.label} as well"
        ):
            judge(message, purpose, record(purpose, other), scheme)


# The client's transcript


TLS13_HELLO = hello(tail=b"\x13\x01\x00", extensions=tls12.extension(43, b"\x03\x04"))
OTHER_LEAF = replace(LEAF, key=AUTHORITY_KEY).certificate().public_bytes(Encoding.DER)
POINT_AT = tls12.OWN_CERTIFICATE.index(b"\x03\x42\x00\x04") + 3
HYBRID = bytes((6 + tls12.OWN_CERTIFICATE[POINT_AT + 64] % 2,))
HYBRID_CERTIFICATE = tls12.OWN_CERTIFICATE[:POINT_AT] + HYBRID + tls12.OWN_CERTIFICATE[POINT_AT + 1 :]
WRONG_TRANSCRIPTS: dict[str, tuple[Transcript, str]] = {
    "TLS 1.1": (
        changed(GOOD, client_hello=hello(version=0x0302, tail=b"\x00\x02\xc0\x2b\x01\x00", extensions=None)),
        "ClientHello: version",
    ),
    "server of TLS 1.0": (
        changed(GOOD, server_hello=hello(version=0x0301, tail=b"\xc0\x2b\x00", extensions=None)),
        "ServerHello: version",
    ),
    "server of TLS 1.3": (changed(GOOD, server_hello=TLS13_HELLO), "supported_versions says"),
    "long session id": (
        changed(GOOD, server_hello=hello(session=bytes(33), tail=b"\xc0\x2b\x00", extensions=None)),
        "session id has 33",
    ),
    "odd cipher suites": (
        changed(GOOD, client_hello=hello(tail=b"\x00\x03\xc0\x2b\xc0\x01\x00", extensions=None)),
        "suites are cut short",
    ),
    "no cipher suite": (
        changed(GOOD, client_hello=hello(tail=b"\x00\x00\x01\x00", extensions=None)),
        "cipher suites has 0 bytes",
    ),
    "no null compression": (
        changed(GOOD, client_hello=hello(tail=b"\x00\x02\xc0\x2b\x01\x01", extensions=None)),
        "lack null",
    ),
    "compressed": (
        changed(GOOD, server_hello=hello(tail=b"\xc0\x2b\x01", extensions=None)),
        "compression method is not null",
    ),
    "an extension twice": (
        changed(GOOD, server_hello=hello(tail=b"\xc0\x2b\x00", extensions=tls12.extension(23) * 2)),
        "extension 23 stands there twice",
    ),
    "hello with a tail": (changed(GOOD, client_hello=GOOD.client_hello + b"\x00"), "ClientHello: 1 bytes too many"),
    "no server certificate": (changed(GOOD, server_certificate=vector(3, b"")), "holds 0 certificates"),
    "empty server certificate": (changed(GOOD, server_certificate=tls12.certificates(b"")), "certificate has 0 bytes"),
    "seventeen certificates": (
        changed(GOOD, server_certificate=tls12.certificates(*[b"c"] * 17)),
        "holds 17 certificates",
    ),
    "foreign status": (changed(GOOD, status=b"\x02" + vector(3, b"x")), "not of type ocsp"),
    "DHE": (changed(GOOD, server_key_exchange=vector(2, bytes(128)) * 3), "curve type is 0"),
    "point off the curve": (
        changed(
            GOOD, server_key_exchange=b"\x03\x00\x17" + vector(1, bytes(OFF_CURVE)) + b"\x04\x03" + vector(2, b"s")
        ),
        "not lie on its curve",
    ),
    "no signature": (
        changed(GOOD, server_key_exchange=tls12.server_params(0x17) + b"\x04\x03\x00\x00"),
        "signature has 0 bytes",
    ),
    "scheme not asked for": (
        changed(GOOD, schemes=(SignatureScheme.RSA_PKCS1_SHA256,)),
        "did not ask for ecdsa_secp256r1_sha256",
    ),
    "no scheme": (changed(GOOD, schemes=()), "signature algorithms has 0 bytes"),
    "request cut": (
        changed(GOOD, certificate_request=b"\x01\x40\x00\x03\x04\x03\x04\x00\x00"),
        "algorithms are cut short",
    ),
    "empty name of an authority": (changed(GOOD, authorities=vector(2, b"")), "distinguished name has 0 bytes"),
    "done with a body": (changed(GOOD, done=b"x"), "ServerHelloDone: 1 bytes too many"),
    "no own certificate": (changed(GOOD, own_certificate=vector(3, b"")), "holds 0 certificates"),
    "own certificate is none": (changed(GOOD, own_certificate=tls12.certificates(b"0\x00")), "cannot be read"),
    "own certificate of another key": (
        changed(GOOD, own_certificate=tls12.certificates(OTHER_LEAF)),
        "is not for this key",
    ),
    "own key in hybrid form": (
        changed(GOOD, own_certificate=tls12.certificates(HYBRID_CERTIFICATE)),
        "spells its key otherwise",
    ),
    "RSA key transport": (changed(GOOD, client_key_exchange=vector(2, bytes(256))), "the point has 1 bytes"),
    "share of another curve": (
        changed(GOOD, client_key_exchange=vector(1, tls12.point(0x18))),
        "the point has 97 bytes",
    ),
    "share with a tail": (
        changed(GOOD, client_key_exchange=vector(1, tls12.point(0x17)) + b"x"),
        "ClientKeyExchange: 1 bytes",
    ),
}


@pytest.mark.parametrize(
    "transcript",
    [
        GOOD,
        changed(GOOD, status=b"\x01" + vector(3, b"OCSP response")),
        changed(GOOD, authorities=b""),
        changed(GOOD, curve=0x001D),
        changed(GOOD, curve=0x0018),
        changed(GOOD, own_certificate=tls12.certificates(tls12.OWN_CERTIFICATE, b"intermediate")),
        changed(GOOD, server_hello=hello(tail=b"\xc0\x2b\x00", session=b"", extensions=None)),
    ],
    ids=["plain", "status", "no authorities", "x25519", "secp384r1", "chain", "bare"],
)
def test_transcripts_pass(transcript: Transcript) -> None:
    judge(transcript.to_bytes(), VERIFY)


@pytest.mark.parametrize("name", WRONG_TRANSCRIPTS)
def test_wrong_transcripts_are_refused(name: str) -> None:
    transcript, rule = WRONG_TRANSCRIPTS[name]
    refused(transcript.to_bytes(), VERIFY, f"tls12_client_verify: .*{rule}")


@pytest.mark.parametrize("at", range(8))
def test_no_message_may_be_missing_doubled_or_elsewhere(at: int) -> None:
    messages = GOOD.messages()
    refused(join(messages[:at] + messages[at + 1 :]), VERIFY, "tls12_client_verify")
    refused(join([*messages[: at + 1], messages[at], *messages[at + 1 :]]), VERIFY, "tls12_client_verify")
    for other in range(at):
        swapped = messages[:]
        swapped[at], swapped[other] = swapped[other], swapped[at]
        if swapped != messages:
            refused(join(swapped), VERIFY, "tls12_client_verify")


def test_what_comes_after_the_client_key_exchange_is_refused() -> None:
    refused(GOOD.to_bytes() + handshake(15, b"\x04\x03\x00\x01s"), VERIFY, "bytes too many")
    refused(GOOD.to_bytes() + handshake(20, bytes(12)), VERIFY, "bytes too many")
    refused(handshake(0, b"") + GOOD.to_bytes(), VERIFY, "message of type 0 stands where ClientHello is due")


def test_every_prefix_is_refused() -> None:
    message = GOOD.to_bytes()
    for end in range(len(message)):
        refused(message[:end], VERIFY, "tls12_client_verify")


def test_other_forms_are_no_transcript() -> None:
    for message in (
        key_exchange(),
        key_exchange(randoms=b"\x01\x00\x00\x7d" + bytes(60)),
        build_tls13_content(Purpose.TLS13_CLIENT_VERIFY, bytes(32)),
        LEAF.tbs(),
        certification_request_info(LEAF_KEY),
        *map(bytes, (20, 32, 36, 48, 64)),
    ):
        refused(message, VERIFY, "tls12_client_verify")


@given(st.data())
def test_lengths_and_order_bear_no_change(data: st.DataObject) -> None:
    """A changed byte passes only inside a field that is the peer's to fill: randoms, names, certificates and signatures of others."""
    message = bytearray(GOOD.to_bytes())
    at = data.draw(st.integers(0, len(message) - 1))
    message[at] ^= data.draw(st.integers(1, 255))
    try:
        judge(bytes(message), VERIFY)
    except PurposeMismatch:
        return
    assert at in FREE


def _free() -> set[int]:
    message = GOOD.to_bytes()
    free: set[int] = set()
    for field in (
        bytes(32),  # random
        b"s" * 32,  # session id
        b"\xc0\x2b",  # cipher suites, offered and chosen
        vector(2, tls12.extension(23)),
        tls12.extension(23) + tls12.extension(13, b"\x00\x02\x04\x03"),
        b"server certificate",
        b"intermediate",
        b"\x04\x03\x00\x09signature",
        b"\x40\x01",
        b"\x08\x04",
        b"\x30\x00",
        tls12.OWN_CERTIFICATE,
    ):
        at = message.find(field)
        while at >= 0:
            free.update(range(at, at + len(field)))
            at = message.find(field, at + 1)
    return free


FREE = _free()
