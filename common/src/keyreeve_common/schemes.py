"""The TLS SignatureScheme registry: key type, hash and padding of each scheme that Keyreeve signs with.

Spec: IANA TLS SignatureScheme; RFC 8446 4.2.3. SHA-1 and MD5 schemes are absent on purpose. PKCS#1 v1.5 is listed because X.509 certificates
and TLS 1.2 use it; TLS 1.3 handshakes never do (`tls13`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum, StrEnum

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from keyreeve_common.errors import KeyTypeNotSupported, SchemeNotSupported


class KeyType(StrEnum):
    """The kinds of key that Keyreeve creates."""

    EC_P256 = "ec-p256"
    EC_P384 = "ec-p384"
    ED25519 = "ed25519"
    RSA_2048 = "rsa-2048"
    RSA_3072 = "rsa-3072"
    RSA_4096 = "rsa-4096"

    @property
    def family(self) -> KeyFamily:
        return _FAMILIES[self]

    @property
    def rsa_bits(self) -> int:
        """Size of the modulus in bits; 0 for other families."""
        return _RSA_BITS.get(self, 0)


class KeyFamily(Enum):
    EC_P256 = "ec-p256"
    EC_P384 = "ec-p384"
    ED25519 = "ed25519"
    RSA = "rsa"


_FAMILIES = {
    KeyType.EC_P256: KeyFamily.EC_P256,
    KeyType.EC_P384: KeyFamily.EC_P384,
    KeyType.ED25519: KeyFamily.ED25519,
    KeyType.RSA_2048: KeyFamily.RSA,
    KeyType.RSA_3072: KeyFamily.RSA,
    KeyType.RSA_4096: KeyFamily.RSA,
}
_RSA_BITS = {KeyType.RSA_2048: 2048, KeyType.RSA_3072: 3072, KeyType.RSA_4096: 4096}


class Padding(Enum):
    NONE = "none"
    PKCS1_V15 = "pkcs1-v1_5"
    PSS = "pss"  # salt length = digest length, MGF1 with the same hash (RFC 8446 4.2.3)


class SignatureScheme(IntEnum):
    """IANA code points, by their IANA names."""

    RSA_PKCS1_SHA256 = 0x0401
    RSA_PKCS1_SHA384 = 0x0501
    RSA_PKCS1_SHA512 = 0x0601
    ECDSA_SECP256R1_SHA256 = 0x0403
    ECDSA_SECP384R1_SHA384 = 0x0503
    RSA_PSS_RSAE_SHA256 = 0x0804
    RSA_PSS_RSAE_SHA384 = 0x0805
    RSA_PSS_RSAE_SHA512 = 0x0806
    ED25519 = 0x0807

    @property
    def facts(self) -> SchemeFacts:
        return REGISTRY[self]

    @property
    def iana_name(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class SchemeFacts:
    """`hash_name` is the `hashlib` name, "" for Ed25519, which takes the message whole."""

    family: KeyFamily
    hash_name: str
    padding: Padding
    tls13: bool


REGISTRY: dict[SignatureScheme, SchemeFacts] = {
    SignatureScheme.RSA_PKCS1_SHA256: SchemeFacts(KeyFamily.RSA, "sha256", Padding.PKCS1_V15, tls13=False),
    SignatureScheme.RSA_PKCS1_SHA384: SchemeFacts(KeyFamily.RSA, "sha384", Padding.PKCS1_V15, tls13=False),
    SignatureScheme.RSA_PKCS1_SHA512: SchemeFacts(KeyFamily.RSA, "sha512", Padding.PKCS1_V15, tls13=False),
    SignatureScheme.ECDSA_SECP256R1_SHA256: SchemeFacts(KeyFamily.EC_P256, "sha256", Padding.NONE, tls13=True),
    SignatureScheme.ECDSA_SECP384R1_SHA384: SchemeFacts(KeyFamily.EC_P384, "sha384", Padding.NONE, tls13=True),
    SignatureScheme.RSA_PSS_RSAE_SHA256: SchemeFacts(KeyFamily.RSA, "sha256", Padding.PSS, tls13=True),
    SignatureScheme.RSA_PSS_RSAE_SHA384: SchemeFacts(KeyFamily.RSA, "sha384", Padding.PSS, tls13=True),
    SignatureScheme.RSA_PSS_RSAE_SHA512: SchemeFacts(KeyFamily.RSA, "sha512", Padding.PSS, tls13=True),
    SignatureScheme.ED25519: SchemeFacts(KeyFamily.ED25519, "", Padding.NONE, tls13=True),
}
HASHES: dict[str, type[hashes.SHA256] | type[hashes.SHA384] | type[hashes.SHA512]] = {
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}
DEFAULT_SCHEMES: dict[KeyFamily, SignatureScheme] = {
    KeyFamily.EC_P256: SignatureScheme.ECDSA_SECP256R1_SHA256,
    KeyFamily.EC_P384: SignatureScheme.ECDSA_SECP384R1_SHA384,
    KeyFamily.ED25519: SignatureScheme.ED25519,
    KeyFamily.RSA: SignatureScheme.RSA_PSS_RSAE_SHA256,
}


def parse_scheme(code_point: int) -> SignatureScheme:
    """The scheme with this IANA code point. Raises: SchemeNotSupported."""
    try:
        return SignatureScheme(code_point)
    except ValueError:
        raise SchemeNotSupported(f"signature scheme 0x{code_point:04x} is not one that Keyreeve signs with") from None


def check_scheme_fits(scheme: SignatureScheme, key_type: KeyType) -> None:
    """Raises: SchemeNotSupported when a key of this type cannot make this signature."""
    if scheme.facts.family is not key_type.family:
        raise SchemeNotSupported(f"scheme {scheme.iana_name} does not fit a key of type {key_type.value}")


def schemes_of(key_type: KeyType) -> tuple[SignatureScheme, ...]:
    """The schemes that fit this key type, in IANA order."""
    return tuple(scheme for scheme in sorted(REGISTRY) if scheme.facts.family is key_type.family)


_KEY_TYPE_BY_CURVE = {"secp256r1": KeyType.EC_P256, "secp384r1": KeyType.EC_P384}
_KEY_TYPE_BY_BITS = {bits: key_type for key_type, bits in _RSA_BITS.items()}


def key_type_of(public_key: PublicKeyTypes) -> KeyType:
    """The type of a public key. Raises: KeyTypeNotSupported."""
    found: KeyType | None = None
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        found = _KEY_TYPE_BY_CURVE.get(public_key.curve.name)
    elif isinstance(public_key, rsa.RSAPublicKey):
        found = _KEY_TYPE_BY_BITS.get(public_key.key_size)
    elif isinstance(public_key, ed25519.Ed25519PublicKey):
        found = KeyType.ED25519
    if found is None:
        raise KeyTypeNotSupported("key is not EC P-256 or P-384, Ed25519, or RSA of 2048, 3072 or 4096 bits")
    return found
