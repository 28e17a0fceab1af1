"""The ephemeral key of a TLS 1.2 handshake, ECDHE with a named curve and nothing else: in the server's parameters and in the client's answer.

Spec: RFC 8422 5.4, 5.7; RFC 7748 5 (X25519 and X448 take any string of their length).
"""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import ec

from keyreeve_keyserver.domain.purposes.tls_reader import TlsReader

NAMED_CURVE = 3
POINT_BYTES = {0x0017: 65, 0x0018: 97, 0x0019: 133, 0x001D: 32, 0x001E: 56}
_CURVES: dict[int, ec.EllipticCurve] = {0x0017: ec.SECP256R1(), 0x0018: ec.SECP384R1(), 0x0019: ec.SECP521R1()}


def read_server_params(reader: TlsReader) -> int:
    """Reads ServerECDHParams; the curve. Raises: PurposeMismatch."""
    kind = reader.number(1, "curve type")
    reader.require(kind == NAMED_CURVE, f"curve type is {kind}, only 3 (named_curve) is signed")
    curve = reader.number(2, "named curve")
    reader.require(curve in POINT_BYTES, f"named curve 0x{curve:04x} is not one that Keyreeve admits")
    read_point(reader, curve)
    return curve


def read_point(reader: TlsReader, curve: int) -> None:
    """Reads an ECPoint that lies on this curve. Raises: PurposeMismatch."""
    length = reader.number(1, "length of the point")
    expected = POINT_BYTES[curve]
    reader.require(length == expected, f"the point has {length} bytes, one of curve 0x{curve:04x} has {expected}")
    point = reader.take(length, "point")
    form = _CURVES.get(curve)
    if form is None:
        return
    reader.require(point[0] == 4, "the point is not in uncompressed form")
    try:
        ec.EllipticCurvePublicKey.from_encoded_point(form, point)
    except ValueError:
        raise reader.refuse("the point does not lie on its curve") from None
