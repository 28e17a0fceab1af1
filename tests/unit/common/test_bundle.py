from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.bundle import Bundle, bundle_from_proto, parse_bundle_jwks, parse_bundle_pem
from keyreeve_common.errors import InvalidRequest
from keyreeve_common.identity import TrustDomain
from keyreeve_common.x509_svid import verify_chain
from keyreeve_testing.pki import TestPki

TD = TrustDomain("example.org")
PKIS = [TestPki(), TestPki(), TestPki()]
ROOTS = tuple(pki.root for pki in PKIS)


def jwks(bundle: Bundle) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(bundle.to_jwks())
    return value


def authority(key: Any) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "root")])
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    )


ANY_BUNDLE = st.builds(
    Bundle,
    st.just(TD),
    st.lists(st.sampled_from(ROOTS), unique=True).map(tuple),
    st.integers(0, 2**63 - 1),
    st.none() | st.integers(0, 10**6).map(lambda seconds: timedelta(seconds=seconds)),
)


@given(ANY_BUNDLE)
def test_bundle_round_trips_as_jwks_and_proto(bundle: Bundle) -> None:
    assert parse_bundle_jwks(bundle.to_jwks(), TD) == bundle
    assert bundle_from_proto(bundle.to_proto()) == bundle


def test_bundle_round_trips_as_pem() -> None:
    assert parse_bundle_pem(Bundle(TD, ROOTS).to_pem(), TD) == Bundle(TD, ROOTS)


def test_x5_20_one_jwk_for_each_authority_with_its_use() -> None:
    keys = jwks(Bundle(TD, ROOTS))["keys"]
    assert len(keys) == len(ROOTS)
    assert {key["use"] for key in keys} == {"x509-svid"}


def test_x5_21_no_kid() -> None:
    assert all("kid" not in key for key in jwks(Bundle(TD, ROOTS))["keys"])


def test_x5_22_x5c_holds_exactly_one_self_signed_certificate() -> None:
    for key in jwks(Bundle(TD, ROOTS))["keys"]:
        (text,) = key["x5c"]
        certificate = x509.load_der_x509_certificate(base64.b64decode(text, validate=True))
        certificate.verify_directly_issued_by(certificate)


@pytest.mark.parametrize("change", [{"x5c": []}, {"x5c": None}, {"x5c": "x"}, {}])
def test_x5_23_entry_without_x5c_is_ignored(change: dict[str, Any]) -> None:
    document = jwks(Bundle(TD, ROOTS[:2]))
    del document["keys"][0]["x5c"]
    document["keys"][0].update(change)
    assert parse_bundle_jwks(json.dumps(document), TD).authorities == (ROOTS[1],)


def test_x5_24_only_the_first_x5c_value_counts() -> None:
    document = jwks(Bundle(TD, ROOTS[:1]))
    document["keys"][0]["x5c"].append("nonsense that nobody reads")
    assert parse_bundle_jwks(json.dumps(document), TD).authorities == ROOTS[:1]


def test_tb_01_empty_keys_mean_that_nothing_is_trusted() -> None:
    bundle = parse_bundle_jwks('{"keys": []}', TD)
    assert bundle.authorities == ()
    svid = PKIS[0].svid("/a")
    with pytest.raises(Exception, match="nothing is trusted"):
        verify_chain(svid.chain, trust_domain=TD, authorities=bundle.authorities, now=datetime.now(UTC))


@pytest.mark.parametrize(
    "document", ["", "[]", "null", "{}", '{"keys": {}}', '{"keys": [1]}', '{"keys":[],"keys":[]}', "[" * 9000]
)
def test_tb_01_what_is_no_jwk_set_is_refused(document: str) -> None:
    with pytest.raises(InvalidRequest, match="TB-01"):
        parse_bundle_jwks(document, TD)


@pytest.mark.parametrize("value", ['"1"', "1.5", "-1", "true", "null", str(2**63)])
def test_tb_02_sequence_is_a_whole_number_of_64_bits(value: str) -> None:
    assert parse_bundle_jwks(f'{{"keys": [], "spiffe_sequence": {2**63 - 1}}}', TD).sequence == 2**63 - 1
    with pytest.raises(InvalidRequest, match="TB-02"):
        parse_bundle_jwks(f'{{"keys": [], "spiffe_sequence": {value}}}', TD)


@pytest.mark.parametrize("value", ['"60"', "0.5", "-1", "false"])
def test_tb_03_refresh_hint_is_whole_seconds(value: str) -> None:
    good = parse_bundle_jwks('{"keys": [], "spiffe_refresh_hint": 60}', TD)
    assert good.refresh_interval == timedelta(seconds=60)
    with pytest.raises(InvalidRequest, match="TB-03"):
        parse_bundle_jwks(f'{{"keys": [], "spiffe_refresh_hint": {value}}}', TD)


def test_tb_04_no_other_parameter_is_needed_and_unknown_ones_do_not_matter() -> None:
    document = jwks(Bundle(TD, ROOTS[:1]))
    bare = {"keys": [{name: document["keys"][0][name] for name in ("kty", "use", "x5c")}]}
    assert parse_bundle_jwks(json.dumps(bare), TD).authorities == ROOTS[:1]
    document["future"] = {"a": 1}
    assert parse_bundle_jwks(json.dumps(document), TD).authorities == ROOTS[:1]


@pytest.mark.parametrize("key_type", ["unknown", "ec", None, 7])
def test_tb_05_unknown_kty_is_ignored(key_type: Any) -> None:
    document = jwks(Bundle(TD, ROOTS[:2]))
    document["keys"][0]["kty"] = key_type
    assert parse_bundle_jwks(json.dumps(document), TD).authorities == (ROOTS[1],)


def test_tb_05_every_key_type_has_its_kty() -> None:
    keys = [
        ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate(),
    ]
    bundle = Bundle(TD, tuple(map(authority, keys)))
    assert [key["kty"] for key in jwks(bundle)["keys"]] == ["EC", "RSA", "OKP"]
    assert parse_bundle_jwks(bundle.to_jwks(), TD) == bundle


@pytest.mark.parametrize("use", ["X509-SVID", "jwt-svid", "", None])
def test_tb_06_missing_or_unknown_use_is_ignored(use: Any) -> None:
    document = jwks(Bundle(TD, ROOTS[:2]))
    document["keys"][0]["use"] = use
    assert parse_bundle_jwks(json.dumps(document), TD).authorities == (ROOTS[1],)


def test_tb_07_no_undefined_parameters() -> None:
    for key in jwks(Bundle(TD, ROOTS))["keys"]:
        assert set(key) == {"use", "kty", "crv", "x", "y", "x5c"}


def test_tb_08_bundle_knows_its_trust_domain_and_serves_no_other() -> None:
    foreign = TestPki("other.org").svid("/a")
    bundle = Bundle(TD, (PKIS[0].root,))
    assert bundle.trust_domain == TD
    with pytest.raises(Exception, match="trust domain"):
        verify_chain(
            foreign.chain, trust_domain=bundle.trust_domain, authorities=bundle.authorities, now=datetime.now(UTC)
        )


def test_tb_09_default_refresh_is_five_minutes() -> None:
    assert Bundle(TD, ()).refresh_interval == timedelta(minutes=5)


def test_tb_02_newer_is_by_sequence() -> None:
    assert Bundle(TD, (), 2).is_newer_than(Bundle(TD, (), 1))
    assert not Bundle(TD, (), 2).is_newer_than(Bundle(TD, (), 2))


@pytest.mark.parametrize("x5c", [["!"], [7], [base64.b64encode(b"no certificate").decode()]])
def test_x5_22_damaged_certificate_is_refused(x5c: list[Any]) -> None:
    document = jwks(Bundle(TD, ROOTS[:1]))
    document["keys"][0]["x5c"] = x5c
    with pytest.raises(InvalidRequest, match="X5-22"):
        parse_bundle_jwks(json.dumps(document), TD)


def test_leaf_and_twin_are_no_authorities() -> None:
    leaf = PKIS[0].svid("/a").chain[0]
    with pytest.raises(InvalidRequest, match="X5-08"):
        Bundle(TD, (leaf,))
    with pytest.raises(InvalidRequest, match="twice"):
        Bundle(TD, (ROOTS[0], ROOTS[0]))
    with pytest.raises(InvalidRequest):
        parse_bundle_pem(ROOTS[0].public_bytes(Encoding.PEM)[:-40], TD)
