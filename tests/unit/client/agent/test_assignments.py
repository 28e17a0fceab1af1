"""What the CA pushes: each assignment stands on its own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keyreeve_client.agent.assignments import AgentState, CurrentKeys, parse_assignments, parse_bundle
from keyreeve_client.agent.authorisation import Selector
from keyreeve_common.errors import ErrorCode, KeyNotFound, SvidExpired, SvidInvalid
from keyreeve_common.identity import TrustDomain
from keyreeve_common.key_id import KeyId
from keyreeve_common.v1 import ca_pb2, types_pb2
from keyreeve_testing.pki import TestPki

TD = TrustDomain("example.org")
PKI = TestPki("example.org")
FOREIGN = TestPki("example.org")
KEY = ec.generate_private_key(ec.SECP256R1())
ME = frozenset({Selector("unix", "uid:1")})


def spki(key: ec.EllipticCurvePrivateKey = KEY) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def assignment(**changes: Any) -> ca_pb2.Assignment:
    values: dict[str, Any] = {
        "entry_id": "e",
        "spiffe_id": "spiffe://example.org/web",
        "selectors": [ca_pb2.Selector(type="unix", value="uid:1")],
        "key_id": "key-web",
        "spki_der": spki(),
        "chain_der": PKI.svid("/web", key=KEY).chain_der,
        **changes,
    }
    return ca_pb2.Assignment(**values)


def parse(*assignments: ca_pb2.Assignment, now: datetime | None = None) -> AgentState:
    return parse_assignments(
        ca_pb2.Assignments(sequence=3, assignments=assignments),
        trust_domain=TD,
        authorities=[PKI.root],
        now=now or datetime.now(UTC),
    )


def test_a_good_one() -> None:
    state = parse(assignment())
    assert state.refused == ()
    assert state.by_key[KeyId("key-web")].spki_der == spki()
    CurrentKeys(state).check(KeyId("key-web"), ME)


OF_VERSION_6 = PKI.svid("/web", key=KEY).chain_der[0].replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x05", 1)
BAD = [
    pytest.param({"spiffe_id": "spiffe://example.org/db"}, ErrorCode.SVID_INVALID, id="another SPIFFE ID"),
    pytest.param({"spki_der": spki(ec.generate_private_key(ec.SECP256R1()))}, ErrorCode.SVID_INVALID, id="another key"),
    pytest.param(
        {"chain_der": FOREIGN.svid("/web", key=KEY).chain_der}, ErrorCode.SVID_INVALID, id="foreign authority"
    ),
    pytest.param({"chain_der": PKI.expired_svid("/web").chain_der}, ErrorCode.SVID_EXPIRED, id="expired"),
    pytest.param(
        {"chain_der": PKI.svid("/web", key=KEY, spiffe_id="spiffe://other.org/web").chain_der},
        ErrorCode.FOREIGN_TRUST_DOMAIN,
        id="foreign trust domain",
    ),
    pytest.param({"chain_der": PKI.ca_leaf("/web").chain_der}, ErrorCode.SVID_INVALID, id="CA certificate"),
    pytest.param({"chain_der": []}, ErrorCode.SVID_INVALID, id="no chain"),
    pytest.param({"chain_der": [b"junk"]}, ErrorCode.SVID_INVALID, id="junk chain"),
    pytest.param({"chain_der": [OF_VERSION_6]}, ErrorCode.SVID_INVALID, id="no such X.509 version"),
    pytest.param({"key_id": "Not A Key"}, ErrorCode.INVALID_REQUEST, id="bad key id"),
    pytest.param({"spiffe_id": "https://x"}, ErrorCode.SPIFFE_ID_INVALID, id="bad SPIFFE ID"),
    pytest.param(
        {"delegates": [ca_pb2.Delegate(spiffe_id="nonsense")]}, ErrorCode.SPIFFE_ID_INVALID, id="bad delegate"
    ),
    pytest.param(
        {"error": types_pb2.Error(code="rate_limited", detail="later")}, ErrorCode.RATE_LIMITED, id="not issued"
    ),
]


@pytest.mark.parametrize(("changes", "code"), BAD)
def test_a_bad_one_is_refused_and_the_others_go_on(changes: dict[str, Any], code: ErrorCode) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    good = assignment(
        entry_id="good",
        spiffe_id="spiffe://example.org/good",
        key_id="key-good",
        spki_der=spki(other),
        chain_der=PKI.svid("/good", key=other).chain_der,
    )
    state = parse(assignment(**changes), good)
    assert [(refused.entry_id, refused.error.code) for refused in state.refused] == [("e", code)]
    assert [item.entry_id for item in state.assignments] == ["good"]
    with pytest.raises(KeyNotFound):
        CurrentKeys(state).check(KeyId("key-web"), ME)


def test_an_expired_svid_is_named_only_to_those_who_may_use_the_key() -> None:
    keys = CurrentKeys(parse(assignment()), clock=lambda: datetime.now(UTC) + timedelta(hours=2))
    with pytest.raises(SvidExpired):
        keys.check(KeyId("key-web"), ME)
    with pytest.raises(KeyNotFound):
        keys.check(KeyId("key-web"), frozenset({Selector("unix", "uid:2")}))


def test_the_freshest_of_two_counts() -> None:
    later = datetime.now(UTC) + timedelta(hours=3)
    fresh = assignment(entry_id="fresh", chain_der=PKI.svid("/web", key=KEY, not_after=later).chain_der)
    state = parse(fresh, assignment())
    found = state.of_spiffe_id(state.assignments[0].spiffe_id)
    assert found is not None
    assert found.entry_id == "fresh"
    assert state.by_key[KeyId("key-web")].entry_id == "fresh"


def test_bundles() -> None:
    assert parse_bundle(types_pb2.Bundle(trust_domain="example.org", x509_authorities_der=PKI.bundle_der), TD)
    for bad in (
        types_pb2.Bundle(trust_domain="other.org", x509_authorities_der=PKI.bundle_der),
        types_pb2.Bundle(trust_domain="example.org"),
        types_pb2.Bundle(trust_domain="example.org", x509_authorities_der=[b"junk"]),
        types_pb2.Bundle(trust_domain="example.org", x509_authorities_der=PKI.svid("/web").chain_der),
    ):
        with pytest.raises(SvidInvalid):
            parse_bundle(bad, TD)


def test_former_key_is_used_by_whom_the_entry_names_and_goes_with_it() -> None:
    """A proxy that has not reloaded since its key was rotated."""
    keys = CurrentKeys(parse(assignment(former_key_ids=["key-old"])))
    keys.check(KeyId("key-old"), ME)
    keys.check(KeyId("key-web"), ME)
    for nobody in (frozenset(), frozenset({Selector("unix", "uid:2")})):
        with pytest.raises(KeyNotFound):
            keys.check(KeyId("key-old"), nobody)
    assert [each.key_id for each in keys.state.assignments] == ["key-web"]
    with pytest.raises(KeyNotFound):
        CurrentKeys(parse(assignment())).check(KeyId("key-old"), ME)
    assert parse(assignment(former_key_ids=["NOT A KEY ID"])).refused
