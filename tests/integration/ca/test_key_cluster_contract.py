"""The contract of the port KeyCluster, over the one in this process and over a real key server."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_der_public_key
from keyreeve_ca.domain.issuance import (
    AuthorityOrder,
    authority_subject,
    build_authority,
    leave_unsigned,
    make_serial,
    sign_builder,
)
from keyreeve_ca.signers.key_cluster import GrpcKeyCluster, local_replica
from keyreeve_ca.signers.local import InMemoryKeyCluster
from keyreeve_client.key_admin import AuthorityKind, AuthorityProfile, KeySpec, KeyState
from keyreeve_common.errors import (
    Conflict,
    FailedPrecondition,
    InvalidRequest,
    KeyDisabled,
    KeyreeveError,
    MessageTooLarge,
    NotFound,
    Unavailable,
)
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_common.verification import verify_signature
from keyreeve_testing.keyserver import KeyServerRig

TD = TrustDomain("example.org")
HOLDER = SpiffeId(TD, "/keyreeve/agent/a")
PURPOSES = frozenset({Purpose.TLS13_SERVER_VERIFY, Purpose.TLS13_CLIENT_VERIFY})
SPEC = KeySpec("contract-1", KeyType.EC_P256, KeyRole.HANDSHAKE, PURPOSES, "spiffe://example.org/web")


@pytest.fixture(scope="module", params=["memory", "key server"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if request.param == "memory":
        yield InMemoryKeyCluster(lambda: datetime.now(UTC))
        return
    rig = KeyServerRig(tmp_path_factory.mktemp("ks"))
    with rig.running(initialised=False):
        made = GrpcKeyCluster([local_replica(rig.admin_socket)])
        yield made
        made.close()


def soon() -> datetime:
    return (datetime.now(UTC) + timedelta(hours=1)).replace(microsecond=0)


def test_same_request_id_gives_the_same_key(cluster: Any) -> None:
    first = cluster.create_key(SPEC)
    assert cluster.create_key(SPEC) == first
    assert (first.key_type, first.role, first.purposes, first.state) == (
        KeyType.EC_P256,
        KeyRole.HANDSHAKE,
        PURPOSES,
        KeyState.ENABLED,
    )
    with pytest.raises(Conflict):
        cluster.create_key(KeySpec("contract-1", KeyType.EC_P384, KeyRole.HANDSHAKE, PURPOSES))


def test_states(cluster: Any) -> None:
    key_id = cluster.create_key(SPEC).key_id
    for _ in range(2):
        cluster.disable_key(key_id)
        assert cluster.get_key(key_id).state is KeyState.DISABLED
    for _ in range(2):
        cluster.enable_key(key_id)
        assert cluster.get_key(key_id).state is KeyState.ENABLED
    with pytest.raises(NotFound):
        cluster.get_key("nobody")


def test_life_of_a_grant(cluster: Any) -> None:
    key_id = cluster.create_key(SPEC).key_id
    until = soon()
    made = cluster.create_grant(key_id, HOLDER, purposes=PURPOSES, expires_at=until)
    assert (made.holder, made.expires_at, made.is_revoked) == (str(HOLDER), until, False)
    later = until + timedelta(minutes=5)
    assert cluster.extend_grant(key_id, HOLDER, expires_at=later).expires_at == later
    assert [each.expires_at for each in cluster.list_grants(key_id=key_id, holder=HOLDER)] == [later]
    revoked = cluster.revoke_grant(key_id, HOLDER)
    assert revoked.is_revoked
    assert cluster.revoke_grant(key_id, HOLDER).revoked_at == revoked.revoked_at
    assert cluster.list_grants(holder=HOLDER)[0].revoked_at == revoked.revoked_at
    with pytest.raises((FailedPrecondition, NotFound)):
        cluster.extend_grant(key_id, HOLDER, expires_at=later)
    assert not cluster.create_grant(key_id, HOLDER, purposes=PURPOSES, expires_at=None).is_revoked


def test_bad_grants(cluster: Any) -> None:
    key_id = cluster.create_key(SPEC).key_id
    stranger = SpiffeId(TD, "/keyreeve/agent/stranger")
    with pytest.raises(InvalidRequest):
        cluster.create_grant(key_id, HOLDER, purposes=frozenset({Purpose.X509_CERTIFICATE}), expires_at=None)
    with pytest.raises(InvalidRequest):
        cluster.create_grant(key_id, HOLDER, purposes=PURPOSES, expires_at=datetime(2020, 1, 1, tzinfo=UTC))
    for call in (cluster.revoke_grant, lambda *at: cluster.extend_grant(*at, expires_at=soon())):
        with pytest.raises(NotFound):
            call(key_id, stranger)
    assert cluster.list_grants(holder=stranger) == []


def test_authority_key_signs_certificates_through_a_builder(cluster: Any) -> None:
    subject = authority_subject(TD, root=True, number=77)
    profile = AuthorityProfile(
        TD, AuthorityKind.ROOT, subject.public_bytes(), timedelta(days=400), timedelta(hours=1), 1
    )
    spec = KeySpec(
        "contract-root",
        KeyType.EC_P256,
        KeyRole.AUTHORITY,
        frozenset({Purpose.X509_CERTIFICATE}),
        authority_profile=profile,
    )
    made = cluster.create_key(spec)
    key = cluster.private_key(made.key_id, made.spki_der)
    now = datetime.now(UTC).replace(microsecond=0)
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1 << 100)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(True, 1), True)
        .add_extension(usage, True)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(TD.id))]), False)
    )
    certificate = sign_builder(builder, key)
    certificate.verify_directly_issued_by(certificate)
    cluster.disable_key(made.key_id)
    with pytest.raises(KeyDisabled):
        sign_builder(builder, key)


def test_no_replica_is_unavailable(tmp_path: Path) -> None:
    away = GrpcKeyCluster([local_replica(tmp_path / "a.sock"), local_replica(tmp_path / "b.sock")])
    with pytest.raises(Unavailable):
        away.get_key("k")
    away.close()
    with pytest.raises(Unavailable):
        GrpcKeyCluster([]).get_key("k")


def test_second_replica_serves_when_the_first_is_away(tmp_path: Path) -> None:
    rig = KeyServerRig(tmp_path / "ks")
    with rig.running(initialised=False):
        both = GrpcKeyCluster([local_replica(tmp_path / "away.sock"), local_replica(rig.admin_socket)])
        assert both.create_key(SPEC).key_id
        with pytest.raises(KeyreeveError):
            both.get_key("nobody")
        both.close()


def test_rotation_gives_one_successor_with_the_grants(cluster: Any) -> None:
    spec = KeySpec("rotated-1", KeyType.EC_P256, KeyRole.HANDSHAKE, PURPOSES, "spiffe://example.org/rotated")
    first = cluster.create_key(spec)
    made = cluster.create_grant(first.key_id, HOLDER, purposes=PURPOSES, expires_at=soon())
    second = cluster.rotate_key(first.key_id, request_id="rotated-2")
    assert cluster.rotate_key(first.key_id, request_id="rotated-2").key_id == second.key_id != first.key_id
    assert (second.key_type, second.role, second.purposes, second.label) == (
        first.key_type,
        first.role,
        first.purposes,
        first.label,
    )
    (copy,) = cluster.list_grants(key_id=second.key_id, holder=HOLDER)
    assert (copy.purposes, copy.expires_at) == (made.purposes, made.expires_at)
    with pytest.raises(Conflict):
        cluster.rotate_key(first.key_id, request_id="rotated-3")
    cluster.retire_key(first.key_id, at=soon())
    assert cluster.get_key(first.key_id).state is KeyState.ENABLED
    cluster.disable_key(first.key_id)
    with pytest.raises(FailedPrecondition):
        cluster.retire_key(first.key_id, at=soon())


def make_root_key(cluster: Any, number: int) -> Any:
    subject = authority_subject(TD, root=True, number=number)
    profile = AuthorityProfile(
        TD, AuthorityKind.ROOT, subject.public_bytes(), timedelta(days=400), timedelta(hours=1), 1
    )
    purposes = frozenset({Purpose.X509_CERTIFICATE})
    spec = KeySpec(f"contract-many-{number}", KeyType.EC_P256, KeyRole.AUTHORITY, purposes, authority_profile=profile)
    return cluster.create_key(spec)


def root_tbs(spki_der: bytes, number: int, serial: int) -> bytes:
    """What the authority may sign: its own certificate."""
    public_key: Any = load_der_public_key(spki_der)
    now = datetime.now(UTC).replace(microsecond=0)
    order = AuthorityOrder(
        TD, authority_subject(TD, root=True, number=number), public_key, serial, now, now + timedelta(days=30)
    )
    return leave_unsigned(build_authority(order), public_key).tbs_der


@pytest.mark.parametrize("count", [1, 3, 150])
def test_many_signatures_come_in_their_order(cluster: Any, count: int) -> None:
    made = make_root_key(cluster, 80)
    messages = [root_tbs(made.spki_der, 80, make_serial(secrets.token_bytes(16))) for _ in range(count)]
    scheme = SignatureScheme.ECDSA_SECP256R1_SHA256
    results = cluster.sign_many(made.key_id, scheme, Purpose.X509_CERTIFICATE, messages=messages)
    for message, result in zip(messages, results, strict=True):
        assert isinstance(result, bytes), result
        verify_signature(load_der_public_key(made.spki_der), scheme, message, signature=result)


def test_nothing_is_signed_for_nothing(cluster: Any) -> None:
    scheme = SignatureScheme.ECDSA_SECP256R1_SHA256
    assert cluster.sign_many("nobody", scheme, Purpose.X509_CERTIFICATE, messages=[]) == []


@pytest.mark.parametrize("count", [1, 2])
def test_key_that_is_not_there_is_each_items_error(cluster: Any, count: int) -> None:
    scheme = SignatureScheme.ECDSA_SECP256R1_SHA256
    results = cluster.sign_many("nobody", scheme, Purpose.X509_CERTIFICATE, messages=[b"tbs"] * count)
    assert len(results) == count
    assert all(isinstance(each, NotFound) for each in results)


def test_item_that_is_refused_costs_the_others_nothing(tmp_path: Path) -> None:
    """Only the key server knows what a TBSCertificate is."""
    rig = KeyServerRig(tmp_path / "ks")
    with rig.running(initialised=False):
        cluster = GrpcKeyCluster([local_replica(rig.admin_socket)])
        made = make_root_key(cluster, 81)
        good = root_tbs(made.spki_der, 81, make_serial(bytes(16)))
        messages = [good, b"no certificate", b"x" * 70_000, good]
        scheme = SignatureScheme.ECDSA_SECP256R1_SHA256
        results = cluster.sign_many(made.key_id, scheme, Purpose.X509_CERTIFICATE, messages=messages)
        assert [isinstance(each, bytes) for each in results] == [True, False, False, True]
        assert isinstance(results[2], MessageTooLarge)
        cluster.close()


def test_replica_that_is_away_costs_no_item(tmp_path: Path) -> None:
    rig = KeyServerRig(tmp_path / "ks")
    with rig.running(initialised=False):
        alone = GrpcKeyCluster([local_replica(rig.admin_socket)])
        made = make_root_key(alone, 82)
        alone.close()
        gone, here = local_replica(tmp_path / "nobody.sock"), local_replica(rig.admin_socket)
        cluster = GrpcKeyCluster([gone, here])
        messages = [root_tbs(made.spki_der, 82, make_serial(secrets.token_bytes(16))) for _ in range(5)]
        scheme = SignatureScheme.ECDSA_SECP256R1_SHA256
        results = cluster.sign_many(made.key_id, scheme, Purpose.X509_CERTIFICATE, messages=messages)
        assert all(isinstance(each, bytes) for each in results)
        cluster.close()
        lost = GrpcKeyCluster([gone])
        results = lost.sign_many(made.key_id, scheme, Purpose.X509_CERTIFICATE, messages=messages)
        assert all(isinstance(each, Unavailable) for each in results)
        lost.close()
