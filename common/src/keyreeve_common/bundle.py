"""Bundles: the X.509 authorities of one trust domain, always together with its name (TB-08), as JWKS, PEM and proto.

Parsing is strict about what is ours to say and lenient where the specification wants it: unknown key types, unknown uses and entries without
`x5c` are ignored. An empty bundle is valid and means that nothing is trusted (TB-01).
Spec: Trust Domain and Bundle 4; X509-SVID 6.2 (rules TB-01 to TB-09, X5-20 to X5-24).
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from keyreeve_common.errors import InvalidRequest
from keyreeve_common.identity import TrustDomain
from keyreeve_common.v1 import types_pb2
from keyreeve_common.x509_svid import UNREADABLE

DEFAULT_REFRESH = timedelta(minutes=5)  # TB-09
X509_USE = "x509-svid"
MAX_SEQUENCE = 2**63 - 1
MAX_BUNDLE_BYTES = 4 * 1024 * 1024
_CURVES = {"secp256r1": "P-256", "secp384r1": "P-384"}
_KEY_TYPES = ("EC", "RSA", "OKP")


@dataclass(frozen=True, slots=True)
class Bundle:
    """`sequence` grows with every change of the content; `refresh_hint` is None where the producer gave none.

    Raises: InvalidRequest when an authority is no CA certificate or stands there twice.
    """

    trust_domain: TrustDomain
    authorities: tuple[x509.Certificate, ...]
    sequence: int = 0
    refresh_hint: timedelta | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sequence <= MAX_SEQUENCE:
            raise InvalidRequest("TB-02 sequence of a bundle is not a whole number of 64 bits")
        if self.refresh_hint is not None and self.refresh_hint < timedelta(0):
            raise InvalidRequest("TB-03 refresh hint of a bundle is negative")
        if len(set(self.authorities)) != len(self.authorities):
            raise InvalidRequest("bundle holds an authority twice")
        for authority in self.authorities:
            _check_authority(authority)

    @property
    def refresh_interval(self) -> timedelta:
        """How long to wait before the next look; TB-09 where there is no hint."""
        return self.refresh_hint or DEFAULT_REFRESH

    def to_pem(self) -> bytes:
        return b"".join(authority.public_bytes(Encoding.PEM) for authority in self.authorities)

    def to_jwks(self) -> str:
        """The SPIFFE bundle document."""
        document: dict[str, Any] = {
            "keys": [_jwk(authority) for authority in self.authorities],
            "spiffe_sequence": self.sequence,
        }
        if self.refresh_hint is not None:
            document["spiffe_refresh_hint"] = int(self.refresh_hint.total_seconds())
        return json.dumps(document, indent=1)

    def to_proto(self) -> types_pb2.Bundle:
        message = types_pb2.Bundle(
            trust_domain=self.trust_domain.name,
            x509_authorities_der=[authority.public_bytes(Encoding.DER) for authority in self.authorities],
            sequence=self.sequence,
        )
        if self.refresh_hint is not None:
            message.refresh_hint.FromTimedelta(self.refresh_hint)
        return message

    def is_newer_than(self, other: Bundle) -> bool:
        return self.sequence > other.sequence


def _check_authority(certificate: x509.Certificate) -> None:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, *UNREADABLE):
        raise InvalidRequest("X5-08 authority of a bundle is not a CA certificate") from None
    if not constraints.ca:
        raise InvalidRequest("X5-08 authority of a bundle is not a CA certificate")


def parse_bundle_pem(pem: bytes, trust_domain: TrustDomain) -> Bundle:
    """Raises: InvalidRequest. An empty file is refused: nobody writes one on purpose."""
    try:
        return Bundle(trust_domain, tuple(x509.load_pem_x509_certificates(pem)))
    except UNREADABLE:
        raise InvalidRequest("bundle holds no PEM certificate, or is cut short") from None


def bundle_from_proto(message: types_pb2.Bundle) -> Bundle:
    """Raises: InvalidRequest."""
    return Bundle(
        TrustDomain(message.trust_domain),
        tuple(_load_der(der) for der in message.x509_authorities_der),
        message.sequence,
        message.refresh_hint.ToTimedelta() if message.HasField("refresh_hint") else None,
    )


def parse_bundle_jwks(document: str | bytes, trust_domain: TrustDomain) -> Bundle:
    """The bundle of `trust_domain`, a name that the caller knows from elsewhere (TB-08). Raises: InvalidRequest."""
    if len(document) > MAX_BUNDLE_BYTES:
        raise InvalidRequest(f"bundle is longer than {MAX_BUNDLE_BYTES} bytes")
    try:
        value = json.loads(document, object_pairs_hook=_distinct)
    except (ValueError, RecursionError):
        raise InvalidRequest("TB-01 bundle is not JSON, or names a member twice") from None
    keys = value.get("keys") if isinstance(value, dict) else None
    if not isinstance(keys, list):
        raise InvalidRequest("TB-01 bundle is not a JWK Set with 'keys'")
    sequence = _whole(value, "spiffe_sequence", "TB-02")
    hint = _whole(value, "spiffe_refresh_hint", "TB-03")
    authorities = tuple(dict.fromkeys(der for der in map(_authority_der, keys) if der is not None))
    return Bundle(
        trust_domain,
        tuple(_load_der(der) for der in authorities),
        sequence or 0,
        None if hint is None else timedelta(seconds=hint),
    )


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member stands there twice")
    return members


def _whole(document: dict[str, Any], name: str, rule: str) -> int | None:
    if name not in document:
        return None
    value = document[name]
    if type(value) is not int or not 0 <= value <= MAX_SEQUENCE:
        raise InvalidRequest(f"{rule} {name} is not a whole number")
    return value


def _authority_der(jwk: Any) -> bytes | None:
    """The certificate of one entry; None where the entry is to be ignored (TB-05, TB-06, X5-23)."""
    if not isinstance(jwk, dict):
        raise InvalidRequest("TB-01 entry of a bundle is not an object")
    if jwk.get("kty") not in _KEY_TYPES or jwk.get("use") != X509_USE:
        return None
    chain = jwk.get("x5c")
    if not isinstance(chain, list) or not chain:
        return None
    first = chain[0]  # X5-24
    if not isinstance(first, str):
        raise InvalidRequest("X5-22 x5c holds something that is not a string")
    try:
        return base64.b64decode(first, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("X5-22 x5c is not base64") from None


def _load_der(der: bytes) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(der)
    except UNREADABLE:
        raise InvalidRequest("X5-22 authority of a bundle is not a DER certificate") from None


def _jwk(authority: x509.Certificate) -> dict[str, Any]:
    """No `kid` (X5-21), exactly one `x5c` (X5-22), nothing undefined (TB-07)."""
    return {
        "use": X509_USE,
        **_key_members(authority),
        "x5c": [base64.b64encode(authority.public_bytes(Encoding.DER)).decode("ascii")],
    }


def _key_members(authority: x509.Certificate) -> dict[str, str]:
    """Spec: RFC 7518 6.2 and 6.3; RFC 8037 2."""
    key = authority.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        numbers, size = key.public_numbers(), (key.key_size + 7) // 8
        return {"kty": "EC", "crv": _CURVES[key.curve.name], "x": _b64(numbers.x, size), "y": _b64(numbers.y, size)}
    if isinstance(key, rsa.RSAPublicKey):
        rsa_numbers = key.public_numbers()
        return {"kty": "RSA", "n": _b64(rsa_numbers.n), "e": _b64(rsa_numbers.e)}
    if isinstance(key, ed25519.Ed25519PublicKey):
        return {"kty": "OKP", "crv": "Ed25519", "x": _b64(int.from_bytes(key.public_bytes_raw(), "big"), 32)}
    raise InvalidRequest("authority has a key of a kind that a bundle of ours cannot hold")


def _b64(number: int, size: int | None = None) -> str:
    length = size or (number.bit_length() + 7) // 8
    return base64.urlsafe_b64encode(number.to_bytes(length, "big")).rstrip(b"=").decode("ascii")
