"""Writes the vectors that the Python and the C implementations are both held to. Run: uv run python tests/vectors/generate.py"""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keyreeve_common.errors import KeyNotFound, RateLimited
from keyreeve_common.key_id import KeyId
from keyreeve_common.key_reference import KeyReference
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.sign_socket import PingFrame, PongFrame, RefusedFrame, SignedFrame, SignFrame

HERE = Path(__file__).parent


def main() -> None:
    spki = (
        ec.derive_private_key(0x1234567, ec.SECP256R1())
        .public_key()
        .public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    )
    reference = KeyReference(KeyId("k-0123456789abcdef"), "/run/keyreeve/sign.sock", spki)
    _write(
        "key_reference.json",
        {
            "key_id": reference.key_id,
            "socket": reference.socket,
            "spki_der": spki.hex(),
            "der": reference.to_der().hex(),
            "pem": reference.to_pem(),
            "pkcs8_der": reference.to_pkcs8_der().hex(),
        },
    )
    message = build_tls13_content(Purpose.TLS13_SERVER_VERIFY, bytes(range(32)))
    limited = RateLimited("too many signatures", retry_after=timedelta(milliseconds=1500))
    _write(
        "sign_socket.json",
        {
            "sign": SignFrame(7, 2000, 0x0403, 1, reference.key_id, message).to_bytes().hex(),
            "ping": PingFrame(b"\x01\x02\x03\x04").to_bytes().hex(),
            "pong": PongFrame(b"\x01\x02\x03\x04").to_bytes().hex(),
            "signed": SignedFrame(7, b"\x30\x06\x02\x01\x01\x02\x01\x01").to_bytes().hex(),
            "refused": RefusedFrame(7, KeyNotFound()).to_bytes().hex(),
            "refused_retry": RefusedFrame(8, limited).to_bytes().hex(),
        },
    )


def _write(name: str, content: dict[str, str]) -> None:
    (HERE / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
