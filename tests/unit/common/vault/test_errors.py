"""Each answer of Vault has one meaning, and its own words stay out of ours."""

from __future__ import annotations

import pytest
from keyreeve_common.errors import (
    Internal,
    KeyNotFound,
    KeyreeveError,
    RateLimited,
    SealedRecordInvalid,
    TokenUnavailable,
    VaultAccessDenied,
)
from keyreeve_common.vault.errors import error_of_answer


@pytest.mark.parametrize(
    ("status", "texts", "kind", "advice"),
    [
        (400, "", Internal, "see Vault's own log"),
        (400, "signing key not found", KeyNotFound, "does not hold this key"),
        (400, "cipher: message authentication failed", SealedRecordInvalid, "was changed"),
        (403, "permission denied", VaultAccessDenied, "policy does not permit"),
        (404, "", KeyNotFound, "check mount and namespace"),
        (404, 'no handler for route "x". route entry not found.', TokenUnavailable, "enable it"),
        (307, "", TokenUnavailable, "leads to the active one"),
        (429, "request path quota exceeded", RateLimited, "raise the quota"),
        (473, "", TokenUnavailable, "is a standby"),
        (500, "local node not active but active cluster node not found", TokenUnavailable, "no active server"),
        (503, "Vault is sealed", TokenUnavailable, "unseal it"),
        (502, "", TokenUnavailable, "cannot reach it"),
        (418, "", TokenUnavailable, "HTTP status 418"),
    ],
)
def test_answer_has_its_meaning(status: int, texts: str, kind: type[KeyreeveError], advice: str) -> None:
    error = error_of_answer(status, texts, "signing")
    assert type(error) is kind
    assert error.detail.startswith("signing: ")
    assert advice in error.detail


@pytest.mark.parametrize("status", [*range(300, 310), *range(400, 430), *range(500, 505)])
def test_words_of_vault_are_not_repeated(status: int) -> None:
    assert "hunter2" not in error_of_answer(status, "cannot decode hunter2", "signing").detail
