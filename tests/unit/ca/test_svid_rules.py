"""X5-01 to X5-19, ID-16, ID-20 to ID-23: what the CA issues, what its lint refuses, what validators refuse."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID
from keyreeve_ca.assignment_service import ensure_svid
from keyreeve_ca.domain.issuance import (
    LeafOrder,
    authority_subject,
    build_leaf,
    check_issued,
    make_serial,
    sign_builder,
    validity,
)
from keyreeve_ca.domain.svid_lint import RULES, LintContext, check_svid, lint_svid, spki_hash
from keyreeve_ca.entry_service import create_entry
from keyreeve_ca.own_svids import issue_service_svid
from keyreeve_ca.service import current_bundle
from keyreeve_common.errors import FailedPrecondition, Internal, InvalidRequest, ProfileViolation, SvidInvalid
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.x509_svid import parse_x509_svid, tls_name_of, verify_chain
from keyreeve_testing.pki import TestPki

TD = TrustDomain("example.org")
KEY = ec.generate_private_key(ec.SECP256R1())


def chain_of(rig: Any, path: str = "/web", **changes: Any) -> list[x509.Certificate]:
    entry = create_entry(rig.ca, rig.entry(path, **changes))
    _, record = ensure_svid(rig.ca, entry)
    return [x509.load_der_x509_certificate(der) for der in record.chain_der]


def extension(certificate: x509.Certificate, kind: type[Any]) -> Any:
    return certificate.extensions.get_extension_for_class(kind)


def verify(rig: Any, chain: list[x509.Certificate]) -> Any:
    return verify_chain(chain, trust_domain=TD, authorities=current_bundle(rig.ca).authorities, now=rig.clock.now)


def authorities(rig: Any) -> tuple[Any, Any]:
    root, issuing = rig.store.list_authorities()
    return root, issuing


def test_x5_01_exactly_one_uri_san_and_dns_sans(rig: Any) -> None:
    (leaf, _) = chain_of(rig, dns_names=("web.example.org", "*.example.org"))
    names = extension(leaf, x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://example.org/web"]
    assert names.get_values_for_type(x509.DNSName) == ["*.example.org", "web.example.org"]


def test_x5_04_an_entry_has_a_path(rig: Any) -> None:
    with pytest.raises(InvalidRequest, match="X5-04"):
        rig.entry("")


def test_x5_05_empty_subject_and_critical_san(rig: Any) -> None:
    (leaf, _) = chain_of(rig)
    assert not list(leaf.subject)
    assert extension(leaf, x509.SubjectAlternativeName).critical


def test_x5_06_and_id_20_21_authorities_carry_the_trust_domains_id(rig: Any) -> None:
    for authority in authorities(rig):
        names = extension(authority.certificate, x509.SubjectAlternativeName).value
        assert [name.value for name in names] == ["spiffe://example.org"]


def test_x5_07_authority_keys_get_no_leaf(rig: Any) -> None:
    for authority in authorities(rig):
        with pytest.raises(ProfileViolation, match="x5_07"):
            issue_service_svid(rig.ca, SpiffeId(TD, "/keyreeve/x"), authority.certificate.public_key())


def test_x5_08_and_11_authorities_are_cas_that_sign_certificates(rig: Any) -> None:
    root, issuing = authorities(rig)
    for authority, path_length in ((root, 1), (issuing, 0)):
        constraints = extension(authority.certificate, x509.BasicConstraints)
        usage = extension(authority.certificate, x509.KeyUsage)
        assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, path_length)
        assert usage.critical
        assert usage.value.key_cert_sign
        assert usage.value.crl_sign
        assert not usage.value.digital_signature


def test_x5_09_10_12_13_leaf_signs_and_nothing_else(rig: Any) -> None:
    (leaf, _) = chain_of(rig)
    constraints, usage = extension(leaf, x509.BasicConstraints), extension(leaf, x509.KeyUsage)
    assert not constraints.value.ca
    assert constraints.value.path_length is None
    assert usage.critical
    names = (
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
    )
    assert usage.value.digital_signature
    assert not any(getattr(usage.value, name) for name in names)


def test_x5_14_15_both_extended_usages(rig: Any) -> None:
    (leaf, _) = chain_of(rig)
    assert set(extension(leaf, x509.ExtendedKeyUsage).value) == {
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    }


def test_x5_16_path_validation_against_the_own_bundle_and_no_other(rig: Any) -> None:
    chain = chain_of(rig)
    assert verify(rig, chain).spiffe_id == SpiffeId(TD, "/web")
    with pytest.raises(SvidInvalid):
        verify_chain(chain, trust_domain=TD, authorities=[TestPki().root], now=rig.clock.now)
    with pytest.raises(Exception, match="trust domain"):
        verify_chain(
            chain,
            trust_domain=TrustDomain("other.org"),
            authorities=current_bundle(rig.ca).authorities,
            now=rig.clock.now,
        )


def test_x5_19_no_name_constraints_by_default(rig: Any) -> None:
    for authority in authorities(rig):
        assert ExtensionOID.NAME_CONSTRAINTS not in {each.oid for each in authority.certificate.extensions}


def test_x5_20_bundle_holds_the_self_signed_root(rig: Any) -> None:
    bundle = current_bundle(rig.ca)
    assert bundle.authorities == (authorities(rig)[0].certificate,)
    assert bundle.sequence == 1
    bundle.authorities[0].verify_directly_issued_by(bundle.authorities[0])


def test_id_16_longest_id_goes_through_certificate_and_store(rig: Any) -> None:
    path = "/" + "a" * (2048 - len("spiffe://example.org/"))
    chain = chain_of(rig, path)
    assert len(str(verify(rig, chain).spiffe_id)) == 2048
    assert len(rig.store.list_entries(spiffe_id=SpiffeId(TD, path))) == 1


def test_id_22_and_23_id_and_key_are_inside_the_signed_part(rig: Any) -> None:
    (leaf, issuing) = chain_of(rig)
    leaf.verify_directly_issued_by(issuing)
    assert b"spiffe://example.org/web" in leaf.tbs_certificate_bytes


def test_back_date_serial_and_cap(rig: Any) -> None:
    (leaf, issuing) = chain_of(rig)
    assert leaf.not_valid_before_utc == rig.clock.now.replace(microsecond=0) - timedelta(seconds=10) or (
        leaf.not_valid_before_utc == issuing.not_valid_before_utc
    )
    assert 64 <= leaf.serial_number.bit_length() <= 159
    rig.clock.now = issuing.not_valid_after_utc - timedelta(minutes=10)
    (late, _) = chain_of(rig, "/late")
    assert late.not_valid_after_utc == issuing.not_valid_after_utc


def test_expired_authority_issues_nothing(rig: Any) -> None:
    issuing = authorities(rig)[1]
    rig.clock.now = issuing.not_after
    with pytest.raises(FailedPrecondition, match="expired"):
        chain_of(rig)


def test_reserved_names_for_services_only(rig: Any) -> None:
    for path in ("/keyreeve", "/keyreeve/ca", "/keyreeve/agent/n1"):
        with pytest.raises(InvalidRequest, match="reserved"):
            rig.entry(path)
    rig.entry("/keyreeves")
    record = issue_service_svid(rig.ca, SpiffeId(TD, "/keyreeve/ca"), KEY.public_key())
    names = extension(x509.load_der_x509_certificate(record.chain_der[0]), x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [tls_name_of(SpiffeId(TD, "/keyreeve/ca"))]


# --- validators: [val] lines, on certificates that this CA would never issue ---

_NOW = TestPki().root.not_valid_before_utc + timedelta(days=2)


def crafted(
    uris: list[str], *, ca: bool = False, usage: tuple[str, ...] = ("digital_signature",), critical: bool = True
) -> x509.Certificate:
    fields = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    fields += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(KEY.public_key())
        .serial_number(5)
        .not_valid_before(_NOW)
        .not_valid_after(_NOW + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([*names, x509.DNSName("x.example.org")]), critical=False)
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(x509.KeyUsage(*(each in usage for each in fields)), critical=critical)
    )
    return sign_builder(builder, KEY)


def test_crafted_control_is_accepted() -> None:
    assert parse_x509_svid(crafted(["spiffe://example.org/a"]))


@pytest.mark.parametrize("second", ["spiffe://example.org/b", "https://example.org/"])
def test_x5_02_two_uri_sans_are_refused(second: str) -> None:
    with pytest.raises(SvidInvalid, match="X5-02"):
        parse_x509_svid(crafted(["spiffe://example.org/a", second]))


def test_x5_03_no_uri_san_is_refused() -> None:
    with pytest.raises(SvidInvalid, match="X5-03"):
        parse_x509_svid(crafted([]))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"ca": True}, "X5-17"),
        ({"usage": ("digital_signature", "key_cert_sign")}, "X5-17"),
        ({"usage": ("digital_signature", "crl_sign")}, "X5-17"),
        ({"usage": ("key_agreement",)}, "X5-12"),
        ({"critical": False}, "X5-10"),
    ],
)
def test_x5_17_leaf_that_could_be_a_ca_is_refused(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(SvidInvalid, match=rule):
        parse_x509_svid(crafted(["spiffe://example.org/a"], **options))


@pytest.mark.parametrize(
    "uri", ["https://example.org/a", "spiffe://example.org", "spiffe://example.org/", "spiffe://td:1/a"]
)
def test_x5_18_other_scheme_and_id_without_path_are_refused(uri: str) -> None:
    with pytest.raises(SvidInvalid):
        parse_x509_svid(crafted([uri]))


# --- the lint: every rule is broken once ---


def context(rig: Any, **changes: Any) -> LintContext:
    fields: dict[str, Any] = {
        "trust_domain": TD,
        "issuer": authorities(rig)[1].certificate,
        "now": rig.clock.now,
        "max_life": timedelta(hours=24),
        **changes,
    }
    return LintContext(**fields)


def lint_leaf(rig: Any, **changes: Any) -> x509.Certificate:
    issuer = authorities(rig)[1].certificate
    start, end = validity(rig.clock.now, timedelta(hours=1), backdate=timedelta(seconds=10), issuer=issuer)
    fields: dict[str, Any] = {
        "spiffe_id": SpiffeId(TD, "/web"),
        "public_key": KEY.public_key(),
        "serial": make_serial(b"\x55" * 16),
        "not_before": start,
        "not_after": end,
        **changes,
    }
    return sign_builder(build_leaf(LeafOrder(**fields), issuer), ec.generate_private_key(ec.SECP256R1()))


def test_lint_accepts_what_the_builder_builds(rig: Any) -> None:
    assert lint_svid(lint_leaf(rig), context(rig)) == ()
    check_svid(lint_leaf(rig), context(rig))


WEAK = rsa.RSAPublicNumbers(3, rsa.generate_private_key(65537, 2048).public_key().public_numbers().n).public_key()
BROKEN: dict[str, Callable[[Any], tuple[x509.Certificate, LintContext]]] = {
    "serial_has_64_bits_and_at_most_20_octets": lambda rig: (lint_leaf(rig, serial=7), context(rig)),
    "issuer_is_the_authority": lambda rig: (lint_leaf(rig), context(rig, issuer=TestPki().root)),
    "x5_04_path": lambda rig: (lint_leaf(rig, spiffe_id=TD.id), context(rig)),
    "spiffe_id_in_trust_domain": lambda rig: (lint_leaf(rig), context(rig, trust_domain=TrustDomain("other.org"))),
    "reserved_path_for_agents_and_services": lambda rig: (
        lint_leaf(rig, spiffe_id=SpiffeId(TD, "/keyreeve/ca")),
        context(rig),
    ),
    "reserved_dns_zone": lambda rig: (lint_leaf(rig, dns_names=("id-x.keyreeve.invalid",)), context(rig)),
    "validity_within_profile": lambda rig: (
        lint_leaf(rig, not_after=rig.clock.now + timedelta(hours=30)),
        context(rig),
    ),
    "not_after_within_authority": lambda rig: (
        lint_leaf(rig, not_after=authorities(rig)[1].not_after + timedelta(seconds=1)),
        context(rig, max_life=timedelta(days=900)),
    ),
    "not_after_in_the_future": lambda rig: (lint_leaf(rig), context(rig, now=rig.clock.now + timedelta(hours=2))),
    "not_before_not_too_far_back": lambda rig: (
        lint_leaf(rig, not_before=rig.clock.now - timedelta(hours=2)),
        context(rig),
    ),
    "not_before_not_in_the_future": lambda rig: (
        lint_leaf(rig, not_before=rig.clock.now + timedelta(minutes=2)),
        context(rig),
    ),
    "key_is_strong": lambda rig: (lint_leaf(rig, public_key=WEAK), context(rig)),
    "x5_07_key_is_no_authority_and_not_blocked": lambda rig: (
        lint_leaf(rig),
        context(rig, blocked=frozenset({spki_hash(KEY.public_key())})),
    ),
    "key_type_is_offered": lambda rig: (
        lint_leaf(rig, public_key=ec.generate_private_key(ec.SECP521R1()).public_key()),
        context(rig),
    ),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_lint_names_the_broken_rule(rig: Any, rule: str) -> None:
    certificate, held_against = BROKEN[rule](rig)
    assert rule in lint_svid(certificate, held_against)
    with pytest.raises(ProfileViolation, match=rule):
        check_svid(certificate, held_against)


def test_lint_of_a_certificate_that_is_no_svid_at_all(rig: Any) -> None:
    bare = sign_builder(
        x509.CertificateBuilder()
        .subject_name(authority_subject(TD, root=True, number=9))
        .issuer_name(authority_subject(TD, root=True, number=9))
        .public_key(KEY.public_key())
        .serial_number(1)
        .not_valid_before(_NOW)
        .not_valid_after(_NOW + timedelta(days=1000)),
        KEY,
    )
    broken = set(lint_svid(bare, context(rig)))
    assert {
        "x5_01_one_uri_san",
        "x5_09_ca_false",
        "x5_10_key_usage_critical",
        "x5_15_both_extended_key_usages",
    } <= broken
    assert {"x5_12_digital_signature_only", "x5_13_no_cert_sign_no_crl_sign", "ski_is_of_the_key"} <= broken
    assert {"aki_names_the_authority", "extensions_are_known", "x5_05_empty_subject_and_critical_san"} <= broken
    assert broken <= set(RULES)


def test_close_primes_are_found(rig: Any) -> None:
    # 2048 bits from two neighbouring 1024-bit odd numbers: Fermat finds them whether or not they are prime
    left = (1 << 1023) + 1155 * 2 + 1
    numbers = rsa.RSAPublicNumbers(65537, left * (left + 2))
    assert "key_is_strong" in lint_svid(lint_leaf(rig, public_key=numbers.public_key()), context(rig))


def test_signature_over_something_else_is_not_released(rig: Any) -> None:
    issuer = authorities(rig)[1].certificate
    linted = lint_leaf(rig)
    with pytest.raises(Internal, match="something else"):
        check_issued(lint_leaf(rig, serial=make_serial(b"\x11" * 16)), linted, issuer)
    with pytest.raises(Internal, match="does not verify"):
        check_issued(linted, linted, issuer)
