"""What a worker makes of answers that no honest Vault gives: never a signature of another key version, never a crash."""

from __future__ import annotations

import base64
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import (
    Conflict,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    KeyNotFound,
    KeyreeveError,
    KeyTypeNotSupported,
    SealedRecordInvalid,
    TokenUnavailable,
)
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_keyserver.backends.vault_transit import Transit
from keyreeve_keyserver.backends.worker_frames import Box, TokenSignItem

REF = "keyreeve-0123-v1"
SIGNATURE = base64.b64encode(b"s" * 64).decode()


class Session:
    """Answers `get` and `post` from tables by path; what is not there is not found."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.posted: list[tuple[str, dict[str, Any]]] = []

    def get(self, path: str, *, doing: str) -> Any:
        return self._answer("get")

    def post(self, path: str, body: dict[str, Any], *, doing: str) -> Any:
        self.posted.append((path, body))
        return self._answer("post")

    def delete(self, path: str, *, doing: str) -> Any:
        return self._answer("delete")

    def _answer(self, kind: str) -> Any:
        answer = self.answers.get(kind, KeyNotFound("nothing here"))
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if isinstance(answer, KeyreeveError):
            raise answer
        return answer


def transit(**answers: Any) -> Transit:
    return Transit(Session(**answers), mount="transit", key_prefix="keyreeve-")  # type: ignore[arg-type]


def item(message: bytes = b"m", **changes: Any) -> TokenSignItem:
    fields: dict[str, Any] = {
        "ref": REF,
        "scheme": SignatureScheme.ECDSA_SECP256R1_SHA256,
        "deadline_us": int((time.monotonic() + 10) * 1_000_000),
        "message": message,
    }
    return TokenSignItem(**{**fields, **changes})


def sign(results: Any, *items: TokenSignItem) -> list[bytes | KeyreeveError]:
    return transit(post={"data": {"batch_results": results}}).sign(items or [item()])


def test_items_of_one_key_and_scheme_go_in_one_call() -> None:
    good = {"signature": f"vault:v1:{SIGNATURE}", "key_version": 1}
    made = transit(post={"data": {"batch_results": [good, good]}})
    items = [item(b"a"), item(b"b"), item(b"c", ref="keyreeve-4567-v1"), item(b"d", deadline_us=0)]
    outcomes = made.sign(items)
    assert outcomes[:2] == [b"s" * 64] * 2
    assert isinstance(outcomes[2], Internal)  # one item, two results
    assert isinstance(outcomes[3], DeadlineExceeded)
    (path, body), _ = made._session.posted  # type: ignore[attr-defined]
    assert path == "transit/sign/keyreeve-0123"
    assert body == {
        "hash_algorithm": "sha2-256",
        "marshaling_algorithm": "asn1",
        "key_version": 1,
        "prehashed": False,
        "batch_input": [{"input": "YQ=="}, {"input": "Yg=="}],
    }


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (SignatureScheme.ED25519, {}),
        (
            SignatureScheme.RSA_PSS_RSAE_SHA384,
            {"hash_algorithm": "sha2-384", "signature_algorithm": "pss", "salt_length": "hash"},
        ),
        (
            SignatureScheme.RSA_PKCS1_SHA512,
            {"hash_algorithm": "sha2-512", "signature_algorithm": "pkcs1v15", "salt_length": "hash"},
        ),
    ],
)
def test_no_default_of_vault_decides_what_a_signature_is(scheme: SignatureScheme, expected: dict[str, str]) -> None:
    made = transit(post={"data": {"batch_results": []}})
    made.sign([item(scheme=scheme)])
    ((_, body),) = made._session.posted  # type: ignore[attr-defined]
    assert {name: body[name] for name in body.keys() - {"key_version", "prehashed", "batch_input"}} == expected


@pytest.mark.parametrize(
    "result",
    [
        {"signature": f"vault:v2:{SIGNATURE}", "key_version": 2},
        {"signature": f"vault:v2:{SIGNATURE}", "key_version": 1},
        {"signature": f"vault:v1:{SIGNATURE}", "key_version": 2},
        {"signature": f"vault:v1:{SIGNATURE}\n", "key_version": 1},
        {"signature": SIGNATURE},
        {"signature": 7},
        {},
        None,
        "vault:v1:",
    ],
)
def test_signature_of_another_version_or_form_is_refused(result: Any) -> None:
    (outcome,) = sign([result])
    assert isinstance(outcome, Internal)


def test_errors_of_single_items_stay_with_them_and_are_not_repeated() -> None:
    quoted = {"error": "cannot sign 'secret words'", "key_version": 0}
    missing = {"error": "requested version for signing is higher than the latest key version"}
    good = {"signature": f"vault:v1:{SIGNATURE}", "key_version": 1}
    first, second, third = sign([quoted, missing, good], item(b"a"), item(b"b"), item(b"c"))
    assert isinstance(first, Internal)
    assert "secret" not in first.detail
    assert isinstance(second, KeyNotFound)
    assert third == b"s" * 64


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)
_RESULT = st.dictionaries(st.sampled_from(["signature", "key_version", "error"]), _JSON)


@given(
    answer=_JSON | st.fixed_dictionaries({"data": st.fixed_dictionaries({"batch_results": st.lists(_RESULT | _JSON)})})
)
def test_any_answer_is_a_typed_error(answer: Any) -> None:
    if not isinstance(answer, dict):
        answer = {"data": answer}
    (outcome,) = transit(post=answer).sign([item()])
    assert isinstance(outcome, KeyreeveError)


@given(data=st.dictionaries(st.sampled_from(["type", "keys", "exportable", "allow_plaintext_backup"]), _JSON))
def test_any_description_of_a_key_is_a_typed_error(data: dict[str, Any]) -> None:
    with pytest.raises(KeyreeveError):
        transit(get={"data": data}).find(REF)


def _key(**changes: Any) -> dict[str, Any]:
    entry = {"public_key": base64.b64encode(bytes(32)).decode()}
    fields = {"type": "ed25519", "exportable": False, "allow_plaintext_backup": False, "keys": {"1": entry}}
    return {"data": {**fields, **changes}}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"exportable": True}, FailedPrecondition),
        ({"allow_plaintext_backup": True}, FailedPrecondition),
        ({"imported_key": True}, FailedPrecondition),
        ({"type": "ecdsa-p256"}, FailedPrecondition),
        ({"keys": {"2": {"public_key": ""}}}, KeyNotFound),
        ({"keys": {"1": {"public_key": "%"}}}, KeyTypeNotSupported),
    ],
)
def test_key_that_is_not_as_asked_for_is_not_given_out(changes: dict[str, Any], kind: type[KeyreeveError]) -> None:
    with pytest.raises(kind):
        transit(get=[KeyNotFound("no"), _key(**changes)], post={}, delete={}).create(REF, KeyType.ED25519)


def test_name_that_is_taken_is_a_conflict() -> None:
    with pytest.raises(Conflict):
        transit(get=_key()).create(REF, KeyType.ED25519)


@pytest.mark.parametrize("ref", ["keyreeve-0123", "keyreeve-0123-v0", "keyreeve-0123-v1x", "a/../b-v1", "v1"])
def test_reference_that_names_no_version_is_refused(ref: str) -> None:
    with pytest.raises(SealedRecordInvalid):
        transit(get=_key()).find(ref)


def test_box_that_is_no_text_is_a_record_of_another_key() -> None:
    box = Box(decrypt=True, label="kek", nonce=bytes(12), associated=b"h", data=b"\xff" * 40)
    with pytest.raises(SealedRecordInvalid):
        transit().box(box)


def test_mount_of_another_kind_is_named() -> None:
    with pytest.raises(TokenUnavailable, match="is a Transit engine"):
        transit(get={"data": None}).find(REF)
