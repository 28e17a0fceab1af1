"""A bare digest, for software that hands over nothing else. Nothing can be checked but its length: a key that signs digests signs anything.

So it is for keys that were created with this purpose, and every batch that uses it leaves a warning in the log. Ed25519 takes the message whole
and has no digest to sign. Spec: PKCS#11 2.40 mechanisms 2.1.6, 2.1.11, 2.3.6.
"""

from __future__ import annotations

from keyreeve_common.errors import PurposeMismatch, SchemeNotSupported
from keyreeve_common.schemes import HASHES, SignatureScheme


def check_digest(message: bytes, scheme: SignatureScheme) -> None:
    """Raises: SchemeNotSupported, PurposeMismatch."""
    name = scheme.facts.hash_name
    if not name:
        raise SchemeNotSupported(f"scheme {scheme.iana_name} takes the message whole, never a digest")
    size = HASHES[name].digest_size
    if len(message) != size:
        raise PurposeMismatch(f"digest: message has {len(message)} bytes, a digest of {name} has {size}")
