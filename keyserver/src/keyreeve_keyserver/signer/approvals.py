"""Who must agree before the signer destroys a key or makes an authority's: it verifies that itself, whatever the front end says.

An approval holds for one exact request, for its operation and its key as the sealed record or the arguments say them, until it expires. It is
used once: what comes again with it gets the first answer again, from this process; the next one would do anew just what was approved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from keyreeve_common.approvals import (
    MAX_LIFE,
    Approval,
    ApprovalRequest,
    Operation,
    PublicKey,
    is_approver_key,
    parse_approval,
    verify_approval,
)
from keyreeve_common.errors import ApprovalInvalid, ApprovalRequired, ConfigInvalid, InvalidRequest
from keyreeve_common.purposes import KeyRole
from keyreeve_common.telemetry import log_warning

from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_keyserver.frames import JsonObject
from keyreeve_keyserver.signer.config import ApprovalsConfig

MAX_APPROVALS = 32


@dataclass(slots=True)
class Approvals:
    """`required` 0: nobody is asked. `approvers` by name."""

    required: int = 0
    approvers: Mapping[str, PublicKey] = field(default_factory=dict)
    _answers: dict[str, tuple[datetime, JsonObject]] = field(default_factory=dict, repr=False)

    @property
    def are_asked_for(self) -> bool:
        return self.required > 0

    def require(
        self, given: Sequence[object], *, operation: Operation, key: Mapping[str, Any], now: datetime
    ) -> ApprovalRequest | None:
        """The request that enough approvers signed; None where nobody is asked. Raises: ApprovalRequired, ApprovalInvalid."""
        if not self.are_asked_for:
            return None
        if len(given) > MAX_APPROVALS or not all(isinstance(text, str) for text in given):
            raise InvalidRequest(f"approvals: at most {MAX_APPROVALS} texts are expected")
        approvals = [parse_approval(str(text)) for text in given]
        for approval in approvals:
            self._check(approval, approvals[0].request, operation=operation, key=key, now=now)
        agreed = {approval.approver for approval in approvals}
        if len(agreed) < self.required:
            missing = ", ".join(sorted(self.approvers.keys() - agreed))
            raise ApprovalRequired(
                f"{operation.value} needs approvals of {self.required} of {len(self.approvers)} approvers, "
                f"{len(agreed)} came; not yet: {missing}"
            )
        return approvals[0].request

    def answer_of(self, request: ApprovalRequest | None, now: datetime) -> JsonObject | None:
        """What this request was answered with before."""
        self._answers = {digest: kept for digest, kept in self._answers.items() if kept[0] > now}
        found = self._answers.get(request.digest) if request is not None else None
        return found[1] if found else None

    def keep_answer(self, request: ApprovalRequest | None, answer: JsonObject) -> None:
        if request is not None:
            self._answers[request.digest] = (request.expires, answer)

    def forget_key(self, key_id: str) -> None:
        """A key that is destroyed is told to nobody again."""
        kept = self._answers.items()
        self._answers = {digest: (until, answer) for digest, (until, answer) in kept if answer.get("key_id") != key_id}

    def _check(
        self,
        approval: Approval,
        first: ApprovalRequest,
        *,
        operation: Operation,
        key: Mapping[str, Any],
        now: datetime,
    ) -> None:
        request, name = approval.request, approval.approver[:64]
        public_key = self.approvers.get(approval.approver)
        if public_key is None:
            raise ApprovalInvalid(f"{name!r} is no approver of this signer")
        verify_approval(approval, public_key)
        if request.to_bytes() != first.to_bytes():
            raise ApprovalInvalid(f"the approval of {name} is for another request than the one before it")
        if request.operation is not operation:
            raise ApprovalInvalid(f"the approval of {name} is for {request.operation.value}, not {operation.value}")
        wrong = sorted(
            {member for member in request.key.keys() | key.keys() if request.key.get(member) != key.get(member)}
        )
        if wrong or replace(request, key=key).to_bytes() != request.to_bytes():
            raise ApprovalInvalid(f"the approval of {name} is for another key or request: {', '.join(wrong)} differ")
        if now >= request.expires:
            raise ApprovalInvalid(f"the approval of {name} expired at {request.expires.isoformat()}")
        if request.expires > now + MAX_LIFE:
            raise ApprovalInvalid(f"the approval of {name} expires more than {MAX_LIFE.days} days ahead")


def is_made_with_approval(role: KeyRole) -> bool:
    """All keys whose signatures make identities; the key of one identity is made by the CA as entries come and go."""
    return role is not KeyRole.HANDSHAKE


def key_to_create(
    *,
    key_type: str,
    role: str,
    purposes: Sequence[str],
    backend: str,
    label: str,
    authority_profile: JsonObject | None,
    jwt_profile: JsonObject | None,
) -> JsonObject:
    """What approvers sign of a key that is to be made."""
    return {
        "key_type": key_type,
        "role": role,
        "purposes": sorted(purposes),
        "backend": backend,
        "label": label,
        "authority_profile": authority_profile,
        "jwt_profile": jwt_profile,
    }


def key_to_destroy(record: KeyRecord, wait_s: int) -> JsonObject:
    """What approvers sign of a key that is to be destroyed."""
    return {
        "key_id": record.key_id,
        "spki_sha256": sha256(record.spki_der).hexdigest(),
        "role": record.role.value,
        "label": record.label,
        "wait_s": wait_s,
    }


def load_approvals(config: ApprovalsConfig) -> Approvals:
    """Reads the approvers' public keys. Raises: ConfigInvalid."""
    if not config.required:
        log_warning("approvals_not_configured", detail="one administrator can destroy keys and make authorities")
        return Approvals()
    approvers = {approver.name: _public_key(approver.public_key_file) for approver in config.approver}
    encoded = [
        key.public_bytes_raw() if hasattr(key, "public_bytes_raw") else _point(key) for key in approvers.values()
    ]
    if len(set(encoded)) != len(encoded):
        raise ConfigInvalid("approvals: two approvers have the same public key")
    return Approvals(config.required, approvers)


def _point(key: Any) -> bytes:
    numbers = key.public_numbers()
    return f"{key.curve.name} {numbers.x:x} {numbers.y:x}".encode()


def _public_key(path: Path) -> PublicKey:
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise ConfigInvalid(f"approvals: {path} cannot be read: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigInvalid(f"approvals: {path} holds no public key in PEM (SubjectPublicKeyInfo)") from None
    if not is_approver_key(key):
        raise ConfigInvalid(f"approvals: the key in {path} is neither Ed25519 nor ECDSA on P-256 or P-384")
    assert not isinstance(key, bytes)  # noqa: S101 - is_approver_key looked
    return key  # type: ignore[return-value]  # is_approver_key looked
