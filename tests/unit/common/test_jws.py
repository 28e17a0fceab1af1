"""JWS: the algorithm of each scheme, and ECDSA signatures with r and s side by side. Spec: RFC 7518 3.1, 3.4."""

from __future__ import annotations

import base64
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import InvalidRequest, SchemeNotSupported
from keyreeve_common.jws import JWS_ALGORITHMS, build_jwt, build_jwt_signing_input, jws_algorithm, jws_signature
from keyreeve_common.schemes import SignatureScheme

P256, P384 = SignatureScheme.ECDSA_SECP256R1_SHA256, SignatureScheme.ECDSA_SECP384R1_SHA384


def test_every_scheme_but_ed25519_has_an_algorithm_of_its_own() -> None:
    assert set(JWS_ALGORITHMS) == set(SignatureScheme) - {SignatureScheme.ED25519}
    assert len(set(JWS_ALGORITHMS.values())) == len(JWS_ALGORITHMS)
    with pytest.raises(SchemeNotSupported):
        jws_algorithm(SignatureScheme.ED25519)


@given(st.integers(1, 2**256 - 1), st.integers(1, 2**256 - 1))
def test_r_and_s_have_the_length_of_the_order(r: int, s: int) -> None:
    der = encode_dss_signature(r, s)
    assert jws_signature(P256, der) == r.to_bytes(32, "big") + s.to_bytes(32, "big")
    assert len(jws_signature(P384, der)) == 96


def test_what_is_no_signature_is_refused() -> None:
    for wrong in (b"", b"0", bytes(64), encode_dss_signature(2**256, 1)):
        with pytest.raises(InvalidRequest):
            jws_signature(P256, wrong)
    assert jws_signature(SignatureScheme.RSA_PKCS1_SHA256, b"as it is") == b"as it is"


def test_a_token_is_three_parts_without_padding() -> None:
    message = build_jwt_signing_input(P256, "k-1", {"sub": "spiffe://a.test/b"})
    token = build_jwt(P256, message, encode_dss_signature(1, 2))
    header, claims, signature = (base64.urlsafe_b64decode(part + "==") for part in token.split("."))
    assert json.loads(header) == {"alg": "ES256", "kid": "k-1", "typ": "JWT"}
    assert json.loads(claims) == {"sub": "spiffe://a.test/b"}
    assert signature == bytes(31) + b"\x01" + bytes(31) + b"\x02"
    assert "=" not in token
