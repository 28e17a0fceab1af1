"""TLS 1.2's two forms: what is accepted passes a check written apart from the parsers, and no message has both."""

from __future__ import annotations

import re
import sys

from cryptography.hazmat.primitives.asymmetric import ec
from harness import main
from keyreeve_common.errors import PurposeMismatch
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import SignatureScheme
from keyreeve_keyserver.domain.purposes.tls12_client_verify import check_tls12_client_verify
from keyreeve_keyserver.domain.purposes.tls12_server_key_exchange import check_server_key_exchange
from keyreeve_testing.tbs import handshake_record
from keyreeve_testing.tls12 import CURVES, OWN_CERTIFICATE

_RECORD = handshake_record(Purpose.TLS12_SERVER_KEY_EXCHANGE, Purpose.TLS12_CLIENT_VERIFY)
_EXCHANGE = re.compile(
    rb"[\x00-\xff]{64}\x03\x00(?:\x17\x41\x04.{64}|\x18\x61\x04.{96}|\x19\x85\x04.{132}|\x1d\x20.{32}|\x1e\x38.{56})",
    re.DOTALL,
)
_ORDERS = (bytes((1, 2, 11, 12, 13, 14, 11, 16)), bytes((1, 2, 11, 22, 12, 13, 14, 11, 16)))


def target(data: bytes) -> str:
    exchange = _word("exchange", data, is_exchange)
    verify = _word("transcript", data, is_transcript)
    if "accepted" in exchange and "accepted" in verify:
        raise AssertionError("one message has both forms")
    return f"{exchange} / {verify}"


def _word(name: str, data: bytes, recheck: object) -> str:
    try:
        if name == "exchange":
            check_server_key_exchange(data)
        else:
            check_tls12_client_verify(data, _RECORD, SignatureScheme.ECDSA_SECP256R1_SHA256)
    except PurposeMismatch as error:
        if name == "exchange" and is_exchange(data):
            raise AssertionError("refused a key exchange that has the form") from error
        return error.detail[:70]
    if not recheck(data):  # type: ignore[operator]  # one of the two functions below
        raise AssertionError(f"accepted what is no {name}")
    return f"{name} accepted"


def is_exchange(data: bytes) -> bool:
    if _EXCHANGE.fullmatch(data) is None:
        return False
    curve = CURVES.get(int.from_bytes(data[65:67], "big"))
    return curve is None or _is_on(curve, data[68:])


def _is_on(curve: ec.EllipticCurve, point: bytes) -> bool:
    half = (len(point) - 1) // 2
    x, y = (int.from_bytes(point[at : at + half], "big") for at in (1, 1 + half))
    try:
        ec.EllipticCurvePublicNumbers(x, y, curve).public_key()
    except ValueError:
        return False
    return True


def is_transcript(data: bytes) -> bool:
    kinds, at, bodies = bytearray(), 0, []
    while at < len(data):
        length = int.from_bytes(data[at + 1 : at + 4], "big")
        kinds.append(data[at])
        bodies.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    own = bodies[-2]
    return at == len(data) and bytes(kinds) in _ORDERS and bodies[0][:2] == b"\x03\x03" and _names_our_key(own)


def _names_our_key(certificates: bytes) -> bool:
    """The public key of the one certificate that the seeds hold stands in what is accepted."""
    at = OWN_CERTIFICATE.index(b"\x03\x42\x00\x04")
    return OWN_CERTIFICATE[at : at + 68] in certificates


if __name__ == "__main__":
    sys.exit(main(target, "tls12"))
