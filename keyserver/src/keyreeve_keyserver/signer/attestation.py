"""Attestations by the signer: what the backend says now of a key that has just signed as its record says, under the cluster's attestation key.

The attestation key is made once and sealed under the key-encryption key; the front end keeps it in the catalog, so all replicas share it. Who
owns the front end can have others made, and sign nothing false with them: every statement is the signer's own.
"""

from __future__ import annotations

import base64
import json
from datetime import datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keyreeve_common.errors import SealedRecordInvalid
from keyreeve_common.key_attestation import VERSION, KeyAttestation, sign_statement
from keyreeve_common.strict_json import canonical_json

from keyreeve_keyserver.backends.ports import Backend
from keyreeve_keyserver.domain.keys import Custody, KeyRecord
from keyreeve_keyserver.domain.secret import Secret
from keyreeve_keyserver.signer.sealing import Sealer

_NOTE = canonical_json({"kind": "attestation-key"})
_TIME = "%Y-%m-%dT%H:%M:%SZ"


async def make_attestation_key(sealer: Sealer) -> bytes:
    """A new attestation key, sealed."""
    return await sealer.seal_note(_NOTE, Secret(Ed25519PrivateKey.generate().private_bytes_raw()))


async def open_attestation_key(sealer: Sealer, sealed: bytes) -> Ed25519PrivateKey:
    """Raises: SealedRecordInvalid, TokenUnavailable."""
    note, secret = await sealer.open_secret_note(sealed)
    if note != _NOTE or secret is None:
        raise SealedRecordInvalid("the note is no attestation key")
    return Ed25519PrivateKey.from_private_bytes(secret.reveal())


def public_key_of(key: Ed25519PrivateKey) -> bytes:
    """Its SubjectPublicKeyInfo, DER."""
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


async def attest(
    backend: Backend, record: KeyRecord, secret: Secret | None, *, nonce: bytes, now: datetime, key: Ed25519PrivateKey
) -> KeyAttestation:
    """The key must have passed its self-test just before. Raises: what the backend raises."""
    header = json.loads(record.to_header())
    statement: dict[str, Any] = {
        "version": VERSION,
        "time": now.strftime(_TIME),
        "nonce": nonce.hex(),
        "key_id": record.key_id,
        "key_type": record.key_type.value,
        "role": record.role.value,
        "purposes": sorted(purpose.label for purpose in record.purposes),
        "spki_der": base64.b64encode(record.spki_der).decode("ascii"),
        "label": record.label,
        "backend": record.backend,
        "created": header["created"],
        "authority_profile": header.get("authority_profile"),
        "jwt_profile": header.get("jwt_profile"),
        "custody": _custody(backend, secret).value,
        "token": await backend.inspect(record, secret),
    }
    return sign_statement(statement, key)


def _custody(backend: Backend, secret: Secret | None) -> Custody:
    """Of this key: a token backend may hold some keys itself and wrap others."""
    custody = backend.capabilities().custody
    if custody in (Custody.TOKEN_RESIDENT, Custody.TOKEN_WRAPPED):
        return Custody.TOKEN_WRAPPED if secret else Custody.TOKEN_RESIDENT
    return custody
