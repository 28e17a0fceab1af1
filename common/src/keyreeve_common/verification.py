"""Verifying a signature by its TLS SignatureScheme: for clients that trust no answer, and for key hosts that release none unchecked.

Spec: RFC 8446 4.2.3; RFC 8017 8.1 (PSS); RFC 8032 (Ed25519). ECDSA signatures are DER.
"""

from __future__ import annotations

from typing import cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from keyreeve_common.errors import Internal, SchemeNotSupported
from keyreeve_common.schemes import HASHES, KeyFamily, Padding, SignatureScheme, key_type_of


def verify_signature(
    public_key: PublicKeyTypes, scheme: SignatureScheme, message: bytes, *, signature: bytes, prehashed: bool = False
) -> None:
    """With `prehashed`, `message` is the digest by the scheme's hash, which Ed25519 does not have.

    Raises: SchemeNotSupported when the scheme does not fit the key; Internal when the signature is wrong.
    """
    facts = scheme.facts
    if key_type_of(public_key).family is not facts.family:
        raise SchemeNotSupported(f"scheme {scheme.iana_name} does not fit the public key")
    if prehashed and not facts.hash_name:
        raise SchemeNotSupported(f"scheme {scheme.iana_name} takes the message whole, never a digest")
    try:
        if isinstance(public_key, ed25519.Ed25519PublicKey):
            public_key.verify(signature, message)
        elif isinstance(public_key, ec.EllipticCurvePublicKey):
            public_key.verify(signature, message, ec.ECDSA(hash_algorithm(scheme, prehashed=prehashed)))
        else:
            cast("rsa.RSAPublicKey", public_key).verify(
                signature, message, rsa_padding(scheme), hash_algorithm(scheme, prehashed=prehashed)
            )
    except InvalidSignature as error:
        raise Internal("key cluster returned a signature that does not verify") from error


def hash_algorithm(scheme: SignatureScheme, *, prehashed: bool = False) -> hashes.HashAlgorithm | Prehashed:
    """The hash of a scheme that has one, for signing or verifying a message, or the digest of one."""
    algorithm = HASHES[scheme.facts.hash_name]()
    return Prehashed(algorithm) if prehashed else algorithm


def rsa_padding(scheme: SignatureScheme) -> padding.PKCS1v15 | padding.PSS:
    """The padding of an RSA scheme; PSS salts have the length of the digest. Spec: RFC 8446 4.2.3."""
    facts = scheme.facts
    assert facts.family is KeyFamily.RSA  # noqa: S101 - callers looked at the key
    if facts.padding is Padding.PKCS1_V15:
        return padding.PKCS1v15()
    hash_type = HASHES[facts.hash_name]
    return padding.PSS(mgf=padding.MGF1(hash_type()), salt_length=hash_type.digest_size)
