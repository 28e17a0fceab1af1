"""Policy as real processes keep it: rates of grants, holders and keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
from keyreeve_common.errors import KeyreeveError, RateLimited
from keyreeve_common.grpc_edge import error_from_rpc
from keyreeve_common.v1 import keyserver_pb2, types_pb2
from keyreeve_testing.keyserver import KeyServerRig, Stubs, sign_item, verify_p256

AGENT = "keyreeve/agent/a"


def outcome(call: Callable[[], object]) -> KeyreeveError | None:
    try:
        call()
    except grpc.RpcError as error:
        return error_from_rpc(error)
    return None


def grant_with_rate(local: Stubs, key_id: str, holder: str, per_second: float, burst: int) -> keyserver_pb2.Grant:
    request = keyserver_pb2.CreateGrantRequest(
        key_id=key_id,
        holder=holder,
        purposes=[types_pb2.PURPOSE_TLS13_SERVER_VERIFY],
        rate=keyserver_pb2.Rate(per_second=per_second, burst=burst),
    )
    return local.grants.CreateGrant(request, timeout=20)


def test_rate_of_a_grant_bounds_one_key_of_one_holder(tmp_path: Path) -> None:
    with KeyServerRig(tmp_path / "ks").running() as rig:
        slow, other = rig.create_key("slow"), rig.create_key("other")
        agent, neighbour = rig.pki.svid(AGENT), rig.pki.svid("keyreeve/agent/b")
        with rig.local() as local:
            made = grant_with_rate(local, slow.key_id, agent.spiffe_id, 1 / 3600, 3)
            listed = local.grants.ListGrants(keyserver_pb2.ListGrantsRequest(), timeout=20).grants
            refused = outcome(lambda: grant_with_rate(local, slow.key_id, agent.spiffe_id, 0, 3))
        assert (made.rate.per_second, made.rate.burst) == (1 / 3600, 3)
        assert list(listed) == [made]
        assert refused is not None
        assert "per_second" in refused.detail
        rig.grant(other.key_id, agent.spiffe_id)
        rig.grant(slow.key_id, neighbour.spiffe_id)
        with rig.caller(agent) as stubs:
            batch = keyserver_pb2.SignBatch(items=[sign_item(number, slow.key_id) for number in range(8)])
            results = [result for answer in stubs.signing.SignStream(iter([batch])) for result in answer.results]
            signed = [result for result in results if result.signature]
            limited = [result.error for result in results if not result.signature]
            assert (len(signed), {error.code for error in limited}) == (3, {"rate_limited"})
            assert all(error.retry_after.ToTimedelta().total_seconds() > 3000 for error in limited)
            error = outcome(lambda: stubs.sign(slow.key_id))
            assert isinstance(error, RateLimited)
            assert error.retry_after
            verify_p256(other.spki_der, stubs.sign(other.key_id))
        with rig.caller(neighbour) as stubs:
            verify_p256(slow.spki_der, stubs.sign(slow.key_id))
        rig.process.wait_event("sign_refused", lambda entry: entry["code"] == "rate_limited" and entry["count"] == 5)


def test_holder_has_one_rate_for_all_its_keys(tmp_path: Path) -> None:
    extra = "[limits.rates]\nper_holder = 1\nper_holder_burst = 4\nreplicas = 2"
    with KeyServerRig(tmp_path / "ks", extra=extra).running() as rig:
        agent = rig.pki.svid(AGENT)
        keys = [rig.create_key(f"r{number}").key_id for number in range(4)]
        for key_id in keys:
            rig.grant(key_id, agent.spiffe_id)
        with rig.caller(agent) as stubs:
            batch = keyserver_pb2.SignBatch(items=[sign_item(number, key_id) for number, key_id in enumerate(keys)])
            results = [result for answer in stubs.signing.SignStream(iter([batch])) for result in answer.results]
        assert sum(bool(result.signature) for result in results) == 2
