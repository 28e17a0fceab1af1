"""The first minutes of an installation, and the catalog on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from keyreeve_common.grpc_edge import error_from_rpc
from keyreeve_common.v1 import keyserver_pb2, types_pb2
from keyreeve_keyserver.domain.der import INTEGER, SEQUENCE, encode
from keyreeve_testing.keyserver import KeyServerRig, verify_p256
from keyreeve_testing.postgres import PostgresServer, postgres_is_installed, running_postgres
from sqlalchemy import make_url

SUBJECT = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "example.org root")])


def root_request() -> dict[str, object]:
    profile = keyserver_pb2.AuthorityProfile(
        trust_domain="example.org",
        kind=keyserver_pb2.AuthorityProfile.KIND_ROOT,
        subject_der=SUBJECT.public_bytes(),
        max_path_length=1,
    )
    profile.max_validity.FromTimedelta(timedelta(days=3650))
    profile.max_backdate.FromTimedelta(timedelta(hours=1))
    return {
        "role": keyserver_pb2.KEY_ROLE_AUTHORITY,
        "purposes": [types_pb2.PURPOSE_X509_CERTIFICATE, types_pb2.PURPOSE_CERTIFICATE_REQUEST],
        "authority_profile": profile,
        "label": "root",
    }


def certification_request_info(spki_der: bytes) -> bytes:
    return encode(SEQUENCE, encode(INTEGER, b"\x00"), SUBJECT.public_bytes(), spki_der, encode(0xA0))


def test_operator_makes_and_uses_an_authority_before_any_svid_exists(tmp_path: Path) -> None:
    with KeyServerRig(tmp_path / "ks").running(initialised=False) as rig, rig.local() as local:
        root = rig.create_key("root", **root_request())
        assert root.authority_profile.max_path_length == 1
        message = certification_request_info(root.spki_der)
        purpose = types_pb2.PURPOSE_CERTIFICATE_REQUEST
        verify_p256(root.spki_der, local.sign(root.key_id, purpose=purpose, message=message), message)
        assert rig.process.wait_event("local_signature")["key_id"] == root.key_id
        with pytest.raises(grpc.RpcError) as refused:
            local.sign(root.key_id)
        assert error_from_rpc(refused.value).code.value == "purpose_not_permitted"


def test_profile_of_a_foreign_trust_domain_is_refused(tmp_path: Path) -> None:
    with KeyServerRig(tmp_path / "ks").running(initialised=False) as rig:
        request = root_request()
        request["authority_profile"].trust_domain = "evil.example"  # type: ignore[attr-defined]
        with pytest.raises(grpc.RpcError) as refused:
            rig.create_key("root", **request)
        assert "not example.org" in error_from_rpc(refused.value).detail


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    if not postgres_is_installed():
        pytest.skip("PostgreSQL is not installed")
    with running_postgres() as server:
        yield server


@pytest.mark.postgres
def test_two_replicas_share_a_postgresql_catalog(tmp_path: Path, postgres: PostgresServer) -> None:
    """A key made and a grant revoked at one are known at the other; a database outage stops no signature."""
    url = make_url(postgres.make_database()).set(drivername="postgresql")
    catalog = f'url = "{url.render_as_string()}"\nbusy_timeout = "1s"'
    first = KeyServerRig(tmp_path / "a", catalog=catalog)
    second = KeyServerRig(tmp_path / "b", catalog=catalog, pki=first.pki)
    with first.running(), second.running():
        agent = first.pki.svid("keyreeve/agent/a")
        key = first.create_key()
        first.grant(key.key_id, agent.spiffe_id)
        with second.caller(agent) as stubs:
            _until(lambda: stubs.sign(key.key_id), accepted=True)
            first.revoke(key.key_id, agent.spiffe_id)
            assert _until(lambda: stubs.sign(key.key_id), accepted=False) < 1.0
            first.grant(key.key_id, agent.spiffe_id)
            _until(lambda: stubs.sign(key.key_id), accepted=True)
            postgres.stop()
            try:
                second.process.wait_event("catalog_not_readable")
                verify_p256(key.spki_der, stubs.sign(key.key_id))
                with pytest.raises(grpc.RpcError) as refused:
                    second.create_key("during the outage".replace(" ", "-"))
                assert error_from_rpc(refused.value).code.value == "unavailable"
            finally:
                postgres.start()
            second.process.wait_event("catalog_readable_again")
            assert second.create_key("after").key_id


def _until(call: object, *, accepted: bool) -> float:
    """Calls until the answer is as wanted; how long that took."""
    from time import monotonic

    assert callable(call)
    began = monotonic()
    while monotonic() - began < 5:
        try:
            call()
        except grpc.RpcError:
            if not accepted:
                return monotonic() - began
        else:
            if accepted:
                return monotonic() - began
    raise AssertionError("the answer did not change within 5 s")
