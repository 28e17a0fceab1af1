"""What the answers of a Vault server mean to us: one table by HTTP status, one by a text where the status says too little.

Texts of Vault are not repeated to callers: they may quote what they were sent. A detail says what to do.
Spec: Vault HTTP API, "HTTP Status Codes".
"""

from __future__ import annotations

from keyreeve_common.errors import (
    Conflict,
    Internal,
    KeyNotFound,
    KeyreeveError,
    RateLimited,
    SealedRecordInvalid,
    TokenUnavailable,
    VaultAccessDenied,
)

_STATUSES: dict[int, tuple[type[KeyreeveError], str]] = {
    301: (TokenUnavailable, "Vault's server sends us to another: give an address that leads to the active one"),
    302: (TokenUnavailable, "Vault's server sends us to another: give an address that leads to the active one"),
    307: (TokenUnavailable, "Vault's server sends us to another: give an address that leads to the active one"),
    308: (TokenUnavailable, "Vault's server sends us to another: give an address that leads to the active one"),
    400: (Internal, "Vault refused the request: see Vault's own log"),
    401: (VaultAccessDenied, "Vault does not accept our token"),
    403: (VaultAccessDenied, "Vault's policy does not permit this: compare the token's policies with docs/vault.md"),
    404: (KeyNotFound, "Vault has nothing at this path: check mount and namespace"),
    405: (Internal, "Vault does not know this operation: check that the mount is of the right kind"),
    412: (TokenUnavailable, "Vault's replica is not up to date yet"),
    429: (RateLimited, "Vault's rate limit quota is used up: raise the quota, or spread the load"),
    472: (TokenUnavailable, "Vault's server is a disaster recovery secondary: give the address of the active one"),
    473: (TokenUnavailable, "Vault's server is a standby: give an address that leads to the active one"),
    500: (TokenUnavailable, "Vault met a fault of its own: see Vault's own log"),
    501: (TokenUnavailable, "Vault is not initialised: run its operator init"),
    502: (TokenUnavailable, "what stands between us and Vault cannot reach it"),
    503: (TokenUnavailable, "Vault is sealed or in maintenance: unseal it"),
}
# Where the status alone would mislead. The texts are those of OpenBao and of Vault, in lower case.
_TEXTS: dict[str, tuple[type[KeyreeveError], str]] = {
    "signing key not found": (KeyNotFound, "Vault does not hold this key"),
    "encryption key not found": (KeyNotFound, "Vault does not hold this key"),
    "no existing key named": (KeyNotFound, "Vault does not hold this key"),
    "could not delete key; not found": (KeyNotFound, "Vault does not hold this key"),
    "version for signing is higher": (KeyNotFound, "Vault does not hold this version of the key"),
    "version is too old": (KeyNotFound, "Vault's min_encryption_version forbids this version of the key: lower it"),
    "less than the minimum": (KeyNotFound, "Vault's min_encryption_version forbids this version of the key: lower it"),
    "no handler for route": (TokenUnavailable, "Vault has no secrets engine at this mount: enable it, or correct it"),
    "route entry not found": (TokenUnavailable, "Vault has no secrets engine at this mount: enable it, or correct it"),
    "local node not active": (TokenUnavailable, "Vault has no active server at present"),
    "vault is sealed": (TokenUnavailable, "Vault is sealed: unseal it"),
    "context deadline exceeded": (TokenUnavailable, "Vault did not finish in its own time limit: see Vault's own log"),
    "message authentication failed": (SealedRecordInvalid, "it was changed, or sealed under another key"),
    "invalid ciphertext": (SealedRecordInvalid, "it is no ciphertext of this key: sealed under another, or cut short"),
    "disallowed by policy": (SealedRecordInvalid, "Vault's min_decryption_version forbids its version: lower it"),
    "deletion is not allowed": (Conflict, "Vault does not allow the deletion of this key"),
}


def error_of_answer(status: int, texts: str, doing: str) -> KeyreeveError:
    """Our error for an answer of Vault with this status while `doing`; `texts` are its error texts."""
    lowered = texts.lower()
    for text, (cls, advice) in _TEXTS.items():
        if text in lowered:
            return cls(f"{doing}: {advice}")
    if status in _STATUSES:
        cls, advice = _STATUSES[status]
        return cls(f"{doing}: {advice}")
    return TokenUnavailable(f"{doing}: Vault answered with the HTTP status {status}: see Vault's own log")


def unreachable(doing: str) -> KeyreeveError:
    return TokenUnavailable(f"{doing}: Vault cannot be reached: check address, network and that Vault runs")


def tls_failed(doing: str) -> KeyreeveError:
    return TokenUnavailable(
        f"{doing}: TLS with Vault failed: ca_file must hold the authority of Vault's certificate, and the certificate the"
        " host of address"
    )


def too_slow(doing: str, seconds: float) -> KeyreeveError:
    return TokenUnavailable(f"{doing}: Vault did not answer within {seconds:g}s")


def misread(doing: str) -> KeyreeveError:
    return TokenUnavailable(
        f"{doing}: what answers at Vault's address does not speak as Vault: check address and proxies"
    )
