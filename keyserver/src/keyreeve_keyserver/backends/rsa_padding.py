"""The padding that an RSA scheme names, for those who sign and those who verify before release."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import padding
from keyreeve_common.schemes import HASHES, Padding, SignatureScheme


def rsa_padding(scheme: SignatureScheme) -> padding.AsymmetricPadding:
    """Spec: RFC 8446 4.2.3: the salt of PSS is as long as the digest."""
    if scheme.facts.padding is Padding.PKCS1_V15:
        return padding.PKCS1v15()
    return padding.PSS(padding.MGF1(HASHES[scheme.facts.hash_name]()), padding.PSS.DIGEST_LENGTH)
