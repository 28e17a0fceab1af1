"""JWT-SVIDs: the exact signing input, this key's id, and claims within the profile. The rule numbers are those of docs/spec-conformance.md."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import (
    InvalidRequest,
    KeyreeveError,
    ProfileViolation,
    PurposeMismatch,
    PurposeNotPermitted,
    SchemeNotSupported,
)
from keyreeve_common.jws import JWS_ALGORITHMS
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import KeyType, SignatureScheme, schemes_of
from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_keyserver.domain.purposes import check_request
from keyreeve_testing.statements import authority_record, claims, jwt_record, token
from keyreeve_testing.tbs import LEAF, NOW, handshake_record

P256 = SignatureScheme.ECDSA_SECP256R1_SHA256
CLOCK = int(NOW.timestamp())
HEADER = {"alg": "ES256", "kid": "tokens", "typ": "JWT"}


def judge(message: bytes, record: KeyRecord | None = None, scheme: SignatureScheme = P256) -> None:
    check_request(message, record or jwt_record(), purpose=Purpose.JWT_SVID, scheme=scheme, now=NOW)


def encoded(value: object) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value)
    return base64.urlsafe_b64encode(text.encode("utf-8", "surrogatepass")).rstrip(b"=")


def built(header: object = HEADER, body: object = None) -> bytes:
    return encoded(header) + b"." + encoded(claims() if body is None else body)


@pytest.mark.parametrize(
    "body",
    [
        claims(),
        claims(aud="one"),
        claims(aud=["one", "two"]),
        claims(iat=None),
        claims(nbf=CLOCK, iss="https://issuer.td.test", jti="6a6f"),
        claims(exp=CLOCK + 1),
        claims(exp=CLOCK + 300),
    ],
)
def test_tokens_within_the_profile_pass(body: dict[str, Any]) -> None:
    judge(built(HEADER, body))
    judge(token(body))


@pytest.mark.parametrize("header", [{"alg": "ES256", "kid": "tokens"}, HEADER | {"typ": "JOSE"}])
def test_jw05_type_may_be_absent_or_jose(header: dict[str, str]) -> None:
    judge(built(header))


def test_jw03_each_algorithm_is_that_of_its_scheme() -> None:
    record = jwt_record(rsa.generate_private_key(65537, 2048), KeyType.RSA_2048)
    for scheme in schemes_of(KeyType.RSA_2048):
        for name in (*sorted(set(JWS_ALGORITHMS.values())), "none", "HS256", "EdDSA", "es256", ""):
            message = built(HEADER | {"alg": name})
            if name == JWS_ALGORITHMS[scheme]:
                judge(message, record, scheme)
                continue
            with pytest.raises(PurposeMismatch, match="alg is not"):
                judge(message, record, scheme)


def test_jw03_no_eddsa() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    with pytest.raises(InvalidRequest, match="ed25519 cannot have purpose jwt_svid"):
        jwt_record(key, KeyType.ED25519)
    with pytest.raises(SchemeNotSupported):
        judge(built(HEADER | {"alg": "EdDSA"}), scheme=SignatureScheme.ED25519)


WRONG_HEADERS: dict[str, tuple[object, str]] = {
    "no alg": ({"kid": "tokens"}, "alg is not ES256"),
    "alg is a list": (HEADER | {"alg": ["ES256"]}, "alg is not ES256"),
    "no kid": ({"alg": "ES256"}, "kid is not the id of this key"),
    "another kid": (HEADER | {"kid": "handshake"}, "kid is not the id of this key"),
    "type at+jwt": (HEADER | {"typ": "at+jwt"}, "typ is neither"),
    "type in lower case": (HEADER | {"typ": "jwt"}, "typ is neither"),
    "type null": (HEADER | {"typ": None}, "typ is neither"),
    **{
        f"JW-02 {name}": (HEADER | {name: value}, f"header holds more than alg, kid and typ: .*{name}")
        for name, value in {
            "crit": ["exp"], "jwk": {}, "jku": "https://a", "x5u": "https://a", "x5c": [], "x5t": "a", "b64": False,
            "cty": "JWT", "zip": "DEF",
        }.items()
    },
    "a list": ([HEADER], "header is not an object"),
    "a text": ('"alg"', "header is not an object"),
    "no JSON": ("{alg:ES256}", "header is not JSON"),
    "a name twice": ('{"alg":"ES256","kid":"tokens","kid":"tokens"}', "header holds a name twice"),
    "deep": ("[" * 3000, "header is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_wrong_headers_are_refused(name: str) -> None:
    header, rule = WRONG_HEADERS[name]
    with pytest.raises(PurposeMismatch, match=f"jwt_svid: {rule}"):
        judge(built(header))


WRONG_CLAIMS: dict[str, tuple[object, str]] = {
    "JW-06 no sub": (claims(sub=None), "claims lack sub"),
    "sub a number": (claims(sub=7), "sub is not a text"),
    "JW-07 no aud": (claims(aud=None), "claims lack aud"),
    "empty aud": (claims(aud=""), "aud holds something other"),
    "no value in aud": (claims(aud=[]), "aud has 0 values"),
    "many in aud": (claims(aud=[str(number) for number in range(17)]), "aud has 17 values"),
    "number in aud": (claims(aud=["a", 1]), "aud holds something other"),
    "list in aud": (claims(aud=[["a"]]), "aud holds something other"),
    "aud twice": (claims(aud=["a", "a"]), "aud holds a value twice"),
    "control in aud": (claims(aud="a\n"), "aud holds something other"),
    "surrogate in aud": (claims(aud="\ud800"), "aud holds something other"),
    "JW-08 no exp": (claims(exp=None), "claims lack exp"),
    "exp a text": (claims(exp=str(CLOCK + 9)), "exp is not a whole number"),
    "exp a float": (claims(exp=CLOCK + 9.5), "exp is not a whole number"),
    "exp true": (claims(exp=True), "exp is not a whole number"),
    "exp huge": (claims(exp=2**53), "exp is not a whole number"),
    "exp NaN": ('{"sub":"spiffe://td.test/a","aud":"a","exp":NaN}', "claims is not JSON"),
    "exp infinite": ('{"sub":"spiffe://td.test/a","aud":"a","exp":Infinity}', "claims is not JSON"),
    "exp negative": (claims(exp=-1), "exp is not a whole number"),
    "iat null": (claims() | {"iat": None}, "iat is not a whole number"),
    "nbf a list": (claims(nbf=[1]), "nbf is not a whole number"),
    "iss a number": (claims(iss=1), "iss is not a text"),
    "jti empty": (claims(jti=""), "jti is not a text"),
    "another claim": (claims(groups=["admin"]), "hold a name that this key does not sign: .*groups"),
    "confirmation": (claims(cnf={}), "hold a name that this key does not sign: .*cnf"),
    "a name twice": ('{"sub":"spiffe://td.test/a","sub":"spiffe://td.test/b"}', "claims holds a name twice"),
    "nothing": ({}, "claims lack aud, exp, sub"),
    "a list": ([claims()], "claims is not an object"),
}
OUTSIDE: dict[str, tuple[object, str]] = {
    "JW-10 another domain": (claims(sub="spiffe://other.test/a"), "sub is not in trust domain td.test"),
    "no path": (claims(sub="spiffe://td.test"), "sub has no path"),
    "no SPIFFE ID": (claims(sub="alice"), "sub: "),
    "expired": (claims(exp=CLOCK), "exp lies in the past"),
    "too long": (claims(exp=CLOCK + 301), r"exp lies more than max_ttl_s \(300\) ahead"),
    "iat in the future": (claims(iat=CLOCK + 61), "iat lies in the future"),
    "iat long ago": (claims(iat=CLOCK - 361), "iat lies too far back"),
    "iat after exp": (claims(iat=CLOCK + 30, exp=CLOCK + 30), "iat does not lie before exp"),
    "nbf in the future": (claims(nbf=CLOCK + 61), "nbf lies in the future"),
    "nbf after exp": (claims(nbf=CLOCK + 30, exp=CLOCK + 20), "nbf does not lie before exp"),
}


@pytest.mark.parametrize("name", WRONG_CLAIMS)
def test_wrong_claims_are_refused(name: str) -> None:
    body, rule = WRONG_CLAIMS[name]
    with pytest.raises(PurposeMismatch, match=f"jwt_svid: .*{rule}"):
        judge(built(HEADER, body))


@pytest.mark.parametrize("name", OUTSIDE)
def test_claims_outside_the_profile_are_refused(name: str) -> None:
    body, rule = OUTSIDE[name]
    with pytest.raises(ProfileViolation, match=f"jwt_svid: {rule}"):
        judge(built(HEADER, body))


def test_jw01_only_the_signing_input_of_the_compact_form() -> None:
    good = token()
    head, _, body = good.partition(b".")
    padded = encoded("{}") + b"=" * (-len(encoded("{}")) % 4)
    for message, rule in (
        (good + b".", "two parts"),
        (good + b"." + b"AA", "two parts"),
        (head, "two parts"),
        (b"." + body, "header is not base64url"),
        (head + b".", "claims is not base64url"),
        (padded + b"." + body, "header is not base64url|alg is not"),
        (head + b"=." + body, "header is not base64url"),
        (head + b"\n." + body, "header is not base64url"),
        (head + b" ." + body, "header is not base64url"),
        (b"+/+/." + body, "header is not base64url"),
        (head[:-1] + bytes((head[-1] + 1,)) + b"." + body, "header is not"),
        (b"\xff." + body, "header is not base64url"),
        (b"_w." + body, "header is not JSON"),
        (json.dumps({"payload": body.decode(), "signatures": []}).encode(), "two parts|not base64url"),
        (head + b"." + b"A" * 8_192, "longer than 8192"),
        (LEAF.tbs(), "jwt_svid"),
        (bytes(32), "jwt_svid"),
        (b"", "two parts"),
    ):
        with pytest.raises(PurposeMismatch, match=rule):
            judge(message)


def test_trailing_bits_have_one_spelling() -> None:
    """Of the four characters that end `eyJ9`-like texts alike, one is the encoding."""
    header = encoded('{"alg": "ES256", "kid": "tokens"}  ')
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    spare = {2: 4, 3: 2}.get(len(header) % 4)
    assert spare is not None, "choose a header whose text leaves spare bits"
    at = alphabet.index(header[-1:])
    passed = []
    for number in range(1 << spare):
        other = header[:-1] + alphabet[(at & -(1 << spare)) | number :][:1]
        try:
            judge(other + b"." + encoded(claims()))
        except PurposeMismatch:
            continue
        passed.append(other)
    assert passed == [header]


def test_only_jwt_authorities_sign_tokens() -> None:
    for record in (handshake_record(), authority_record()):
        with pytest.raises(PurposeNotPermitted, match="never signs for jwt_svid"):
            judge(token(), record)
    for purpose in set(Purpose) - {Purpose.UNSPECIFIED, Purpose.JWT_SVID}:
        with pytest.raises(PurposeNotPermitted, match="jwt-authority never signs for"):
            check_request(token(), jwt_record(), purpose=purpose, scheme=P256, now=NOW)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["alg", "kid", "typ", "crit"]), _JSON | st.sampled_from(["ES256", "tokens", "JWT"])
    ),
    st.dictionaries(st.sampled_from(sorted(claims())), _JSON),
)
def test_nothing_else_comes_out(header: dict[str, Any], changes: dict[str, Any]) -> None:
    body = claims() | changes
    try:
        judge(built(header, body))
    except KeyreeveError as error:
        assert isinstance(error, (PurposeMismatch, ProfileViolation))  # noqa: PT017 - one of two
    else:
        assert header.get("alg") == "ES256"
        assert header.get("kid") == "tokens"
        assert CLOCK < body["exp"] <= CLOCK + 300


@given(st.integers(0, len(token()) - 1), st.integers(1, 255))
def test_one_changed_character_keeps_to_the_profile(at: int, change: int) -> None:
    message = bytearray(token())
    message[at] ^= change
    try:
        judge(bytes(message))
    except (PurposeMismatch, ProfileViolation):
        return
    head, body = (json.loads(base64.urlsafe_b64decode(part + b"==")) for part in bytes(message).split(b"."))
    assert head["alg"] == "ES256"
    assert head["kid"] == "tokens"
    assert body["sub"].startswith("spiffe://td.test/")
    assert CLOCK < body["exp"] <= CLOCK + 300
