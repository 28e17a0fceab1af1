"""What TLS 1.2 signs, made field by field: ServerKeyExchange parameters, and a client's transcript with every part open to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keyreeve_common.schemes import SignatureScheme

from keyreeve_testing.tbs import LEAF

CURVES: dict[int, ec.EllipticCurve] = {0x0017: ec.SECP256R1(), 0x0018: ec.SECP384R1(), 0x0019: ec.SECP521R1()}
STRINGS = {0x001D: 32, 0x001E: 56}
RANDOMS = bytes(range(64))
OWN_CERTIFICATE = LEAF.certificate().public_bytes(Encoding.DER)


def point(curve: int, scalar: int = 5) -> bytes:
    """The public key of this scalar; of X25519 and X448 any string does."""
    if curve in STRINGS:
        return bytes((scalar,)) * STRINGS[curve]
    public_key = ec.derive_private_key(scalar, CURVES[curve]).public_key()
    return public_key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def server_params(curve: int, share: bytes | None = None) -> bytes:
    share = point(curve) if share is None else share
    return b"\x03" + curve.to_bytes(2, "big") + vector(1, share)


def key_exchange(curve: int = 0x0017, *, randoms: bytes = RANDOMS, share: bytes | None = None) -> bytes:
    return randoms + server_params(curve, share)


def vector(octets: int, data: bytes) -> bytes:
    return len(data).to_bytes(octets, "big") + data


def handshake(kind: int, body: bytes) -> bytes:
    return bytes((kind,)) + vector(3, body)


def extension(kind: int, data: bytes = b"") -> bytes:
    return kind.to_bytes(2, "big") + vector(2, data)


def certificates(*chain: bytes) -> bytes:
    return vector(3, b"".join(vector(3, certificate) for certificate in chain))


def hello(*, version: int = 0x0303, session: bytes = b"s" * 32, tail: bytes, extensions: bytes | None) -> bytes:
    head = version.to_bytes(2, "big") + bytes(32) + vector(1, session) + tail
    return head + (b"" if extensions is None else vector(2, extensions))


@dataclass(frozen=True)
class Transcript:
    """Each message as type and body, in the order of RFC 5246 7.3; `replace` changes one."""

    client_hello: bytes = hello(
        tail=b"\x00\x02\xc0\x2b\x01\x00", extensions=extension(23) + extension(13, b"\x00\x02\x04\x03")
    )
    server_hello: bytes = hello(tail=b"\xc0\x2b\x00", extensions=extension(23))
    server_certificate: bytes = certificates(b"server certificate", b"intermediate")
    status: bytes | None = None
    curve: int = 0x0017
    server_key_exchange: bytes | None = None
    schemes: Sequence[int] = (SignatureScheme.ECDSA_SECP256R1_SHA256, SignatureScheme.RSA_PSS_RSAE_SHA256)
    authorities: bytes = vector(2, b"\x30\x00")
    certificate_request: bytes | None = None
    done: bytes = b""
    own_certificate: bytes = certificates(OWN_CERTIFICATE)
    client_key_exchange: bytes | None = None

    def messages(self) -> list[tuple[int, bytes]]:
        offered = b"".join(int(scheme).to_bytes(2, "big") for scheme in self.schemes)
        asked = vector(1, b"\x40\x01") + vector(2, offered) + vector(2, self.authorities)
        signed = server_params(self.curve) + b"\x04\x03" + vector(2, b"signature")
        share = vector(1, point(self.curve, 6))
        status = [] if self.status is None else [(22, self.status)]
        return [
            (1, self.client_hello),
            (2, self.server_hello),
            (11, self.server_certificate),
            *status,
            (12, signed if self.server_key_exchange is None else self.server_key_exchange),
            (13, asked if self.certificate_request is None else self.certificate_request),
            (14, self.done),
            (11, self.own_certificate),
            (16, share if self.client_key_exchange is None else self.client_key_exchange),
        ]

    def to_bytes(self) -> bytes:
        return join(self.messages())


def join(messages: Sequence[tuple[int, bytes]]) -> bytes:
    return b"".join(handshake(kind, body) for kind, body in messages)


changed = replace
