"""Attestations of keys: what a token says now of one key, signed by the cluster's attestation key. Pure and strict.

Spec: docs/protocol/key-attestation.md; RFC 8032 (Ed25519).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from keyreeve_common.errors import InvalidRequest
from keyreeve_common.strict_json import canonical_json, parse_strict_json

PREFIX = b"keyreeve-key-attestation-v1\x00"
VERSION = 1
MIN_NONCE_BYTES, MAX_NONCE_BYTES = 16, 64
MAX_ATTESTATION_BYTES = 65_536
_NO_ATTESTATION = "attestation: is not a JSON object of a statement and a signature"
_MEMBERS = frozenset(
    {
        "version",
        "time",
        "nonce",
        "key_id",
        "key_type",
        "role",
        "purposes",
        "spki_der",
        "label",
        "backend",
        "created",
        "authority_profile",
        "jwt_profile",
        "custody",
        "token",
    }
)


@dataclass(frozen=True, slots=True)
class KeyAttestation:
    """`statement` has every member of the page and none besides."""

    statement: Mapping[str, Any] = field(hash=False)
    signature: bytes = field(repr=False)

    def to_text(self) -> str:
        """What an attestation file holds."""
        encoded = base64.b64encode(self.signature).decode("ascii")
        return json.dumps({"statement": dict(self.statement), "signature": encoded}, indent=2, sort_keys=True) + "\n"


def check_nonce(nonce: bytes) -> bytes:
    """Raises: InvalidRequest."""
    if not MIN_NONCE_BYTES <= len(nonce) <= MAX_NONCE_BYTES:
        raise InvalidRequest(f"nonce has {len(nonce)} bytes, allowed are {MIN_NONCE_BYTES} to {MAX_NONCE_BYTES}")
    return nonce


def sign_statement(statement: Mapping[str, Any], key: Ed25519PrivateKey) -> KeyAttestation:
    """Raises: InvalidRequest for a statement that is not of this version."""
    _check(statement)
    return KeyAttestation(statement, key.sign(PREFIX + canonical_json(statement)))


def verify_attestation(
    text: str | bytes, public_key: Ed25519PublicKey, *, nonce: bytes | None = None
) -> KeyAttestation:
    """The attestation in `text`, when `public_key` signed it, and for this nonce where one is given. Raises: InvalidRequest."""
    attestation = _parse(text)
    try:
        public_key.verify(attestation.signature, PREFIX + canonical_json(attestation.statement))
    except InvalidSignature:
        raise InvalidRequest("attestation: its signature does not verify with this public key") from None
    _check(attestation.statement)
    if nonce is not None and attestation.statement["nonce"] != nonce.hex():
        raise InvalidRequest("attestation: it is for another nonce")
    return attestation


def _parse(text: str | bytes) -> KeyAttestation:
    if len(text) > MAX_ATTESTATION_BYTES:
        raise InvalidRequest(f"attestation: at most {MAX_ATTESTATION_BYTES} bytes are expected")
    try:
        value = parse_strict_json(text)
        statement = value["statement"]
        signature = base64.b64decode(str(value["signature"]).encode("ascii"), validate=True)
    except (ValueError, TypeError, LookupError, RecursionError, binascii.Error):
        raise InvalidRequest(_NO_ATTESTATION) from None
    if len(value) != len(("statement", "signature")) or not isinstance(statement, dict):
        raise InvalidRequest(_NO_ATTESTATION)
    return KeyAttestation(statement, signature)


def _check(statement: Mapping[str, Any]) -> None:
    odd = sorted(str(name) for name in statement.keys() ^ _MEMBERS)
    if odd or type(statement.get("version")) is not int or statement["version"] != VERSION:
        raise InvalidRequest(f"attestation: not a statement of version {VERSION}; odd members: {', '.join(odd)[:200]}")
