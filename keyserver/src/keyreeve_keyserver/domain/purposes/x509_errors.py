"""What `cryptography` raises for bytes that are no certificate or request: found by fuzzing, not all of it documented."""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

UNREADABLE: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,  # a Name with a BIT STRING under another type than X500UniqueIdentifier
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
    UnsupportedAlgorithm,
    UserWarning,  # the signer turns warnings into errors: what cryptography frowns at is not signed
)
