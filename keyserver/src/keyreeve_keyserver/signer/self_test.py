"""The signature that a key makes when it is loaded: does the backend hold the private half of the record's public key?

The message is fixed and no purpose accepts it, so its signature is worth nothing to anybody. A key fails only where two signatures in a row
do not verify; a backend that is away or late fails the load, and says nothing of the key.
"""

from __future__ import annotations

import time

from cryptography.hazmat.primitives.serialization import load_der_public_key
from keyreeve_common.errors import Internal, KeyreeveError, KeySelfTestFailed
from keyreeve_common.schemes import DEFAULT_SCHEMES, SignatureScheme, schemes_of
from keyreeve_common.verification import verify_signature

from keyreeve_keyserver.backends.ports import Backend, SignatureMismatch, SignRequest
from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_keyserver.domain.secret import Secret

# No TLS content (pad of spaces, or randoms and curve parameters), no DER, no JOSE header, no handshake message, of no digest's length.
SELF_TEST_MESSAGE = b"Keyreeve key self-test, version 1: this signature says nothing but that the key signs\x00"
_ATTEMPTS = 2
_SECONDS = 20.0


async def load_tested(backend: Backend, record: KeyRecord, secret: Secret | None) -> None:
    """Loads the key into its backend and has it sign the test message; where that fails nothing stays loaded.

    Raises: KeySelfTestFailed for a key that is not the record's; whatever kept the backend from loading or signing.
    """
    await backend.load(record, secret)
    try:
        await check_signs(backend, record)
    except BaseException:
        backend.forget(record.key_id)
        raise


async def check_signs(backend: Backend, record: KeyRecord) -> None:
    """Has a loaded key sign the test message. Raises: KeySelfTestFailed; whatever kept the backend from signing."""
    for _ in range(_ATTEMPTS):
        if await _signs_as_recorded(backend, record):
            return
    raise KeySelfTestFailed(f"backend {record.backend} signs with another key than the one of the record")


async def _signs_as_recorded(backend: Backend, record: KeyRecord) -> bool:
    scheme = _scheme_for(backend, record)
    (outcome,) = await backend.sign([SignRequest(record, scheme, SELF_TEST_MESSAGE, time.monotonic() + _SECONDS)])
    if isinstance(outcome, SignatureMismatch):
        return False
    if isinstance(outcome, KeyreeveError):
        raise outcome
    public_key = load_der_public_key(record.spki_der)
    try:
        verify_signature(public_key, scheme, SELF_TEST_MESSAGE, signature=outcome)
    except Internal:
        return False
    return True


def _scheme_for(backend: Backend, record: KeyRecord) -> SignatureScheme:
    """The usual scheme of the key's type, or the first that the backend has: not every token knows RSA-PSS."""
    usual, offered = DEFAULT_SCHEMES[record.key_type.family], backend.capabilities().schemes
    fitting = [scheme for scheme in schemes_of(record.key_type) if scheme in offered]
    return usual if usual in fitting or not fitting else fitting[0]
