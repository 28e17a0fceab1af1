"""A parent authority outside of the key cluster: what it signs is held to what was asked for, and its root joins the bundle in time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from keyreeve_ca.authority_service import activate_authority, make_root, prepare_authority
from keyreeve_ca.domain.authority import AuthorityState, active_authority
from keyreeve_ca.service import current_bundle
from keyreeve_common.errors import FailedPrecondition, KeyreeveError, ProfileViolation, Unavailable
from keyreeve_common.purposes import Purpose

START = datetime(2026, 6, 1, 12, 0, 0, tzinfo=UTC)  # where the rig's clock begins
YEAR = timedelta(days=365)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _ca(subject: x509.Name, public_key: Any, issuer: x509.Name, *, path_length: int | None) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(x509.KeyUsage(*[index in (5, 6) for index in range(9)]), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


@dataclass
class FakeUpstream:
    """Signs as asked, unless a test makes it lie. `root_path_length` and `parent` shape its root."""

    name: str = "fake"
    life: timedelta = 10 * YEAR
    root_path_length: int | None = None
    root_extensions: tuple[x509.ExtensionType, ...] = ()
    self_signed: bool = True
    public_key: Any = None
    subject: x509.Name | None = None
    uri: str = ""
    path_length: int = 0
    longer: timedelta = timedelta(0)
    signer: Any = None
    extensions: tuple[x509.ExtensionType, ...] = ()
    failure: KeyreeveError | None = None
    requests: list[x509.CertificateSigningRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.renew_root("first root")

    def renew_root(self, name: str) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        issuer = _name(name if self.self_signed else "another")
        builder = _ca(_name(name), self.key.public_key(), issuer, path_length=self.root_path_length)
        for extension in self.root_extensions:
            builder = builder.add_extension(extension, critical=True)
        builder = builder.not_valid_before(START - timedelta(days=1)).not_valid_after(START + self.life)
        self.root = builder.sign(self.key, hashes.SHA256())

    def fetch_root(self) -> x509.Certificate:
        if self.failure is not None:
            raise self.failure
        return self.root

    def sign_authority(self, csr_der: bytes, *, not_after: datetime, backdate: timedelta) -> x509.Certificate:
        csr = x509.load_der_x509_csr(csr_der)
        assert csr.is_signature_valid
        self.requests.append(csr)
        uris = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(self.uri)]) if self.uri else uris
        public_key = self.public_key or csr.public_key()
        builder = _ca(self.subject or csr.subject, public_key, self.root.subject, path_length=self.path_length)
        builder = builder.not_valid_before(START - backdate).not_valid_after(not_after + self.longer)
        builder = builder.add_extension(san, critical=False)
        for extension in self.extensions:
            builder = builder.add_extension(extension, critical=True)
        return builder.sign(self.signer or self.key, hashes.SHA256())


def below(rig: Any, upstream: FakeUpstream) -> Any:
    """The rig with this upstream."""
    return replace(rig, ca=replace(rig.ca, upstream=upstream))


def test_issuing_authority_is_signed_by_the_upstream(bare_rig: Any) -> None:
    upstream = FakeUpstream()
    rig = below(bare_rig, upstream)
    root = make_root(rig.ca)
    assert (root.certificate, root.is_upstream) == (upstream.root, True)
    assert make_root(rig.ca) == root
    made = prepare_authority(rig.ca)
    assert made.state is AuthorityState.ACTIVE
    made.certificate.verify_directly_issued_by(upstream.root)
    assert current_bundle(rig.ca).authorities == (upstream.root,)
    (request,) = upstream.requests
    assert request.subject == made.certificate.subject
    key = rig.cluster.get_key(made.key_id)
    assert key.purposes == {Purpose.X509_CERTIFICATE, Purpose.CERTIFICATE_REQUEST}
    (grant,) = rig.cluster.list_grants(key_id=made.key_id)
    assert grant.purposes == key.purposes
    (record,) = rig.store.list_svids(serial=f"{made.certificate.serial_number:x}")
    assert record.chain_der


def test_new_root_of_the_upstream_joins_the_bundle_when_the_next_authority_is_prepared(bare_rig: Any) -> None:
    upstream = FakeUpstream()
    rig = below(bare_rig, upstream)
    make_root(rig.ca)
    first_root = upstream.root
    prepare_authority(rig.ca)
    upstream.renew_root("second root")
    fresh = prepare_authority(rig.ca)
    assert set(current_bundle(rig.ca).authorities) == {first_root, upstream.root}
    assert active_authority(rig.store.list_authorities()).authority_id != fresh.authority_id
    activate_authority(rig.ca, fresh.authority_id)
    fresh.certificate.verify_directly_issued_by(upstream.root)


def test_ca_with_a_root_of_its_own_moves_to_an_upstream_at_the_next_rotation(bare_rig: Any) -> None:
    rig = bare_rig
    own = make_root(rig.ca)
    prepare_authority(rig.ca)
    upstream = FakeUpstream()
    moved = replace(rig.ca, upstream=upstream)
    fresh = prepare_authority(moved)
    fresh.certificate.verify_directly_issued_by(upstream.root)
    assert set(current_bundle(moved).authorities) == {own.certificate, upstream.root}


LIES: dict[str, dict[str, Any]] = {
    "key_is_the_requested_one": {"public_key": ec.generate_private_key(ec.SECP256R1()).public_key()},
    "subject_is_the_requested_one": {"subject": _name("somebody else")},
    "not_after_is_not_later_than_requested": {"longer": timedelta(seconds=1)},
    "signature_is_of_the_root": {"signer": ec.generate_private_key(ec.SECP256R1())},
    "path_length_is_bounded": {"path_length": 1},
    "id_20_uri_is_the_trust_domain": {"uri": "spiffe://other.org"},
}


@pytest.mark.parametrize("rule", LIES)
def test_certificate_that_was_not_asked_for_is_refused(bare_rig: Any, rule: str) -> None:
    rig = below(bare_rig, FakeUpstream(**LIES[rule]))
    make_root(rig.ca)
    with pytest.raises(ProfileViolation, match=rule):
        prepare_authority(rig.ca)
    assert not any(not each.root for each in rig.store.list_authorities())


_CONSTRAINTS = x509.NameConstraints(permitted_subtrees=[x509.DNSName("example.org")], excluded_subtrees=None)


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ({"self_signed": False}, "not self-signed"),
        ({"root_path_length": 0}, "path length is 0"),
        ({"life": timedelta(0)}, "has expired"),
        ({"root_extensions": (_CONSTRAINTS,)}, "name constraints"),
    ],
)
def test_root_that_cannot_be_one_is_refused(bare_rig: Any, shape: dict[str, Any], rule: str) -> None:
    rig = below(bare_rig, FakeUpstream(**shape))
    with pytest.raises(FailedPrecondition, match=rule):
        make_root(rig.ca)
    assert rig.store.list_authorities() == []


def test_name_constraints_of_the_issued_certificate_are_refused(bare_rig: Any) -> None:
    rig = below(bare_rig, FakeUpstream(extensions=(_CONSTRAINTS,)))
    make_root(rig.ca)
    with pytest.raises(FailedPrecondition, match="name constraints"):
        prepare_authority(rig.ca)


def test_upstream_that_is_away_leaves_the_active_authority_as_it_is(bare_rig: Any) -> None:
    upstream = FakeUpstream()
    rig = below(bare_rig, upstream)
    make_root(rig.ca)
    active = prepare_authority(rig.ca)
    upstream.failure = Unavailable("away")
    with pytest.raises(Unavailable):
        prepare_authority(rig.ca)
    assert active_authority(rig.store.list_authorities()) == active
    upstream.failure = None
    prepare_authority(rig.ca)
