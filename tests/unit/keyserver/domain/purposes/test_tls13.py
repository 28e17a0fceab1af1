"""TLS 1.3 CertificateVerify: the two forms pass, and every line of the refuse list (keyless-tls.md 2.4) does not."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import (
    KeyreeveError,
    MessageTooLarge,
    PurposeMismatch,
    PurposeNotPermitted,
    SchemeNotSupported,
)
from keyreeve_common.purposes import PURPOSES_OF_ROLE, Purpose, build_tls13_content
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_keyserver.domain.purposes import FORMS, check_length, check_request
from keyreeve_testing.tbs import (
    LEAF,
    LEAF_KEY,
    NOW,
    authority_record,
    certification_request_info,
    handshake_record,
)

SERVER, CLIENT = Purpose.TLS13_SERVER_VERIFY, Purpose.TLS13_CLIENT_VERIFY
P256 = SignatureScheme.ECDSA_SECP256R1_SHA256
PAD, CONTEXT = b"\x20" * 64, b"TLS 1.3, server CertificateVerify"


def judge(message: bytes, purpose: int = SERVER, scheme: int = P256) -> SignatureScheme:
    return check_request(message, handshake_record(), purpose=purpose, scheme=scheme, now=NOW)


@pytest.mark.parametrize("purpose", [SERVER, CLIENT])
@pytest.mark.parametrize("length", [32, 48])
def test_both_forms_pass_with_either_hash(purpose: Purpose, length: int) -> None:
    assert judge(build_tls13_content(purpose, b"\xaa" * length), purpose) is P256


def test_lengths_are_those_of_the_reference() -> None:
    assert [len(build_tls13_content(SERVER, bytes(n))) for n in (32, 48)] == [130, 146]


REFUSED = {
    **{f"digest of {n} bytes": bytes(range(n)) for n in (20, 28, 32, 36, 48, 64)},
    "empty": b"",
    "63 pad bytes": PAD[1:] + CONTEXT + b"\x00" + bytes(32),
    "63 pad bytes, length made good": PAD[1:] + CONTEXT + b"\x00" + bytes(33),
    "65 pad bytes": PAD + b"\x20" + CONTEXT + b"\x00" + bytes(32),
    "65 pad bytes, length made good": PAD + b"\x20" + CONTEXT + b"\x00" + bytes(31),
    "wrong case": PAD + CONTEXT.replace(b"server", b"Server") + b"\x00" + bytes(32),
    "label of the other role": build_tls13_content(CLIENT, bytes(32)),
    "no zero byte": PAD + CONTEXT + bytes(32),
    "no zero byte, length made good": PAD + CONTEXT + b"\x01" + bytes(32),
    "hash of 31 bytes": PAD + CONTEXT + b"\x00" + bytes(31),
    "hash of 33 bytes": PAD + CONTEXT + b"\x00" + bytes(33),
    "hash of 20 bytes": PAD + CONTEXT + b"\x00" + bytes(20),
    "hash of 64 bytes": PAD + CONTEXT + b"\x00" + bytes(64),
    "trailing byte": build_tls13_content(SERVER, bytes(48)) + b"\x00",
    "delegated credential, server (RFC 9345)": PAD + b"TLS, server delegated credentials" + b"\x00" + bytes(32),
    "delegated credential, client (RFC 9345)": PAD + b"TLS, client delegated credentials" + b"\x00" + bytes(32),
    "exported authenticator (RFC 9261)": PAD + b"Exported Authenticator" + b"\x00" + bytes(43),
    "QUIC server config": b"QUIC CHLO and server config signature\x00" + bytes(93),
    "tabs for spaces": b"\x09" * 64 + CONTEXT + b"\x00" + bytes(32),
    "TLS 1.2 ServerKeyExchange, x25519": bytes(64) + b"\x03\x00\x1d\x20" + bytes(32),
    "TLS 1.2 ServerKeyExchange, P-256": bytes(64) + b"\x03\x00\x17\x41\x04" + bytes(64),
    "TLS 1.2 ServerKeyExchange, x448": bytes(64) + b"\x03\x00\x1e\x38" + bytes(56),
    "TLS 1.2 ServerKeyExchange, explicit curve": bytes(64) + b"\x01" + bytes(65),
    "TLS 1.2 ServerKeyExchange, DHE": bytes(64) + b"\x00\x20" + bytes(64),
    "TLS 1.0 MD5 and SHA-1": bytes(36),
    "TLS 1.2 handshake transcript": b"\x01\x00\x00\x7e" + bytes(126),
    "TBSCertificate": LEAF.tbs(),
    "CSR": certification_request_info(LEAF_KEY),
    "JWS signing input": b"eyJhbGciOiJFUzI1NiJ9." + b"e" * 109,
    "SSH authentication": b"\x00\x00\x00\x20" + bytes(32) + b"\x32" + bytes(93),
}


@pytest.mark.parametrize("message", REFUSED.values(), ids=REFUSED.keys())
def test_refuse_list(message: bytes) -> None:
    assert judge(build_tls13_content(SERVER, bytes(32)))
    with pytest.raises(PurposeMismatch, match=r"^purpose_mismatch: tls13_server_verify: "):
        judge(message)


def test_details_name_the_rule() -> None:
    for message, rule in {
        bytes(131): "message has 131 bytes, the form has 130 or 146",
        bytes(130): "message does not begin with 64 bytes 0x20",
        build_tls13_content(CLIENT, bytes(32)): "context string is not that of tls13_server_verify",
        PAD + CONTEXT + b"\x01" + bytes(32): "no zero byte stands after the context string",
    }.items():
        with pytest.raises(PurposeMismatch, match=rule):
            judge(message)


@given(st.binary(max_size=200) | st.binary(min_size=32, max_size=48).map(lambda tail: PAD + CONTEXT + b"\x00" + tail))
def test_only_the_form_passes(message: bytes) -> None:
    good = message[:98] == PAD + CONTEXT + b"\x00" and len(message) in (130, 146)
    try:
        judge(message)
    except PurposeMismatch:
        assert not good
    else:
        assert good


@given(st.integers(0, 129), st.integers(1, 255))
def test_every_change_of_the_head_is_refused(at: int, change: int) -> None:
    message = bytearray(build_tls13_content(SERVER, bytes(32)))
    message[at] ^= change
    if at >= 98:
        judge(bytes(message))
        return
    with pytest.raises(PurposeMismatch):
        judge(bytes(message))


@pytest.mark.parametrize(
    "scheme",
    [SignatureScheme.RSA_PKCS1_SHA256, SignatureScheme.RSA_PKCS1_SHA384, SignatureScheme.RSA_PKCS1_SHA512],
)
def test_pkcs1_is_not_for_tls13(scheme: SignatureScheme) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa

    record = handshake_record(key=rsa.generate_private_key(65537, 2048), key_type=KeyType.RSA_2048)
    content = build_tls13_content(SERVER, bytes(32))
    pss = SignatureScheme.RSA_PSS_RSAE_SHA256
    assert check_request(content, record, purpose=SERVER, scheme=pss, now=NOW) is pss
    with pytest.raises(SchemeNotSupported, match=r"not one of TLS 1\.3"):
        check_request(content, record, purpose=SERVER, scheme=scheme, now=NOW)


@pytest.mark.parametrize("scheme", [0x0201, 0x0203, 0x0101, 0x0000, 0x0804, 0x0503, 0x0807, 0x0603, 0xFFFF])
def test_schemes_that_do_not_fit_are_refused(scheme: int) -> None:
    with pytest.raises(SchemeNotSupported):
        judge(build_tls13_content(SERVER, bytes(32)), scheme=scheme)


@pytest.mark.parametrize("purpose", [0, 5, 6, 7, 8, 9, 10, 11, 255])
def test_purposes_of_other_keys_are_named(purpose: int) -> None:
    name = Purpose(purpose).label if purpose in range(1, 11) else str(purpose)
    with pytest.raises(PurposeNotPermitted, match=name):
        judge(build_tls13_content(SERVER, bytes(32)), purpose)


def test_roles_are_apart() -> None:
    content = build_tls13_content(SERVER, bytes(32))
    with pytest.raises(PurposeNotPermitted, match="authority never signs for tls13_server_verify"):
        check_request(content, authority_record(), purpose=SERVER, scheme=P256, now=NOW)
    with pytest.raises(PurposeNotPermitted, match="handshake never signs for x509_certificate"):
        judge(LEAF.tbs(), Purpose.X509_CERTIFICATE)
    with pytest.raises(PurposeNotPermitted, match="not created for tls13_server_verify"):
        check_request(content, handshake_record(CLIENT), purpose=SERVER, scheme=P256, now=NOW)


def test_order_of_the_checks() -> None:
    """Purpose before scheme before form, so that a stranger learns the least."""
    with pytest.raises(PurposeNotPermitted):
        judge(b"", Purpose.DIGEST, scheme=0)
    with pytest.raises(SchemeNotSupported):
        judge(b"", SERVER, scheme=0)
    with pytest.raises(PurposeMismatch):
        judge(b"")
    with pytest.raises(MessageTooLarge):
        check_length(bytes(11), 10)
    check_length(bytes(10), 10)


@given(st.binary(max_size=150), st.integers(0, 255), st.integers(0, 0xFFFF))
def test_nothing_else_comes_out(message: bytes, purpose: int, scheme: int) -> None:
    for record in (handshake_record(), authority_record()):
        with suppress(KeyreeveError):
            check_request(message, record, purpose=purpose, scheme=scheme, now=NOW)


def test_table_holds_what_is_offered() -> None:
    assert set(FORMS) == set(Purpose) - {Purpose.UNSPECIFIED}
    assert frozenset().union(*PURPOSES_OF_ROLE.values()) == set(FORMS)
