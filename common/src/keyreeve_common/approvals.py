"""Approvals: a person's signature over one exact request to destroy a key or to make an authority's key (docs/protocol/approvals.md).

Pure. The request's canonical JSON is what is signed, behind a prefix of its own, so no approval is a signature over anything else. The signer
of the key cluster verifies; the command line shows the request and signs; who stands between is not trusted.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from hashlib import sha256
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256, SHA384

from keyreeve_common.errors import ApprovalInvalid
from keyreeve_common.strict_json import canonical_json, parse_strict_json

PREFIX = b"keyreeve-approval-v1\x00"
VERSION = 1
MAX_LIFE = timedelta(days=30)
MAX_APPROVAL_BYTES = 65_536
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_CURVES: dict[str, type[SHA256] | type[SHA384]] = {"secp256r1": SHA256, "secp384r1": SHA384}
PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey
PublicKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey


class Operation(StrEnum):
    DESTROY_KEY = "destroy_key"
    CREATE_KEY = "create_key"


@dataclass(frozen=True, slots=True)
class ApprovalRequest:
    """`key` says all of the key that counts (plain JSON values). `expires`: whole seconds, aware UTC."""

    operation: Operation
    request_id: str
    expires: datetime
    key: Mapping[str, Any] = field(hash=False)

    def to_bytes(self) -> bytes:
        """The canonical JSON: names sorted, no spaces, ASCII."""
        return canonical_json(
            {
                "version": VERSION,
                "operation": self.operation.value,
                "request_id": self.request_id,
                "expires": self.expires.strftime(_TIME),
                "key": dict(self.key),
            }
        )

    @property
    def digest(self) -> str:
        return sha256(self.to_bytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class Approval:
    request: ApprovalRequest
    approver: str
    signature: bytes = field(repr=False)

    def to_text(self) -> str:
        """What an approval file holds."""
        fields = {
            "request": json.loads(self.request.to_bytes()),
            "approver": self.approver,
            "signature": base64.b64encode(self.signature).decode("ascii"),
        }
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def parse_request(data: str | bytes) -> ApprovalRequest:
    """The request in a file, however it is laid out. Raises: ApprovalInvalid."""
    return _request(_object(data))


def parse_approval(text: str | bytes) -> Approval:
    """Raises: ApprovalInvalid."""
    fields = _object(text)
    if fields.keys() != {"request", "approver", "signature"} or not isinstance(fields["approver"], str):
        raise ApprovalInvalid("an approval has the members request, approver and signature")
    try:
        signature = base64.b64decode(str(fields["signature"]).encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ApprovalInvalid("an approval's signature is not base64") from None
    return Approval(_request(fields["request"]), fields["approver"], signature)


def sign_request(request: ApprovalRequest, approver: str, key: PrivateKey) -> Approval:
    """Raises: ApprovalInvalid for a curve that approvals are not signed with."""
    message = PREFIX + request.to_bytes()
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return Approval(request, approver, key.sign(message))
    return Approval(request, approver, key.sign(message, ec.ECDSA(_hash_of(key.curve)())))


def verify_approval(approval: Approval, key: PublicKey) -> None:
    """Raises: ApprovalInvalid."""
    message = PREFIX + approval.request.to_bytes()
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(approval.signature, message)
        else:
            key.verify(approval.signature, message, ec.ECDSA(_hash_of(key.curve)()))
    except InvalidSignature:
        raise ApprovalInvalid(f"approval of {approval.approver[:64]!r}: its signature does not verify") from None


def is_approver_key(key: object) -> bool:
    """Ed25519, or ECDSA on P-256 or P-384."""
    if isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey):
        return key.curve.name in _CURVES
    return isinstance(key, ed25519.Ed25519PublicKey | ed25519.Ed25519PrivateKey)


def describe_request(request: ApprovalRequest) -> Iterator[tuple[str, str]]:
    """What a person reads before signing: every member, names and lives in words."""
    yield "operation", request.operation.value
    yield "request id", request.request_id
    yield "approval ends", request.expires.strftime(_TIME)
    yield from _described(request.key, "")


def _described(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name in sorted(value):
        member = value[name]
        if isinstance(member, Mapping):
            yield from _described(member, f"{prefix}{name}.")
        elif isinstance(member, list):
            yield prefix + name, ", ".join(map(str, member))
        elif name.endswith("_s") and isinstance(member, int):
            yield prefix + name[:-2], str(timedelta(seconds=member))
        elif name == "subject_der":
            yield prefix + "subject", _subject(str(member))
        else:
            yield prefix + name, "-" if member in (None, "") else str(member)


def _subject(encoded: str) -> str:
    """The name in words and as it stands: what cannot be read must not look like something else."""
    try:
        name = x509.Name.from_bytes(base64.b64decode(encoded, validate=True)).rfc4514_string()
    except ValueError:
        name = "CANNOT BE READ"
    return f"{name} ({encoded})"


def _request(value: object) -> ApprovalRequest:
    if not isinstance(value, dict) or value.keys() != {"version", "operation", "request_id", "expires", "key"}:
        raise ApprovalInvalid("an approval request has the members version, operation, request_id, expires and key")
    if value["version"] != VERSION or not isinstance(value["key"], dict) or not isinstance(value["request_id"], str):
        raise ApprovalInvalid(f"approval request is not one of version {VERSION}")
    try:
        expires = datetime.strptime(str(value["expires"]), _TIME).replace(tzinfo=UTC)
        request = ApprovalRequest(Operation(value["operation"]), value["request_id"], expires, value["key"])
        if request.to_bytes() != canonical_json(value):
            raise ValueError("a member in another spelling")
    except (ValueError, TypeError):
        raise ApprovalInvalid("approval request: operation or expires is not one that is known") from None
    return request


def _object(data: str | bytes) -> dict[str, Any]:
    if len(data) > MAX_APPROVAL_BYTES:
        raise ApprovalInvalid(f"an approval has at most {MAX_APPROVAL_BYTES} bytes")
    try:
        value = parse_strict_json(data)
    except ValueError:
        raise ApprovalInvalid("approval is not one JSON object with distinct names and whole numbers") from None
    if not isinstance(value, dict):
        raise ApprovalInvalid("approval is not a JSON object")
    return value


def _hash_of(curve: ec.EllipticCurve) -> type[SHA256] | type[SHA384]:
    if curve.name not in _CURVES:
        raise ApprovalInvalid(f"approvals are signed with Ed25519, P-256 or P-384, not {curve.name}")
    return _CURVES[curve.name]
