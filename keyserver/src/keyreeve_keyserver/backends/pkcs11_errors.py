"""What a token's errors mean to us: one table, and a detail that says what to do. Imported by the worker only."""

from __future__ import annotations

from keyreeve_common.errors import (
    Internal,
    KeyNotFound,
    KeyreeveError,
    KeyTypeNotSupported,
    SchemeNotSupported,
    StorageFull,
    TokenPinIncorrect,
    TokenSessionsExhausted,
    TokenUnavailable,
)
from pkcs11 import exceptions as p11

# The session is gone, not the token: log in again, find the key again, try once more.
SESSION_LOST: tuple[type[Exception], ...] = (
    p11.SessionClosed,
    p11.SessionHandleInvalid,
    p11.UserNotLoggedIn,
    p11.KeyHandleInvalid,
    p11.ObjectHandleInvalid,
    p11.OperationActive,
)
_KINDS: dict[type[Exception], tuple[type[KeyreeveError], str]] = {
    p11.PinIncorrect: (
        TokenPinIncorrect,
        "the token refused the PIN: correct the PIN file, then start the signer again",
    ),
    p11.PinLocked: (TokenPinIncorrect, "the token's PIN is locked: have its security officer unlock it"),
    p11.PinExpired: (TokenPinIncorrect, "the token's PIN has expired: set a new one"),
    p11.PinInvalid: (TokenPinIncorrect, "the PIN has characters that the token refuses: correct the PIN file"),
    p11.PinLenRange: (TokenPinIncorrect, "the PIN is too short or too long for the token: correct the PIN file"),
    p11.UserPinNotInitialized: (TokenPinIncorrect, "the token has no user PIN yet: initialise it"),
    p11.NoSuchKey: (KeyNotFound, "the token does not hold this key"),
    p11.DeviceMemory: (StorageFull, "the token is full: remove old keys, or use another token"),
    p11.TokenNotPresent: (TokenUnavailable, "no token is in the slot: put it in"),
    p11.DeviceRemoved: (TokenUnavailable, "the token was removed: put it back"),
    p11.SessionCount: (TokenSessionsExhausted, "the token has no session left: configure fewer workers"),
    p11.TokenWriteProtected: (TokenUnavailable, "the token is write-protected: create keys in another token"),
    p11.MechanismInvalid: (SchemeNotSupported, "the token does not know this mechanism"),
    p11.MechanismParamInvalid: (SchemeNotSupported, "the token does not know these parameters of the mechanism"),
    p11.DomainParamsInvalid: (KeyTypeNotSupported, "the token does not know this curve"),
    p11.KeyTypeInconsistent: (SchemeNotSupported, "the token does not do that with a key of this type"),
    p11.DataInvalid: (Internal, "the token refused the data"),
    p11.DataLenRange: (Internal, "the token refused the length of the data"),
    p11.KeySizeRange: (KeyTypeNotSupported, "the token does not make keys of this size"),
}


def error_of(error: Exception, doing: str) -> KeyreeveError:
    """Our error for what python-pkcs11 raised while `doing`."""
    for kind in type(error).__mro__:
        if kind in _KINDS:
            cls, advice = _KINDS[kind]
            return cls(f"{doing}: {advice}")
    if isinstance(error, p11.PKCS11Error):
        return TokenUnavailable(f"{doing}: the token answered {type(error).__name__}: see the token's own log")
    return Internal(f"{doing}: {type(error).__name__}")
