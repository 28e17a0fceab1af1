"""PKCS#11 mechanisms: one table from scheme to mechanism, one from key type to how it is generated, and what a token's signature becomes.

Spec: PKCS#11 2.40 mechanisms 2.1 and 2.3; PKCS#11 3.0 mechanisms 2.3 (EdDSA); RFC 8446 4.2.3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pkcs11
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keyreeve_common.errors import Internal, KeyTypeNotSupported, PurposeMismatch, SchemeNotSupported
from keyreeve_common.schemes import HASHES, KeyFamily, KeyType, Padding, SignatureScheme
from pkcs11 import MGF, Attribute, Mechanism

from keyreeve_keyserver.domain.der import OCTET_STRING, DerError, read_element


@dataclass(frozen=True, slots=True)
class SignMechanism:
    """`prehash` is the hash that we compute because the mechanism takes a digest; "" where the token hashes."""

    mechanism: Mechanism
    parameter: Any = None
    prehash: str = ""


@dataclass(frozen=True, slots=True)
class Generation:
    """`parameters` are spellings of the curve to try in turn, since tokens differ in which of them they know."""

    mechanism: Mechanism
    key_type: pkcs11.KeyType
    bits: int = 0
    parameters: tuple[bytes, ...] = ()


SIGN_MECHANISMS: dict[SignatureScheme, SignMechanism] = {
    SignatureScheme.ECDSA_SECP256R1_SHA256: SignMechanism(Mechanism.ECDSA, prehash="sha256"),
    SignatureScheme.ECDSA_SECP384R1_SHA384: SignMechanism(Mechanism.ECDSA, prehash="sha384"),
    SignatureScheme.ED25519: SignMechanism(Mechanism.EDDSA),
    SignatureScheme.RSA_PKCS1_SHA256: SignMechanism(Mechanism.SHA256_RSA_PKCS),
    SignatureScheme.RSA_PKCS1_SHA384: SignMechanism(Mechanism.SHA384_RSA_PKCS),
    SignatureScheme.RSA_PKCS1_SHA512: SignMechanism(Mechanism.SHA512_RSA_PKCS),
    SignatureScheme.RSA_PSS_RSAE_SHA256: SignMechanism(
        Mechanism.SHA256_RSA_PKCS_PSS, (Mechanism.SHA256, MGF.SHA256, 32)
    ),
    SignatureScheme.RSA_PSS_RSAE_SHA384: SignMechanism(
        Mechanism.SHA384_RSA_PKCS_PSS, (Mechanism.SHA384, MGF.SHA384, 48)
    ),
    SignatureScheme.RSA_PSS_RSAE_SHA512: SignMechanism(
        Mechanism.SHA512_RSA_PKCS_PSS, (Mechanism.SHA512, MGF.SHA512, 64)
    ),
}
# For a digest that was given to us: the mechanism hashes nothing, and PKCS#1 v1.5 wants the name of the hash around the digest.
_DIGEST_INFO = {
    "sha256": bytes.fromhex("3031300d060960864801650304020105000420"),
    "sha384": bytes.fromhex("3041300d060960864801650304020205000430"),
    "sha512": bytes.fromhex("3051300d060960864801650304020305000440"),
}
_DIGEST_MECHANISMS = {
    Padding.NONE: Mechanism.ECDSA,
    Padding.PKCS1_V15: Mechanism.RSA_PKCS,
    Padding.PSS: Mechanism.RSA_PKCS_PSS,
}
_ED25519_PARAMETERS = (bytes.fromhex("06032b6570"), bytes.fromhex("130c656477617264733235353139"))
GENERATIONS: dict[KeyType, Generation] = {
    KeyType.EC_P256: Generation(
        Mechanism.EC_KEY_PAIR_GEN, pkcs11.KeyType.EC, parameters=(bytes.fromhex("06082a8648ce3d030107"),)
    ),
    KeyType.EC_P384: Generation(
        Mechanism.EC_KEY_PAIR_GEN, pkcs11.KeyType.EC, parameters=(bytes.fromhex("06052b81040022"),)
    ),
    KeyType.ED25519: Generation(
        Mechanism.EC_EDWARDS_KEY_PAIR_GEN, pkcs11.KeyType.EC_EDWARDS, parameters=_ED25519_PARAMETERS
    ),
    KeyType.RSA_2048: Generation(Mechanism.RSA_PKCS_KEY_PAIR_GEN, pkcs11.KeyType.RSA, bits=2048),
    KeyType.RSA_3072: Generation(Mechanism.RSA_PKCS_KEY_PAIR_GEN, pkcs11.KeyType.RSA, bits=3072),
    KeyType.RSA_4096: Generation(Mechanism.RSA_PKCS_KEY_PAIR_GEN, pkcs11.KeyType.RSA, bits=4096),
}


def private_template() -> dict[Attribute, Any]:
    """A private key that lives and dies in the token, and does nothing but sign."""
    return {
        Attribute.TOKEN: True,
        Attribute.PRIVATE: True,
        Attribute.SENSITIVE: True,
        Attribute.EXTRACTABLE: False,
        Attribute.SIGN: True,
        Attribute.DECRYPT: False,
        Attribute.UNWRAP: False,
        Attribute.DERIVE: False,
        Attribute.SIGN_RECOVER: False,
    }


def public_template() -> dict[Attribute, Any]:
    return {Attribute.TOKEN: True, Attribute.VERIFY: True, Attribute.ENCRYPT: False, Attribute.WRAP: False}


def ways_to_sign(scheme: SignatureScheme) -> tuple[SignMechanism, ...]:
    """How a token may make a signature over a message, the best first: tokens differ in which of these they have.

    RSA: the token hashes, or we do. ECDSA: we hash, or the token does. Ed25519: without parameters (PKCS#11 3.0), or with an empty context.
    """
    first, facts = SIGN_MECHANISMS[scheme], scheme.facts
    if not facts.hash_name:
        return (first, SignMechanism(first.mechanism, (False, None)))
    if facts.family is KeyFamily.RSA:
        return (first, SignMechanism(_DIGEST_MECHANISMS[facts.padding], first.parameter, prehash=facts.hash_name))
    return (first, SignMechanism(_HASHING_ECDSA[facts.hash_name]))


_HASHING_ECDSA = {"sha256": Mechanism.ECDSA_SHA256, "sha384": Mechanism.ECDSA_SHA384}


def schemes_offered(mechanisms: set[Mechanism]) -> tuple[SignatureScheme, ...]:
    """The schemes of a token that has these mechanisms."""
    return tuple(
        scheme for scheme in sorted(SIGN_MECHANISMS) if any(way.mechanism in mechanisms for way in ways_to_sign(scheme))
    )


def key_types_offered(mechanisms: set[Mechanism]) -> tuple[KeyType, ...]:
    """The key types that a token with these mechanisms can both make and use in at least one scheme."""
    families = {scheme.facts.family for scheme in schemes_offered(mechanisms)}
    return tuple(
        key_type
        for key_type in KeyType
        if GENERATIONS[key_type].mechanism in mechanisms and key_type.family in families
    )


def digest_mechanism(scheme: SignatureScheme) -> SignMechanism:
    """How a token signs a digest by the scheme's hash. Raises: SchemeNotSupported for Ed25519, which has none. Spec: RFC 8017 9.2 note 1."""
    facts = scheme.facts
    if not facts.hash_name:
        raise SchemeNotSupported(f"scheme {scheme.iana_name} takes the message whole, never a digest")
    return SignMechanism(_DIGEST_MECHANISMS[facts.padding], SIGN_MECHANISMS[scheme].parameter)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to make the signatures of a scheme, with all that does not change from one to the next.

    The token is given `head`, then the message, or its digest where there is a `hashes`. A message that is a digest has `digest_bytes`. An ECDSA
    result has two coordinates of `coordinate_bytes`.
    """

    mechanism: Mechanism
    parameter: Any
    head: bytes = b""
    hashes: Callable[[bytes], Any] | None = None
    digest_bytes: int = 0
    coordinate_bytes: int = 0

    def input_of(self, message: bytes) -> bytes:
        """Raises: PurposeMismatch when a digest is not of the scheme's hash."""
        if self.hashes is not None:
            digest: bytes = self.hashes(message).digest()
            return self.head + digest
        if self.digest_bytes and len(message) != self.digest_bytes:
            raise PurposeMismatch(f"digest has {len(message)} bytes, and the scheme's hash gives {self.digest_bytes}")
        return self.head + message

    def signature_of(self, raw: bytes) -> bytes:
        """The signature as TLS and X.509 want it: ECDSA's raw r||s becomes DER. Raises: Internal. Spec: RFC 3279 2.2.3; X.690 8.3."""
        half = self.coordinate_bytes
        if not half:
            return raw
        if len(raw) != 2 * half:
            raise Internal(f"token gave an ECDSA signature of {len(raw)} bytes, not {2 * half}")
        body = _integer(raw[:half]) + _integer(raw[half:])
        return bytes((_SEQUENCE, len(body))) + body  # at most 102 bytes: its length takes one byte


@cache
def ways(scheme: SignatureScheme, *, prehashed: bool) -> tuple[Way, ...]:
    """How a token may sign a message, or a digest of one, the best way first. Raises: SchemeNotSupported, as `digest_mechanism`."""
    facts = scheme.facts
    coordinate_bytes = _COORDINATE_BYTES.get(facts.family, 0)
    # Around a digest that the token does not make itself PKCS #1 v1.5 wants the name of the hash.
    head = _DIGEST_INFO[facts.hash_name] if facts.padding is Padding.PKCS1_V15 else b""
    if prehashed:
        how, size = digest_mechanism(scheme), HASHES[facts.hash_name].digest_size
        return (Way(how.mechanism, how.parameter, head, digest_bytes=size, coordinate_bytes=coordinate_bytes),)
    return tuple(
        Way(how.mechanism, how.parameter, head, getattr(hashlib, how.prehash), coordinate_bytes=coordinate_bytes)
        if how.prehash
        else Way(how.mechanism, how.parameter, coordinate_bytes=coordinate_bytes)
        for how in ways_to_sign(scheme)
    )


def _integer(number: bytes) -> bytes:
    """A DER INTEGER of a number that is not negative, given big endian."""
    digits = number.lstrip(b"\x00")
    if not digits or digits[0] & 0x80:
        digits = b"\x00" + digits
    return bytes((_INTEGER, len(digits))) + digits


_SEQUENCE, _INTEGER = 0x30, 0x02
_COORDINATE_BYTES = {KeyFamily.EC_P256: 32, KeyFamily.EC_P384: 48}
_CURVES: dict[KeyFamily, ec.EllipticCurve] = {
    KeyFamily.EC_P256: ec.SECP256R1(),
    KeyFamily.EC_P384: ec.SECP384R1(),
}


def spki_of(public_key: Any, key_type: KeyType) -> bytes:
    """The SubjectPublicKeyInfo of a token's public key object. Raises: KeyTypeNotSupported."""
    try:
        if key_type.family is KeyFamily.RSA:
            modulus = int.from_bytes(public_key[Attribute.MODULUS], "big")
            exponent = int.from_bytes(public_key[Attribute.PUBLIC_EXPONENT], "big")
            key: Any = rsa.RSAPublicNumbers(exponent, modulus).public_key()
        else:
            point = _point(bytes(public_key[Attribute.EC_POINT]), _POINT_BYTES[key_type.family])
            if key_type.family is KeyFamily.ED25519:
                key = ed25519.Ed25519PublicKey.from_public_bytes(point)
            else:
                key = ec.EllipticCurvePublicKey.from_encoded_point(_CURVES[key_type.family], point)
    except ValueError:
        raise KeyTypeNotSupported(f"token gave a public key that is not one of type {key_type.value}") from None
    encoded: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return encoded


_POINT_BYTES = {KeyFamily.EC_P256: 65, KeyFamily.EC_P384: 97, KeyFamily.ED25519: 32}


def _point(value: bytes, length: int) -> bytes:
    """CKA_EC_POINT is an OCTET STRING by the standard, for Edwards keys in 3.0 a BIT STRING; some tokens leave the wrapping off.

    The length tells: the first byte of a bare point (0x04, uncompressed) is the tag of an OCTET STRING as well.
    """
    if len(value) == length:
        return value
    if len(value) == length + 3 and value[:3] == bytes((0x03, length + 1, 0)):
        return value[3:]
    try:
        return read_element(value, OCTET_STRING, "EC point").value
    except DerError:
        return value
