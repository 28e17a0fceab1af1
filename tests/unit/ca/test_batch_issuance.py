"""Faults in the middle of a batch: each order stands for itself, nothing is given out that is not on record, no serial is used twice."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st
from keyreeve_ca.domain.issuance import LeafOrder, build_leaf, leave_unsigned, make_serial
from keyreeve_ca.domain.records import SvidRecord, SvidState
from keyreeve_ca.issuance_service import issue_batch, issue_x509_svid
from keyreeve_ca.service import Ca, SvidOrder
from keyreeve_ca.signers.local import generate_key
from keyreeve_common.errors import (
    Conflict,
    Internal,
    InvalidRequest,
    KeyDisabled,
    KeyreeveError,
    ProfileViolation,
    StorageBusy,
    Unavailable,
)
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.schemes import KeyType
from keyreeve_testing.pki import TestPki

TD = TrustDomain("example.org")
KEY = ec.generate_private_key(ec.SECP256R1()).public_key()


def order(ca: Ca, number: int, **changes: Any) -> SvidOrder:
    fields: dict[str, Any] = {
        "profile": ca.policy.workload,
        "spiffe_id": SpiffeId(TD, f"/w/{number}"),
        "public_key": KEY,
        "subject": f"s{number}",
        "key_id": f"k{number}",
        **changes,
    }
    return SvidOrder(**fields)


def states(rig: Any) -> dict[str, SvidState]:
    """By path; the authorities' own records are left out."""
    return {each.spiffe_id.path: each.state for each in rig.store.list_svids() if each.spiffe_id.path}


def codes(outcomes: Sequence[Any]) -> list[str]:
    return [each.code.value if isinstance(each, KeyreeveError) else "issued" for each in outcomes]


def test_batch_is_verified_recorded_and_in_order(rig: Any) -> None:
    outcomes = issue_batch(rig.ca, [order(rig.ca, number) for number in range(5)])
    issuer = rig.ca.store.list_authorities()[1].certificate
    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome, SvidRecord)
        leaf = x509.load_der_x509_certificate(outcome.chain_der[0])
        leaf.verify_directly_issued_by(issuer)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"spiffe://example.org/w/{number}"]
        assert f"{leaf.serial_number:x}" == outcome.serial
        assert rig.store.current_svid(f"s{number}") == outcome


def test_bad_orders_cost_the_others_nothing(rig: Any) -> None:
    ca = rig.ca
    (authority,) = (each for each in ca.store.list_authorities() if not each.root)
    orders = [
        order(ca, 0),
        order(ca, 1, spiffe_id=SpiffeId(TrustDomain("elsewhere.test"), "/w/1")),
        order(ca, 2, public_key=authority.certificate.public_key()),
        order(ca, 3, spiffe_id=SpiffeId(TD, "/keyreeve/agent/x")),
        order(ca, 4, ttl=timedelta(seconds=-1)),
        order(ca, 5),
    ]
    outcomes = issue_batch(ca, orders)
    assert isinstance(outcomes[1], InvalidRequest)
    assert isinstance(outcomes[2], ProfileViolation)
    assert "x5_07" in str(outcomes[2])
    assert all(isinstance(each, KeyreeveError) for each in outcomes[1:5])
    assert states(rig) == {"/w/0": SvidState.ISSUED, "/w/5": SvidState.ISSUED}


def test_serial_that_was_used_before_costs_one_order(rig: Any) -> None:
    drawn = [secrets.token_bytes(16) for _ in range(3)]
    used = iter([drawn[0], drawn[1], drawn[0], drawn[2]])  # the third repeats the first
    ca = replace(rig.ca, entropy=lambda count: next(used))
    outcomes = issue_batch(ca, [order(ca, number) for number in range(4)])
    assert codes(outcomes) == ["issued", "issued", "conflict", "issued"]
    assert isinstance(outcomes[2], Conflict)
    assert set(states(rig)) == {"/w/0", "/w/1", "/w/3"}
    assert len({each.serial for each in outcomes if isinstance(each, SvidRecord)}) == 3


def test_nothing_is_signed_before_every_intent_is_on_record(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sign_many = rig.cluster.sign_many
    seen: list[dict[str, SvidState]] = []

    def watched(*arguments: Any, **named: Any) -> Any:
        seen.append(states(rig))
        return sign_many(*arguments, **named)

    monkeypatch.setattr(rig.cluster, "sign_many", watched)
    issue_batch(rig.ca, [order(rig.ca, number) for number in range(3)])
    assert seen == [{f"/w/{number}": SvidState.INTENDED for number in range(3)}]


def test_database_that_is_lost_before_the_intents_leaves_nothing_signed(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed: list[Any] = []

    def busy(*_: Any) -> None:
        raise StorageBusy("locked")

    monkeypatch.setattr(rig.cluster, "sign_many", lambda *a, **k: signed.append(a))
    monkeypatch.setattr(rig.store, "record_intents", busy)
    assert codes(issue_batch(rig.ca, [order(rig.ca, n) for n in range(3)])) == ["storage_busy"] * 3
    assert signed == []
    assert states(rig) == {}


def test_crash_between_intent_and_result_keeps_the_intents(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> None:
        raise Unavailable("the database died here")

    with monkeypatch.context() as patched:
        patched.setattr(rig.store, "record_results", lost)
        assert codes(issue_batch(rig.ca, [order(rig.ca, n) for n in range(3)])) == ["unavailable"] * 3
    assert set(states(rig).values()) == {SvidState.INTENDED}
    assert rig.store.last_not_after("k1") is not None  # what was perhaps signed counts for its key
    assert rig.store.current_svid("s1") is None
    again = issue_batch(rig.ca, [order(rig.ca, n) for n in range(3)])
    assert codes(again) == ["issued"] * 3
    assert len([each for each in rig.store.list_svids() if each.spiffe_id.path]) == 6


def test_key_cluster_that_is_lost_in_the_middle_fails_those_without_an_answer(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_many = rig.cluster.sign_many

    def halfway(*arguments: Any, messages: Sequence[bytes]) -> list[Any]:
        return [*sign_many(*arguments, messages=messages[:2]), Unavailable("lost"), KeyDisabled("off")]

    monkeypatch.setattr(rig.cluster, "sign_many", halfway)
    outcomes = issue_batch(rig.ca, [order(rig.ca, number) for number in range(4)])
    assert codes(outcomes) == ["issued", "issued", "unavailable", "key_disabled"]
    assert states(rig)["/w/2"] is states(rig)["/w/3"] is SvidState.FAILED
    failures = {each.spiffe_id.path: each.failure for each in rig.store.list_svids()}
    assert "lost" in failures["/w/2"]


def test_signature_of_another_order_is_not_taken(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sign_many = rig.cluster.sign_many

    def exchanged(*arguments: Any, messages: Sequence[bytes]) -> list[Any]:
        first, second, third = sign_many(*arguments, messages=messages)
        return [second, first, third]

    monkeypatch.setattr(rig.cluster, "sign_many", exchanged)
    outcomes = issue_batch(rig.ca, [order(rig.ca, number) for number in range(3)])
    assert codes(outcomes) == ["internal", "internal", "issued"]
    assert isinstance(outcomes[0], Internal)


@pytest.mark.parametrize("signature", [b"", b"\x30", b"x" * 70, secrets.token_bytes(512)])
def test_signature_that_is_none_is_internal(rig: Any, monkeypatch: pytest.MonkeyPatch, signature: bytes) -> None:
    monkeypatch.setattr(rig.cluster, "sign_many", lambda *a, messages: [signature] * len(messages))
    assert codes(issue_batch(rig.ca, [order(rig.ca, 1)])) == ["internal"]
    assert states(rig) == {"/w/1": SvidState.FAILED}


def test_without_an_active_authority_every_order_says_so(bare_rig: Any) -> None:
    assert codes(issue_batch(bare_rig.ca, [order(bare_rig.ca, n) for n in range(2)])) == ["failed_precondition"] * 2


def test_many_callers_at_once(rig: Any) -> None:
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda number: issue_x509_svid(rig.ca, order(rig.ca, number)), range(60)))
    assert [each.spiffe_id.path for each in found] == [f"/w/{number}" for number in range(60)]
    assert len({each.serial for each in found}) == 60


ISSUERS = {each: generate_key(each) for each in (KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048, KeyType.ED25519)}


@settings(max_examples=40, deadline=None)
@given(
    entropy=st.binary(min_size=16, max_size=16),
    path=st.from_regex(r"(/[a-z0-9._-]{1,40}){1,8}", fullmatch=True).filter(lambda path: "/." not in path),
    names=st.lists(st.from_regex(r"[a-z]{1,20}\.test", fullmatch=True), max_size=8, unique=True),
    kind=st.sampled_from([KeyType.RSA_2048, KeyType.ED25519]),
)
def test_assembled_certificate_is_the_one_that_the_builder_makes(
    entropy: bytes, path: str, names: list[str], kind: KeyType
) -> None:
    """With schemes that give one signature for one message, to the last byte."""
    pki, key = TestPki(), ISSUERS[kind]
    begin = pki.issuing.not_valid_before_utc
    leaf = LeafOrder(SpiffeId(TD, path), KEY, make_serial(entropy), begin, begin + timedelta(hours=1), tuple(names))
    builder = build_leaf(leaf, pki.issuing)
    unsigned = leave_unsigned(builder, key.public_key())
    tbs = unsigned.tbs_der
    if isinstance(key, rsa.RSAPrivateKey):
        signature, expected = (
            key.sign(tbs, padding.PKCS1v15(), hashes.SHA256()),
            builder.sign(key, hashes.SHA256(), rsa_padding=padding.PKCS1v15()),
        )
    else:
        signature, expected = key.sign(tbs), builder.sign(key, None)
    assert unsigned.signed(signature).public_bytes(Encoding.DER) == expected.public_bytes(Encoding.DER)


@pytest.mark.parametrize(("kind", "chosen"), [(KeyType.EC_P256, hashes.SHA256()), (KeyType.EC_P384, hashes.SHA384())])
def test_assembled_certificate_of_an_ecdsa_authority(kind: KeyType, chosen: hashes.HashAlgorithm) -> None:
    pki, key = TestPki(), ISSUERS[kind]
    begin = pki.issuing.not_valid_before_utc
    leaf = LeafOrder(SpiffeId(TD, "/w"), KEY, make_serial(bytes(16)), begin, begin + timedelta(hours=1))
    unsigned = leave_unsigned(build_leaf(leaf, pki.issuing), key.public_key())
    made = unsigned.signed(key.sign(unsigned.tbs_der, ec.ECDSA(chosen)))
    key.public_key().verify(made.signature, made.tbs_certificate_bytes, ec.ECDSA(chosen))
    assert made.signature_hash_algorithm is not None
    assert made.signature_hash_algorithm.name == chosen.name
    assert made.tbs_certificate_bytes == build_leaf(leaf, pki.issuing).sign(key, chosen).tbs_certificate_bytes
