"""Signatures through real processes: supervisor, signer, front end; mTLS with SVIDs of the test PKI."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from time import monotonic
from typing import Any

import grpc
import pytest
from keyreeve_common.errors import KeyreeveError
from keyreeve_common.grpc_edge import error_from_rpc
from keyreeve_common.jws import build_jwt_signing_input
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.v1 import keyserver_pb2, types_pb2
from keyreeve_testing.keyserver import MESSAGE, KeyServerRig, Stubs, sign_item, verify_p256
from keyreeve_testing.pki import Svid, TestPki

AGENT, OTHER = "keyreeve/agent/a", "keyreeve/agent/b"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyServerRig]:
    with KeyServerRig(tmp_path_factory.mktemp("ks")).running() as running:
        yield running


@pytest.fixture(scope="module")
def agent(rig: KeyServerRig) -> Svid:
    return rig.pki.svid(AGENT)


@pytest.fixture(scope="module")
def key(rig: KeyServerRig, agent: Svid) -> keyserver_pb2.Key:
    made = rig.create_key("shared")
    rig.grant(made.key_id, agent.spiffe_id)
    return made


def refusal(stubs: Stubs, key_id: str, **changes: Any) -> KeyreeveError:
    with pytest.raises(grpc.RpcError) as refused:
        stubs.sign(key_id, **changes)
    return error_from_rpc(refused.value)


def first_refusal(call: Callable[[], object], *, within: float) -> KeyreeveError:
    """Calls again and again until a call is refused."""
    deadline = monotonic() + within
    while monotonic() < deadline:
        try:
            call()
        except grpc.RpcError as error:
            return error_from_rpc(error)
    raise AssertionError(f"nothing was refused within {within} s")


class Stream:
    """A SignStream, driven by hand."""

    def __init__(self, stubs: Stubs) -> None:
        self._out: SimpleQueue[keyserver_pb2.SignBatch | None] = SimpleQueue()
        self.call = stubs.signing.SignStream(iter(self._out.get, None))

    def send(self, *items: keyserver_pb2.SignItem) -> None:
        self._out.put(keyserver_pb2.SignBatch(items=items))

    def receive(self, count: int) -> dict[int, keyserver_pb2.SignResult]:
        found: dict[int, keyserver_pb2.SignResult] = {}
        while len(found) < count:
            found.update({result.id: result for result in next(self.call).results})
        return found

    def ask(self, *items: keyserver_pb2.SignItem) -> dict[int, keyserver_pb2.SignResult]:
        self.send(*items)
        return self.receive(len(items))

    def close(self) -> None:
        self._out.put(None)
        assert list(self.call) == []


def test_unary_signature_verifies(rig: KeyServerRig, agent: Svid, key: keyserver_pb2.Key) -> None:
    with rig.caller(agent) as stubs:
        verify_p256(key.spki_der, stubs.sign(key.key_id))


def test_stream_of_full_batches(rig: KeyServerRig, agent: Svid, key: keyserver_pb2.Key) -> None:
    with rig.caller(agent) as stubs:
        stream = Stream(stubs)
        for start in range(0, 1024, 256):
            stream.send(*(sign_item(start + number, key.key_id) for number in range(256)))
        results = stream.receive(1024)
        for result in results.values():
            verify_p256(key.spki_der, result.signature)
        stream.close()
    with rig.local() as local:
        assert local.keys.GetKey(keyserver_pb2.GetKeyRequest(key_id=key.key_id)).signatures >= 1024


def test_one_refused_item_fails_alone(rig: KeyServerRig, agent: Svid, key: keyserver_pb2.Key) -> None:
    wrong = {
        2: {"message": b"not a CertificateVerify"},
        3: {"scheme": 0x0807},
        4: {"purpose": types_pb2.PURPOSE_TLS13_CLIENT_VERIFY},
        5: {"purpose": types_pb2.PURPOSE_X509_CERTIFICATE},
        6: {"message": b"x" * 65_537},
        7: {"scheme": 0x10000},
        8: {"purpose": 99},
        11: {"purpose": types_pb2.PURPOSE_UNSPECIFIED},
    }
    with rig.caller(agent) as stubs:
        stream = Stream(stubs)
        unknown, malformed = sign_item(9, "k-" + "a" * 26), sign_item(10, "No Such Form")
        bad = [sign_item(number, key.key_id, **changes) for number, changes in wrong.items()]
        results = stream.ask(sign_item(1, key.key_id), *bad, unknown, malformed)
        verify_p256(key.spki_der, results[1].signature)
        assert {number: result.error.code for number, result in results.items() if number > 1} == {
            2: "purpose_mismatch",
            3: "scheme_not_supported",
            4: "purpose_not_permitted",
            5: "purpose_not_permitted",
            6: "message_too_large",
            7: "scheme_not_supported",
            8: "purpose_not_permitted",
            9: "key_not_found",
            10: "invalid_request",
            11: "purpose_not_permitted",
        }
        assert "65536" in results[6].error.detail
        assert "allow only these" in results[11].error.detail
        stream.close()
    refused = rig.process.wait_event("sign_refused", lambda entry: entry.get("code") == "purpose_mismatch")
    assert refused["caller"] == agent.spiffe_id
    assert refused["key_id"] == key.key_id
    assert MESSAGE[:32].decode() not in str(refused)


def test_too_many_items_end_the_stream(rig: KeyServerRig, agent: Svid, key: keyserver_pb2.Key) -> None:
    with rig.caller(agent) as stubs:
        stream = Stream(stubs)
        with pytest.raises(grpc.RpcError) as refused:
            stream.ask(*(sign_item(number, key.key_id) for number in range(257)))
        assert "at most 256" in error_from_rpc(refused.value).detail


def test_duplicate_ids_are_refused(rig: KeyServerRig, agent: Svid, key: keyserver_pb2.Key) -> None:
    with rig.caller(agent) as stubs:
        stream = Stream(stubs)
        stream.send(sign_item(1, key.key_id), sign_item(1, key.key_id))
        assert stream.receive(1)[1].error.code == "invalid_request"
        assert stream.ask(sign_item(1, key.key_id))[1].signature
        stream.close()


def test_unknown_and_forbidden_key_look_alike(rig: KeyServerRig, key: keyserver_pb2.Key) -> None:
    with rig.caller(rig.pki.svid(OTHER)) as stubs:
        forbidden, unknown = refusal(stubs, key.key_id), refusal(stubs, "k-" + "b" * 26)
        assert (type(forbidden), forbidden.code, forbidden.detail, forbidden.retry_after) == (
            type(unknown),
            unknown.code,
            unknown.detail,
            unknown.retry_after,
        )
        assert forbidden.code.value == "key_not_found"


def test_revocation_is_in_force_at_once(rig: KeyServerRig, agent: Svid) -> None:
    made = rig.create_key("revoked")
    rig.grant(made.key_id, agent.spiffe_id)
    with rig.caller(agent) as stubs:
        stream = Stream(stubs)
        assert stream.ask(sign_item(1, made.key_id))[1].signature
        rig.revoke(made.key_id, agent.spiffe_id)
        assert stream.ask(sign_item(2, made.key_id))[2].error.code == "key_not_found"
        stream.close()


def test_revocation_by_another_process_within_a_second(rig: KeyServerRig, agent: Svid) -> None:
    from keyreeve_common.key_id import KeyId
    from keyreeve_keyserver.catalog.catalog import Catalog
    from sqlalchemy import URL

    made = rig.create_key("revoked-elsewhere")
    rig.grant(made.key_id, agent.spiffe_id)
    url = URL.create("sqlite", database=str(rig.state / "catalog.sqlite3"))
    other = Catalog.open(url, busy_timeout=timedelta(seconds=5))
    with rig.caller(agent) as stubs:
        stubs.sign(made.key_id)
        other.revoke_grant(KeyId(made.key_id), agent.spiffe_id, now=datetime.now(UTC))
        revoked_at = monotonic()
        refused = first_refusal(lambda: stubs.sign(made.key_id), within=5)
        took = monotonic() - revoked_at
    other.close()
    assert refused.code.value == "key_not_found"
    assert took < 1.0


def test_grant_expires(rig: KeyServerRig, agent: Svid) -> None:
    made = rig.create_key("expiring")
    request = keyserver_pb2.CreateGrantRequest(
        key_id=made.key_id, holder=agent.spiffe_id, purposes=[types_pb2.PURPOSE_TLS13_SERVER_VERIFY]
    )
    request.expires_at.FromDatetime(datetime.now(UTC) + timedelta(seconds=1))
    with rig.local() as local, rig.caller(agent) as stubs:
        local.grants.CreateGrant(request)
        stubs.sign(made.key_id)
        refused = first_refusal(lambda: stubs.sign(made.key_id), within=5)
    assert refused.code.value == "key_not_found"


def test_client_without_certificate_is_refused(rig: KeyServerRig) -> None:
    with rig.caller(None) as stubs, pytest.raises(grpc.RpcError) as refused:
        stubs.health.Check(keyserver_pb2.HealthRequest(), timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("kind", ["expired", "ca leaf", "foreign root", "foreign id under our root"])
def test_bad_svids_are_refused(rig: KeyServerRig, key: keyserver_pb2.Key, kind: str) -> None:
    svid = {
        "expired": lambda: rig.pki.expired_svid(AGENT),
        "ca leaf": lambda: rig.pki.ca_leaf(AGENT),
        "foreign root": lambda: TestPki("example.org").svid(AGENT),
        "foreign id under our root": lambda: rig.pki.svid(AGENT, spiffe_id=f"spiffe://evil.example/{AGENT}"),
    }[kind]()
    expected = {"ca leaf": "svid_invalid", "foreign id under our root": "foreign_trust_domain"}.get(kind, "unavailable")
    with rig.caller(svid) as stubs:
        assert refusal(stubs, key.key_id).code.value == expected


def test_svid_that_expires_on_an_open_stream(rig: KeyServerRig, key: keyserver_pb2.Key) -> None:
    svid = rig.pki.svid(AGENT, not_after=datetime.now(UTC) + timedelta(seconds=3))
    with rig.caller(svid) as stubs:
        stream = Stream(stubs)
        assert stream.ask(sign_item(0, key.key_id))[0].signature
        numbers = count(1)
        refused = first_refusal(lambda: stream.ask(sign_item(next(numbers), key.key_id)), within=10)
        assert refused.code.value == "svid_expired"


def test_agents_may_not_administer(rig: KeyServerRig, agent: Svid, key: keyserver_pb2.Key) -> None:
    with rig.caller(agent) as stubs:
        calls = [
            lambda: stubs.keys.ListKeys(keyserver_pb2.ListKeysRequest()),
            lambda: stubs.grants.ListGrants(keyserver_pb2.ListGrantsRequest()),
            lambda: stubs.identity.GetCsr(keyserver_pb2.GetCsrRequest()),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert error_from_rpc(refused.value).code.value == "permission_denied"
        said = stubs.health.Check(keyserver_pb2.HealthRequest())
        assert said.serving
        # Release, backends and missing protections are not for everyone who may connect.
        assert (said.version, list(said.backends), "protections" in said.detail) == ("", [], False)


def test_the_ca_may_administer(rig: KeyServerRig, key: keyserver_pb2.Key) -> None:
    with rig.caller(rig.pki.svid("keyreeve/ca")) as stubs:
        listed = stubs.keys.ListKeys(keyserver_pb2.ListKeysRequest(page_size=1000))
        assert key.key_id in [entry.key_id for entry in listed.keys]
        assert stubs.identity.GetCsr(keyserver_pb2.GetCsrRequest()).csr_der


def test_local_operator_signs_no_handshake(rig: KeyServerRig, key: keyserver_pb2.Key) -> None:
    with rig.local() as local:
        assert refusal(local, key.key_id).code.value == "purpose_not_permitted"


def test_disabled_key(rig: KeyServerRig, agent: Svid) -> None:
    made = rig.create_key("disabled")
    rig.grant(made.key_id, agent.spiffe_id)
    with rig.caller(agent) as stubs, rig.local() as local:
        stubs.sign(made.key_id)
        with pytest.raises(grpc.RpcError):
            local.keys.DestroyKey(keyserver_pb2.DestroyKeyRequest(key_id=made.key_id))
        local.keys.DisableKey(keyserver_pb2.DisableKeyRequest(key_id=made.key_id))
        assert refusal(stubs, made.key_id).code.value == "key_disabled"
        local.keys.EnableKey(keyserver_pb2.EnableKeyRequest(key_id=made.key_id))
        verify_p256(made.spki_der, stubs.sign(made.key_id))
        local.keys.DisableKey(keyserver_pb2.DisableKeyRequest(key_id=made.key_id))
        gone = local.keys.DestroyKey(keyserver_pb2.DestroyKeyRequest(key_id=made.key_id))
        assert gone.state == keyserver_pb2.KEY_STATE_PENDING_DESTRUCTION
        assert refusal(stubs, made.key_id).code.value == "key_disabled"
        with pytest.raises(grpc.RpcError):
            local.keys.EnableKey(keyserver_pb2.EnableKeyRequest(key_id=made.key_id))


def test_same_request_id_gives_one_key(rig: KeyServerRig) -> None:
    first = rig.create_key("once")
    assert rig.create_key("once").key_id == first.key_id
    with pytest.raises(grpc.RpcError) as refused:
        rig.create_key("once", label="other")
    assert error_from_rpc(refused.value).code.value == "conflict"


@pytest.mark.parametrize(
    "changes",
    [
        {"request_id": ""},
        {"key_type": 0},
        {"role": 0},
        {"purposes": []},
        {"purposes": [types_pb2.PURPOSE_X509_CERTIFICATE]},
        {"backend": "none-such"},
        {"label": "two\nlines"},
    ],
)
def test_wrong_creations_leave_nothing(rig: KeyServerRig, changes: dict[str, Any]) -> None:
    request_id = changes.pop("request_id", "wrong")
    with pytest.raises(grpc.RpcError):
        rig.create_key(request_id, **changes)


def test_health_says_what_there_is(rig: KeyServerRig) -> None:
    with rig.local() as local:
        health = local.health.Check(keyserver_pb2.HealthRequest())
    assert health.serving, health.detail
    assert [backend.name for backend in health.backends] == ["software"]
    assert health.backends[0].serving
    assert types_pb2.KEY_TYPE_EC_P256 in health.backends[0].key_types
    assert health.svid_not_after.seconds > 0


def test_files_are_closed_to_others(rig: KeyServerRig) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in (rig.admin_socket, rig.state, rig.admin_socket.parent)}
    assert modes == {"admin.sock": 0o600, "state": 0o700, "run": 0o700}
    assert (rig.state / "tls-key.pem").stat().st_mode & 0o777 == 0o600
    assert not Path(rig.state / "catalog.sqlite3").stat().st_mode & 0o077


def test_a_token_is_signed_within_its_keys_profile(rig: KeyServerRig, agent: Svid) -> None:
    profile = keyserver_pb2.JwtProfile(trust_domain="example.org")
    profile.max_ttl.FromSeconds(300)
    fields = {
        "role": keyserver_pb2.KEY_ROLE_JWT_AUTHORITY, "purposes": [types_pb2.PURPOSE_JWT_SVID], "jwt_profile": profile,
    }  # fmt: skip
    made = rig.create_key("tokens", **fields)
    assert made.role == keyserver_pb2.KEY_ROLE_JWT_AUTHORITY
    assert (made.jwt_profile.trust_domain, made.jwt_profile.max_ttl.seconds) == ("example.org", 300)
    rig.grant(made.key_id, agent.spiffe_id, purposes=[types_pb2.PURPOSE_JWT_SVID])
    scheme, clock = SignatureScheme.ECDSA_SECP256R1_SHA256, int(time.time())
    with rig.caller(agent) as stubs:
        for life, code in ((240, None), (400, "profile_violation")):
            claims = {"sub": "spiffe://example.org/a", "aud": "db", "exp": clock + life}
            message = build_jwt_signing_input(scheme, made.key_id, claims)
            asked = {"purpose": types_pb2.PURPOSE_JWT_SVID, "message": message}
            if code is None:
                verify_p256(made.spki_der, stubs.sign(made.key_id, **asked), message)
            else:
                assert refusal(stubs, made.key_id, **asked).code.value == code
        assert refusal(stubs, made.key_id).code.value == "purpose_not_permitted"
    foreign = keyserver_pb2.JwtProfile(trust_domain="other.test", max_ttl=profile.max_ttl)
    with pytest.raises(grpc.RpcError, match=r"trust domain is not example\.org"):
        rig.create_key("foreign", **{**fields, "jwt_profile": foreign})


def test_a_digest_needs_the_purpose_in_key_and_grant(rig: KeyServerRig, agent: Svid) -> None:
    made = rig.create_key("digests", purposes=[types_pb2.PURPOSE_TLS13_SERVER_VERIFY, types_pb2.PURPOSE_DIGEST])
    asked = {"purpose": types_pb2.PURPOSE_DIGEST, "message": sha256(MESSAGE).digest()}
    rig.grant(made.key_id, agent.spiffe_id)
    with rig.caller(agent) as stubs:
        error = refusal(stubs, made.key_id, **asked)
        assert error.code.value == "purpose_not_permitted"
        assert "it is opt-in" in error.detail
        rig.grant(made.key_id, agent.spiffe_id, purposes=[types_pb2.PURPOSE_DIGEST])
        verify_p256(made.spki_der, stubs.sign(made.key_id, **asked))
