"""Verifying a signature by its TLS SignatureScheme: for clients that trust no answer, and for key hosts that release none unchecked.

Spec: RFC 8446 4.2.3; RFC 8017 8.1 (PSS); RFC 8032 (Ed25519). ECDSA signatures are DER.
"""

from __future__ import annotations

from typing import cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from keyreeve_common.errors import Internal, SchemeNotSupported
from keyreeve_common.schemes import HASHES, KeyFamily, Padding, SignatureScheme, key_type_of


def verify_signature(public_key: PublicKeyTypes, scheme: SignatureScheme, message: bytes, *, signature: bytes) -> None:
    """Raises: SchemeNotSupported when the scheme does not fit the key; Internal when the signature is wrong."""
    facts = scheme.facts
    if key_type_of(public_key).family is not facts.family:
        raise SchemeNotSupported(f"scheme {scheme.iana_name} does not fit the public key")
    try:
        if isinstance(public_key, ed25519.Ed25519PublicKey):
            public_key.verify(signature, message)
        elif isinstance(public_key, ec.EllipticCurvePublicKey):
            public_key.verify(signature, message, ec.ECDSA(HASHES[facts.hash_name]()))
        else:
            cast("rsa.RSAPublicKey", public_key).verify(
                signature, message, rsa_padding(scheme), HASHES[facts.hash_name]()
            )
    except InvalidSignature as error:
        raise Internal("key cluster returned a signature that does not verify") from error


def rsa_padding(scheme: SignatureScheme) -> padding.PKCS1v15 | padding.PSS:
    """The padding of an RSA scheme; PSS salts have the length of the digest. Spec: RFC 8446 4.2.3."""
    facts = scheme.facts
    assert facts.family is KeyFamily.RSA  # noqa: S101 - callers looked at the key
    if facts.padding is Padding.PKCS1_V15:
        return padding.PKCS1v15()
    hash_type = HASHES[facts.hash_name]
    return padding.PSS(mgf=padding.MGF1(hash_type()), salt_length=hash_type.digest_size)
