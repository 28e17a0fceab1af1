"""Mechanisms: one for every scheme and key type, and raw ECDSA signatures agree with their DER."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import Internal, PurposeMismatch, SchemeNotSupported
from keyreeve_common.schemes import KeyType, SignatureScheme

mechanisms = pytest.importorskip("keyreeve_keyserver.backends.pkcs11_mechanisms")

P256 = mechanisms.ways(SignatureScheme.ECDSA_SECP256R1_SHA256, prehashed=False)[0]
# Also those with leading zero bytes, and the highest bit of a byte set.
NUMBERS = st.integers(0, 2**256 - 1) | st.integers(0, 2**20) | st.sampled_from([0, 127, 128, 2**255, 2**256 - 1])


def test_tables_are_complete() -> None:
    assert set(mechanisms.SIGN_MECHANISMS) == set(SignatureScheme)
    assert set(mechanisms.GENERATIONS) == set(KeyType)


def test_pss_salt_is_as_long_as_the_digest() -> None:
    for scheme, length in (("SHA256", 32), ("SHA384", 48), ("SHA512", 64)):
        how = mechanisms.SIGN_MECHANISMS[SignatureScheme[f"RSA_PSS_RSAE_{scheme}"]]
        assert (how.parameter[0].name, how.parameter[1].name, how.parameter[2]) == (scheme, scheme, length)


@given(NUMBERS, NUMBERS)
def test_raw_and_der_agree(r: int, s: int) -> None:
    raw = r.to_bytes(32, "big") + s.to_bytes(32, "big")
    der = P256.signature_of(raw)
    assert decode_dss_signature(der) == (r, s)
    assert der == encode_dss_signature(r, s)


def test_signature_of_another_length_is_refused() -> None:
    for length in (0, 63, 65, 96):
        with pytest.raises(Internal):
            P256.signature_of(bytes(length))


def test_what_a_token_lacks_is_not_offered() -> None:
    every = {how.mechanism for how in mechanisms.SIGN_MECHANISMS.values()}
    every |= {how.mechanism for how in mechanisms.GENERATIONS.values()}
    assert mechanisms.key_types_offered(every) == tuple(KeyType)
    assert mechanisms.key_types_offered(set()) == ()
    without = every - {mechanisms.Mechanism.EDDSA}
    assert KeyType.ED25519 not in mechanisms.key_types_offered(without)
    assert SignatureScheme.ED25519 not in mechanisms.schemes_offered(without)
    assert KeyType.EC_P256 not in mechanisms.key_types_offered(every - {mechanisms.Mechanism.EC_KEY_PAIR_GEN})


def test_digests_go_to_mechanisms_that_hash_nothing() -> None:
    bare = {"ECDSA", "RSA_PKCS", "RSA_PKCS_PSS"}
    for scheme in set(SignatureScheme) - {SignatureScheme.ED25519}:
        how = mechanisms.digest_mechanism(scheme)
        assert how.mechanism.name in bare
        assert how.parameter == mechanisms.SIGN_MECHANISMS[scheme].parameter
    with pytest.raises(SchemeNotSupported):
        mechanisms.digest_mechanism(SignatureScheme.ED25519)


def test_pkcs1_digests_stand_in_a_digest_info() -> None:
    """Spec: RFC 8017 9.2 note 1."""
    for scheme, head in (
        (SignatureScheme.RSA_PKCS1_SHA256, "3031300d060960864801650304020105000420"),
        (SignatureScheme.RSA_PKCS1_SHA384, "3041300d060960864801650304020205000430"),
        (SignatureScheme.RSA_PKCS1_SHA512, "3051300d060960864801650304020305000440"),
    ):
        size = int(head[-2:], 16)
        (way,) = mechanisms.ways(scheme, prehashed=True)
        assert way.input_of(b"d" * size).hex() == head + "64" * size
        for wrong in (0, 20, size - 1, size + 1):
            with pytest.raises(PurposeMismatch):
                way.input_of(bytes(wrong))
    (way,) = mechanisms.ways(SignatureScheme.RSA_PSS_RSAE_SHA256, prehashed=True)
    assert way.input_of(bytes(32)) == bytes(32)


def test_each_scheme_has_a_second_way_and_it_is_offered_by_it() -> None:
    for scheme in SignatureScheme:
        first, second = mechanisms.ways_to_sign(scheme)
        assert first == mechanisms.SIGN_MECHANISMS[scheme]
        assert second != first
        assert scheme in mechanisms.schemes_offered({second.mechanism})


@given(st.binary(min_size=64, max_size=64))
def test_point_comes_out_of_every_wrapping(coordinates: bytes) -> None:
    """A bare point begins with the tag of an OCTET STRING: only its length tells the two apart."""
    point = b"\x04" + coordinates
    for value in (point, b"\x04\x41" + point, b"\x03\x42\x00" + point):
        assert mechanisms._point(value, 65) == point
