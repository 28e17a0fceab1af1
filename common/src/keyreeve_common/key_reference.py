"""Key references: what stands where a private key is expected. No secret is in them (docs/protocol/key-reference.md)."""

from __future__ import annotations

import base64
import binascii
import re
import textwrap
from dataclasses import dataclass

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import load_der_public_key
from cryptography.x509 import ObjectIdentifier

from keyreeve_common.errors import InvalidRequest, KeyReferenceInvalid, KeyTypeNotSupported
from keyreeve_common.key_id import KeyId, parse_key_id
from keyreeve_common.schemes import KeyType, key_type_of

PEM_LABEL = "KEYREEVE KEY REFERENCE"
ALGORITHM_OID = ObjectIdentifier("2.25.22403030168460678247198038235698823690")
VERSION = 1
MAX_DER_BYTES = 4096
MAX_SOCKET_BYTES = 107
_PEM = re.compile(rf"\s*-----BEGIN {PEM_LABEL}-----\s([A-Za-z0-9+/=\s]*)-----END {PEM_LABEL}-----\s*", re.ASCII)


@asn1.sequence
class _KeyReference:
    version: int
    key_id: str
    socket: str
    public_key: asn1.TLV


@asn1.sequence
class _Algorithm:
    oid: ObjectIdentifier


@asn1.sequence
class _PrivateKeyInfo:
    version: int
    algorithm: _Algorithm
    private_key: bytes


@dataclass(frozen=True, slots=True)
class KeyReference:
    """`socket` is the absolute path of the agent's sign socket; `spki_der` the SubjectPublicKeyInfo.

    Raises: KeyReferenceInvalid.
    """

    key_id: KeyId
    socket: str
    spki_der: bytes

    def __post_init__(self) -> None:
        try:
            parse_key_id(self.key_id)
        except InvalidRequest as error:
            raise KeyReferenceInvalid(error.detail) from None
        if not (self.socket.startswith("/") and len(self.socket.encode()) <= MAX_SOCKET_BYTES):
            raise KeyReferenceInvalid("socket is not an absolute path of at most 107 bytes")
        if "\x00" in self.socket:
            raise KeyReferenceInvalid("socket path holds a NUL byte")
        _ = self.key_type

    @property
    def public_key(self) -> PublicKeyTypes:
        try:
            return load_der_public_key(self.spki_der)
        except (ValueError, UnsupportedAlgorithm):
            raise KeyReferenceInvalid("public key is not a SubjectPublicKeyInfo that can be read") from None

    @property
    def key_type(self) -> KeyType:
        try:
            return key_type_of(self.public_key)
        except KeyTypeNotSupported as error:
            raise KeyReferenceInvalid(error.detail) from None

    def to_der(self) -> bytes:
        return asn1.encode_der(
            _KeyReference(
                version=VERSION,
                key_id=self.key_id,
                socket=self.socket,
                public_key=asn1.decode_der(asn1.TLV, self.spki_der),
            )
        )

    def to_pem(self) -> str:
        body = "\n".join(textwrap.wrap(base64.b64encode(self.to_der()).decode("ascii"), 64))
        return f"-----BEGIN {PEM_LABEL}-----\n{body}\n-----END {PEM_LABEL}-----\n"

    def to_pkcs8_der(self) -> bytes:
        """The PKCS#8 envelope with our algorithm OID, for stacks that take nothing else."""
        return asn1.encode_der(
            _PrivateKeyInfo(version=0, algorithm=_Algorithm(oid=ALGORITHM_OID), private_key=self.to_der())
        )


def parse_key_reference_der(data: bytes) -> KeyReference:
    """Raises: KeyReferenceInvalid."""
    if len(data) > MAX_DER_BYTES:
        raise KeyReferenceInvalid(f"key reference has {len(data)} bytes, at most {MAX_DER_BYTES} are allowed")
    try:
        parsed = asn1.decode_der(_KeyReference, data)
        spki_der = asn1.encode_der(parsed.public_key)
    except ValueError:
        raise KeyReferenceInvalid("key reference is cut short or is not the DER of version 1") from None
    if parsed.version != VERSION:
        raise KeyReferenceInvalid(f"key reference is of version {parsed.version}, this program knows version {VERSION}")
    return KeyReference(KeyId(parsed.key_id), parsed.socket, spki_der)


def parse_key_reference_pem(text: str) -> KeyReference:
    """The one PEM block that `text` is. Raises: KeyReferenceInvalid."""
    match = _PEM.fullmatch(text)
    if match is None:
        raise KeyReferenceInvalid(f"file is not one whole PEM block {PEM_LABEL!r}: it may be cut short")
    try:
        data = base64.b64decode("".join(match.group(1).split()), validate=True)
    except binascii.Error:
        raise KeyReferenceInvalid("PEM body is not base64: the file may be cut short") from None
    return parse_key_reference_der(data)


def parse_key_reference_pkcs8(data: bytes) -> KeyReference:
    """Raises: KeyReferenceInvalid."""
    try:
        parsed = asn1.decode_der(_PrivateKeyInfo, data)
    except ValueError:
        raise KeyReferenceInvalid("not a PKCS#8 PrivateKeyInfo") from None
    if parsed.version != 0 or parsed.algorithm.oid != ALGORITHM_OID:
        raise KeyReferenceInvalid("PKCS#8 key is not a Keyreeve key reference")
    return parse_key_reference_der(parsed.private_key)
