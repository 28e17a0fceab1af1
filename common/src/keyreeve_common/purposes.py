"""What a signature is for. The codes are those of the sign socket, the signer's frames and the protos (docs/protocol/sign-socket.md).

This is the registry of names; the parsers that hold a message to its purpose live in the signer.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum

from keyreeve_common.errors import InvalidRequest

MAX_MESSAGE_BYTES = 65_536
TLS13_PAD = b"\x20" * 64
TLS13_SERVER_CONTEXT = b"TLS 1.3, server CertificateVerify"
TLS13_CLIENT_CONTEXT = b"TLS 1.3, client CertificateVerify"
TLS13_HASH_LENGTHS = (32, 48)


class Purpose(IntEnum):
    UNSPECIFIED = 0
    TLS13_SERVER_VERIFY = 1
    TLS13_CLIENT_VERIFY = 2
    X509_CERTIFICATE = 3
    CERTIFICATE_REQUEST = 4
    TLS12_SERVER_KEY_EXCHANGE = 5
    TLS12_CLIENT_VERIFY = 6
    X509_CRL = 7
    OCSP_RESPONSE = 8
    JWT_SVID = 9
    DIGEST = 10

    @property
    def label(self) -> str:
        """The name in configuration, CLI, logs and errors."""
        return self.name.lower()


class KeyRole(StrEnum):
    """A key has one role: an authority key never signs a handshake, a handshake key never signs a certificate, a JWT key only tokens."""

    HANDSHAKE = "handshake"
    AUTHORITY = "authority"
    JWT_AUTHORITY = "jwt-authority"


PURPOSES_OF_ROLE: dict[KeyRole, frozenset[Purpose]] = {
    KeyRole.HANDSHAKE: frozenset(
        {
            Purpose.TLS13_SERVER_VERIFY,
            Purpose.TLS13_CLIENT_VERIFY,
            Purpose.TLS12_SERVER_KEY_EXCHANGE,
            Purpose.TLS12_CLIENT_VERIFY,
            Purpose.CERTIFICATE_REQUEST,
            Purpose.DIGEST,
        }
    ),
    KeyRole.AUTHORITY: frozenset(
        {Purpose.X509_CERTIFICATE, Purpose.X509_CRL, Purpose.OCSP_RESPONSE, Purpose.CERTIFICATE_REQUEST}
    ),
    KeyRole.JWT_AUTHORITY: frozenset({Purpose.JWT_SVID}),
}
AUTHORITY_ROLES = frozenset({KeyRole.AUTHORITY, KeyRole.JWT_AUTHORITY})
# What a key signs only where its sealed record and the grant name it; nothing gives these by default.
OPT_IN_PURPOSES = frozenset({Purpose.TLS12_SERVER_KEY_EXCHANGE, Purpose.TLS12_CLIENT_VERIFY, Purpose.DIGEST})


def parse_purpose(name: str) -> Purpose:
    """The purpose with this label. Raises: InvalidRequest, also for `unspecified`."""
    for purpose in Purpose:
        if purpose.label == name and purpose is not Purpose.UNSPECIFIED:
            return purpose
    raise InvalidRequest(f"unknown purpose {name[:64]!r}")


def build_tls13_content(purpose: Purpose, transcript_hash: bytes) -> bytes:
    """The content that a TLS 1.3 CertificateVerify signs. Spec: RFC 8446 4.4.3. Raises: InvalidRequest."""
    contexts = {
        Purpose.TLS13_SERVER_VERIFY: TLS13_SERVER_CONTEXT,
        Purpose.TLS13_CLIENT_VERIFY: TLS13_CLIENT_CONTEXT,
    }
    if purpose not in contexts:
        raise InvalidRequest(f"purpose {purpose.label} is not a TLS 1.3 CertificateVerify")
    if len(transcript_hash) not in TLS13_HASH_LENGTHS:
        raise InvalidRequest("a TLS 1.3 transcript hash has 32 or 48 bytes")
    return TLS13_PAD + contexts[purpose] + b"\x00" + transcript_hash
