"""The error vocabulary, and the one table that renders it: wire number, gRPC status, HTTP status.

A `detail` is one line, safe to show and to log: it never holds a secret. Classes say what the caller can do; codes say what happened. A
missing key and a forbidden key are the same error, `key_not_found`. docs/errors.md lists every code.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import ClassVar

MAX_DETAIL_BYTES = 1024


class ErrorCode(StrEnum):
    """Stable names: they stand in trailers, problem documents, logs and JSON output."""

    INVALID_REQUEST = "invalid_request"
    UNAUTHENTICATED = "unauthenticated"
    PERMISSION_DENIED = "permission_denied"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    FAILED_PRECONDITION = "failed_precondition"
    RATE_LIMITED = "rate_limited"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    PURPOSE_MISMATCH = "purpose_mismatch"
    PURPOSE_NOT_PERMITTED = "purpose_not_permitted"
    SCHEME_NOT_SUPPORTED = "scheme_not_supported"
    MESSAGE_TOO_LARGE = "message_too_large"
    KEY_NOT_FOUND = "key_not_found"
    SVID_EXPIRED = "svid_expired"
    FOREIGN_TRUST_DOMAIN = "foreign_trust_domain"
    ATTESTATION_FAILED = "attestation_failed"
    TOKEN_UNAVAILABLE = "token_unavailable"  # noqa: S105 - the name of an error
    TOKEN_PIN_INCORRECT = "token_pin_incorrect"  # noqa: S105 - the name of an error
    STORAGE_FULL = "storage_full"
    STORAGE_BUSY = "storage_busy"
    MALFORMED_FRAME = "malformed_frame"
    CONFIG_INVALID = "config_invalid"
    KEY_REFERENCE_INVALID = "key_reference_invalid"
    KEY_TYPE_NOT_SUPPORTED = "key_type_not_supported"
    PROFILE_VIOLATION = "profile_violation"
    KEY_DISABLED = "key_disabled"
    JOIN_TOKEN_INVALID = "join_token_invalid"  # noqa: S105 - the name of an error
    AGENT_BANNED = "agent_banned"
    SPIFFE_ID_INVALID = "spiffe_id_invalid"
    SVID_INVALID = "svid_invalid"
    SEALED_RECORD_INVALID = "sealed_record_invalid"
    TOKEN_SESSIONS_EXHAUSTED = "token_sessions_exhausted"  # noqa: S105 - the name of an error
    KEY_SELF_TEST_FAILED = "key_self_test_failed"
    APPROVAL_REQUIRED = "approval_required"
    APPROVAL_INVALID = "approval_invalid"
    OVERLOADED = "overloaded"
    AUDIT_UNAVAILABLE = "audit_unavailable"
    VAULT_ACCESS_DENIED = "vault_access_denied"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Rendering:
    """How one code looks at the edges. `wire` is its number in frames and never changes; `grpc` is the name of the status.

    A name and not the status itself, so that processes without a network load no network library for their errors.
    """

    wire: int
    grpc: str
    http: int


RENDERINGS: dict[ErrorCode, Rendering] = {
    ErrorCode.INVALID_REQUEST: Rendering(1, "INVALID_ARGUMENT", 400),
    ErrorCode.UNAUTHENTICATED: Rendering(2, "UNAUTHENTICATED", 401),
    ErrorCode.PERMISSION_DENIED: Rendering(3, "PERMISSION_DENIED", 403),
    ErrorCode.NOT_FOUND: Rendering(4, "NOT_FOUND", 404),
    ErrorCode.CONFLICT: Rendering(5, "ALREADY_EXISTS", 409),
    ErrorCode.FAILED_PRECONDITION: Rendering(6, "FAILED_PRECONDITION", 409),
    ErrorCode.RATE_LIMITED: Rendering(7, "RESOURCE_EXHAUSTED", 429),
    ErrorCode.UNAVAILABLE: Rendering(8, "UNAVAILABLE", 503),
    ErrorCode.INTERNAL: Rendering(9, "INTERNAL", 500),
    ErrorCode.DEADLINE_EXCEEDED: Rendering(10, "DEADLINE_EXCEEDED", 504),
    ErrorCode.PURPOSE_MISMATCH: Rendering(16, "INVALID_ARGUMENT", 400),
    ErrorCode.PURPOSE_NOT_PERMITTED: Rendering(17, "PERMISSION_DENIED", 403),
    ErrorCode.SCHEME_NOT_SUPPORTED: Rendering(18, "INVALID_ARGUMENT", 400),
    ErrorCode.MESSAGE_TOO_LARGE: Rendering(19, "INVALID_ARGUMENT", 413),
    ErrorCode.KEY_NOT_FOUND: Rendering(20, "NOT_FOUND", 404),
    ErrorCode.SVID_EXPIRED: Rendering(21, "UNAUTHENTICATED", 401),
    ErrorCode.FOREIGN_TRUST_DOMAIN: Rendering(22, "UNAUTHENTICATED", 401),
    ErrorCode.ATTESTATION_FAILED: Rendering(23, "PERMISSION_DENIED", 403),
    ErrorCode.TOKEN_UNAVAILABLE: Rendering(24, "UNAVAILABLE", 503),
    ErrorCode.TOKEN_PIN_INCORRECT: Rendering(25, "FAILED_PRECONDITION", 503),
    ErrorCode.STORAGE_FULL: Rendering(26, "UNAVAILABLE", 507),
    ErrorCode.STORAGE_BUSY: Rendering(27, "UNAVAILABLE", 503),
    ErrorCode.MALFORMED_FRAME: Rendering(28, "INVALID_ARGUMENT", 400),
    ErrorCode.CONFIG_INVALID: Rendering(29, "FAILED_PRECONDITION", 500),
    ErrorCode.KEY_REFERENCE_INVALID: Rendering(30, "INVALID_ARGUMENT", 400),
    ErrorCode.KEY_TYPE_NOT_SUPPORTED: Rendering(31, "INVALID_ARGUMENT", 400),
    ErrorCode.PROFILE_VIOLATION: Rendering(32, "PERMISSION_DENIED", 403),
    ErrorCode.KEY_DISABLED: Rendering(33, "FAILED_PRECONDITION", 409),
    ErrorCode.JOIN_TOKEN_INVALID: Rendering(34, "UNAUTHENTICATED", 401),
    ErrorCode.AGENT_BANNED: Rendering(35, "PERMISSION_DENIED", 403),
    ErrorCode.SPIFFE_ID_INVALID: Rendering(36, "INVALID_ARGUMENT", 400),
    ErrorCode.SVID_INVALID: Rendering(37, "UNAUTHENTICATED", 401),
    ErrorCode.SEALED_RECORD_INVALID: Rendering(38, "FAILED_PRECONDITION", 500),
    ErrorCode.TOKEN_SESSIONS_EXHAUSTED: Rendering(46, "UNAVAILABLE", 503),
    ErrorCode.QUARANTINED: Rendering(39, "PERMISSION_DENIED", 403),
    ErrorCode.KEY_SELF_TEST_FAILED: Rendering(40, "FAILED_PRECONDITION", 500),
    ErrorCode.APPROVAL_REQUIRED: Rendering(41, "PERMISSION_DENIED", 403),
    ErrorCode.APPROVAL_INVALID: Rendering(42, "PERMISSION_DENIED", 403),
    ErrorCode.OVERLOADED: Rendering(44, "RESOURCE_EXHAUSTED", 503),
    ErrorCode.AUDIT_UNAVAILABLE: Rendering(45, "UNAVAILABLE", 503),
    ErrorCode.VAULT_ACCESS_DENIED: Rendering(43, "UNAVAILABLE", 503),
}
CODE_BY_WIRE: dict[int, ErrorCode] = {rendering.wire: code for code, rendering in RENDERINGS.items()}


class KeyreeveError(Exception):
    """Base of all our errors: a code, a detail that is safe to show, and when a retry may help."""

    default_code: ClassVar[ErrorCode] = ErrorCode.INTERNAL

    def __init__(self, detail: str, *, code: ErrorCode | None = None, retry_after: timedelta | None = None) -> None:
        self.code = code or self.default_code
        self.detail = _one_line(detail)
        self.retry_after = retry_after
        super().__init__(self.detail)

    def __str__(self) -> str:
        return f"{self.code.value}: {self.detail}"

    @property
    def rendering(self) -> Rendering:
        return RENDERINGS[self.code]


def _one_line(detail: str) -> str:
    line = " ".join(detail.split())
    return (
        line
        if len(line.encode()) <= MAX_DETAIL_BYTES
        else line.encode()[: MAX_DETAIL_BYTES - 4].decode(errors="ignore").rstrip() + " ..."
    )


class InvalidRequest(KeyreeveError):
    """The request itself is wrong: do not retry it unchanged."""

    default_code = ErrorCode.INVALID_REQUEST


class Unauthenticated(KeyreeveError):
    """The caller did not prove who it is: fetch a fresh SVID or token."""

    default_code = ErrorCode.UNAUTHENTICATED


class PermissionDenied(KeyreeveError):
    """The caller is known and may not do this."""

    default_code = ErrorCode.PERMISSION_DENIED


class NotFound(KeyreeveError):
    """No such thing, or none that this caller may know of."""

    default_code = ErrorCode.NOT_FOUND


class Conflict(KeyreeveError):
    """It exists already, or changed meanwhile."""

    default_code = ErrorCode.CONFLICT


class FailedPrecondition(KeyreeveError):
    """The system is not in the state that this needs: an operator must act."""

    default_code = ErrorCode.FAILED_PRECONDITION


class RateLimited(KeyreeveError):
    """Too much: retry after `retry_after`."""

    default_code = ErrorCode.RATE_LIMITED


class Unavailable(KeyreeveError):
    """Not now: a retry, here or at another replica, may succeed."""

    default_code = ErrorCode.UNAVAILABLE


class DeadlineExceeded(Unavailable):
    default_code = ErrorCode.DEADLINE_EXCEEDED


class Internal(KeyreeveError):
    """A fault of ours: the text is in the log only."""

    default_code = ErrorCode.INTERNAL


class InvalidSpiffeId(InvalidRequest, ValueError):
    default_code = ErrorCode.SPIFFE_ID_INVALID


class PurposeMismatch(InvalidRequest):
    """The message does not have the form of its declared purpose."""

    default_code = ErrorCode.PURPOSE_MISMATCH


class PurposeNotPermitted(PermissionDenied):
    """The key's role, its policy or the caller's grant lacks the purpose."""

    default_code = ErrorCode.PURPOSE_NOT_PERMITTED


class SchemeNotSupported(InvalidRequest):
    default_code = ErrorCode.SCHEME_NOT_SUPPORTED


class MessageTooLarge(InvalidRequest):
    default_code = ErrorCode.MESSAGE_TOO_LARGE


class KeyNotFound(NotFound):
    default_code = ErrorCode.KEY_NOT_FOUND

    def __init__(self, detail: str = "no such key, or no grant for this caller", **kwargs: object) -> None:
        super().__init__(detail)


class SvidExpired(Unauthenticated):
    default_code = ErrorCode.SVID_EXPIRED


class SvidInvalid(Unauthenticated):
    default_code = ErrorCode.SVID_INVALID


class ForeignTrustDomain(Unauthenticated):
    default_code = ErrorCode.FOREIGN_TRUST_DOMAIN


class AttestationFailed(PermissionDenied):
    default_code = ErrorCode.ATTESTATION_FAILED


class TokenUnavailable(Unavailable):
    """The PKCS#11 module, token or session, or the Vault server, cannot be used now."""

    default_code = ErrorCode.TOKEN_UNAVAILABLE


class TokenSessionsExhausted(TokenUnavailable):
    """The token has no session left for another worker."""

    default_code = ErrorCode.TOKEN_SESSIONS_EXHAUSTED


class VaultAccessDenied(TokenUnavailable):
    """Vault refused our login, or its policy what we asked for: an operator of Vault must act. Another replica may have better rights."""

    default_code = ErrorCode.VAULT_ACCESS_DENIED


class TokenPinIncorrect(FailedPrecondition):
    default_code = ErrorCode.TOKEN_PIN_INCORRECT


class Overloaded(Unavailable):
    """This replica has more work of this kind than it can do in time; another may have room, this one after `retry_after`."""

    default_code = ErrorCode.OVERLOADED


class StorageFull(Unavailable):
    default_code = ErrorCode.STORAGE_FULL


class StorageBusy(Unavailable):
    default_code = ErrorCode.STORAGE_BUSY


class AuditUnavailable(Unavailable):
    """What was done could not be recorded, so its result is kept back."""

    default_code = ErrorCode.AUDIT_UNAVAILABLE


class MalformedFrame(InvalidRequest):
    default_code = ErrorCode.MALFORMED_FRAME


class ConfigInvalid(FailedPrecondition):
    default_code = ErrorCode.CONFIG_INVALID


class KeyReferenceInvalid(InvalidRequest):
    default_code = ErrorCode.KEY_REFERENCE_INVALID


class KeyTypeNotSupported(InvalidRequest):
    default_code = ErrorCode.KEY_TYPE_NOT_SUPPORTED


class ProfileViolation(PermissionDenied):
    """The certificate is outside the profile that the key cluster holds for its authority."""

    default_code = ErrorCode.PROFILE_VIOLATION


class KeyDisabled(FailedPrecondition):
    default_code = ErrorCode.KEY_DISABLED


class JoinTokenInvalid(Unauthenticated):
    default_code = ErrorCode.JOIN_TOKEN_INVALID


class AgentBanned(PermissionDenied):
    default_code = ErrorCode.AGENT_BANNED


class Quarantined(PermissionDenied):
    """The caller may sign nothing, whatever its grants say, until an operator lifts it or it expires."""

    default_code = ErrorCode.QUARANTINED


class SealedRecordInvalid(FailedPrecondition):
    """A sealed key record was changed, cut short, or sealed under another key-encryption key."""

    default_code = ErrorCode.SEALED_RECORD_INVALID


class KeySelfTestFailed(FailedPrecondition):
    """What the backend signs with a key does not verify with the public key of its sealed record."""

    default_code = ErrorCode.KEY_SELF_TEST_FAILED


class ApprovalRequired(PermissionDenied):
    """The signer does this only with approvals; the detail says how many and whose are missing."""

    default_code = ErrorCode.APPROVAL_REQUIRED


class ApprovalInvalid(PermissionDenied):
    """An approval that came along is expired, of a stranger, or not for this very request."""

    default_code = ErrorCode.APPROVAL_INVALID


def _leaf_classes() -> dict[ErrorCode, type[KeyreeveError]]:
    found: dict[ErrorCode, type[KeyreeveError]] = {}
    pending: list[type[KeyreeveError]] = list(KeyreeveError.__subclasses__())
    while pending:
        cls = pending.pop()
        found[cls.default_code] = cls
        pending.extend(cls.__subclasses__())
    return found


CLASS_BY_CODE: dict[ErrorCode, type[KeyreeveError]] = _leaf_classes()


def error_from_code(code: str, detail: str, retry_after: timedelta | None = None) -> KeyreeveError:
    """The error that a peer reported by name; an unknown name is Internal, with the name kept in the detail."""
    try:
        known = ErrorCode(code)
    except ValueError:
        return Internal(f"peer reported unknown error code {code[:64]!r}: {detail}")
    error = CLASS_BY_CODE[known](detail)
    error.retry_after = retry_after
    return error


def error_from_wire(wire: int, detail: str, retry_after: timedelta | None = None) -> KeyreeveError:
    """The error that a frame reported by number."""
    code = CODE_BY_WIRE.get(wire)
    if code is None:
        return Internal(f"peer reported unknown error number {wire}: {detail}")
    return error_from_code(code.value, detail, retry_after)
