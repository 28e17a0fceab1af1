"""Signing inputs of JWT-SVIDs: only our refusals come out, and what is accepted is read again by other code."""

from __future__ import annotations

import base64
import json
import random
import re
import sys
from collections.abc import Sequence

from harness import main
from harness import mutate as mutate_bytes
from keyreeve_common.errors import ProfileViolation, PurposeMismatch
from keyreeve_common.schemes import SignatureScheme
from keyreeve_keyserver.domain.purposes.jwt_svid import check_jwt_svid
from keyreeve_testing.statements import MAX_TTL, jwt_record
from keyreeve_testing.tbs import NOW

_RECORD = jwt_record()
_FORM = re.compile(rb"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_SUBJECT = re.compile(r"spiffe://td\.test(/[a-zA-Z0-9._-]+)+")
_CLOCK = int(NOW.timestamp())
_WORDS = (b'"alg"', b'"kid"', b'"typ"', b'"crit"', b'"sub"', b'"aud"', b'"exp"', b'"iat"', b'"nbf"', b'"jti"', b'"ES256"',
          b'"tokens"', b'"JWT"', b'"JOSE"', b"[]", b"{}", b"null", b"NaN", b"1e9", b"-1", b'"\\ud800"', b",", b":")  # fmt: skip


def target(data: bytes) -> str:
    try:
        check_jwt_svid(data, _RECORD, SignatureScheme.ECDSA_SECP256R1_SHA256, NOW)
    except (PurposeMismatch, ProfileViolation) as error:
        return error.detail[:60]
    recheck(data)
    return "accepted"


def recheck(data: bytes) -> None:
    expect(_FORM.fullmatch(data) is not None, "base64url")
    header, claims = (json.loads(base64.urlsafe_b64decode(part + b"==")) for part in data.split(b"."))
    expect(
        header in [{"alg": "ES256", "kid": "tokens"} | more for more in ({}, {"typ": "JWT"}, {"typ": "JOSE"})], "header"
    )
    expect(claims.keys() <= {"sub", "aud", "exp", "iat", "nbf", "iss", "jti"}, "names")
    expect(_SUBJECT.fullmatch(claims["sub"]) is not None, "sub")
    expect(bool(claims["aud"]) and isinstance(claims["aud"], str | list), "aud")
    expect(type(claims["exp"]) is int and 0 < claims["exp"] - _CLOCK <= MAX_TTL.total_seconds(), "exp")
    for name in ("iat", "nbf"):
        expect(name not in claims or (type(claims[name]) is int and claims[name] <= _CLOCK + 60), name)


def expect(condition: bool, rule: str) -> None:
    if not condition:
        raise AssertionError(f"accepted against the rule: {rule}")


def mutate(data: bytes, pool: Sequence[bytes], source: random.Random) -> bytes:
    """Three in four times a change of the JSON below the base64url, else one of the characters."""
    parts = data.split(b".")
    if source.random() < 0.25:
        return mutate_bytes(data, pool, source)
    at = source.randrange(len(parts))
    try:
        text = base64.urlsafe_b64decode(parts[at] + b"==")
    except ValueError:
        return mutate_bytes(data, pool, source)
    if source.random() < 0.5:
        place = source.randrange(len(text) + 1)
        text = text[:place] + source.choice(_WORDS) + text[place + source.choice((0, 0, 1, 4)) :]
    else:
        text = mutate_bytes(text, [text], source)
    parts[at] = base64.urlsafe_b64encode(text).rstrip(b"=")
    return b".".join(parts)


if __name__ == "__main__":
    sys.exit(main(target, "jwt_svid", mutator=mutate))
