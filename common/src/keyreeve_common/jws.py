"""JSON Web Signatures as Keyreeve makes them: which algorithm a signature scheme is, the signing input, and the form that a signature has there.

The key cluster gives ECDSA signatures as DER, for TLS and X.509; JWS has r and s side by side. Whoever asked for the signature converts it.
Spec: RFC 7515 3.1, 5.1; RFC 7518 3.1, 3.4; JWT-SVID 2 (no EdDSA there).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from keyreeve_common.errors import InvalidRequest, SchemeNotSupported
from keyreeve_common.schemes import KeyFamily, SignatureScheme

JWS_ALGORITHMS: dict[SignatureScheme, str] = {
    SignatureScheme.RSA_PKCS1_SHA256: "RS256",
    SignatureScheme.RSA_PKCS1_SHA384: "RS384",
    SignatureScheme.RSA_PKCS1_SHA512: "RS512",
    SignatureScheme.ECDSA_SECP256R1_SHA256: "ES256",
    SignatureScheme.ECDSA_SECP384R1_SHA384: "ES384",
    SignatureScheme.RSA_PSS_RSAE_SHA256: "PS256",
    SignatureScheme.RSA_PSS_RSAE_SHA384: "PS384",
    SignatureScheme.RSA_PSS_RSAE_SHA512: "PS512",
}
_COORDINATE_BYTES = {KeyFamily.EC_P256: 32, KeyFamily.EC_P384: 48}


def jws_algorithm(scheme: SignatureScheme) -> str:
    """The `alg` of this scheme. Raises: SchemeNotSupported."""
    if scheme not in JWS_ALGORITHMS:
        raise SchemeNotSupported(f"scheme {scheme.iana_name} is not one of JWT-SVIDs")
    return JWS_ALGORITHMS[scheme]


def build_jwt_signing_input(scheme: SignatureScheme, key_id: str, claims: Mapping[str, Any]) -> bytes:
    """`BASE64URL(header) . BASE64URL(claims)` with the header of a JWT-SVID, whose `kid` is the key's id. Raises: SchemeNotSupported."""
    header = {"alg": jws_algorithm(scheme), "kid": key_id, "typ": "JWT"}
    return _base64url(_compact(header)) + b"." + _base64url(_compact(claims))


def build_jwt(scheme: SignatureScheme, signing_input: bytes, signature: bytes) -> str:
    """The compact serialization, of a signature as the key cluster gives it. Raises: InvalidRequest."""
    return (signing_input + b"." + _base64url(jws_signature(scheme, signature))).decode("ascii")


def jws_signature(scheme: SignatureScheme, signature: bytes) -> bytes:
    """ECDSA's DER becomes r || s, each as long as the curve's order; RSA signatures are the same in both. Raises: InvalidRequest."""
    half = _COORDINATE_BYTES.get(scheme.facts.family)
    if half is None:
        return signature
    try:
        r, s = decode_dss_signature(signature)
        return r.to_bytes(half, "big") + s.to_bytes(half, "big")
    except (ValueError, OverflowError):
        raise InvalidRequest("signature is not the DER of an ECDSA signature on this curve") from None


def _compact(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
