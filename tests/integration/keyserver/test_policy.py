"""Policy as real processes keep it: rates of grants, holders and keys; quarantine."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import grpc
from keyreeve_client.key_admin import KeyAdminClient
from keyreeve_common.errors import (
    ErrorCode,
    InvalidRequest,
    KeyreeveError,
    NotFound,
    PermissionDenied,
    Quarantined,
    RateLimited,
)
from keyreeve_common.grpc_edge import error_from_rpc
from keyreeve_common.identity import SpiffeId
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
        with rig.caller(rig.pki.svid("keyreeve/ca")) as ca:  # makes its grants anew by itself
            again = ca.grants.CreateGrant(
                keyserver_pb2.CreateGrantRequest(
                    key_id=slow.key_id, holder=agent.spiffe_id, purposes=made.purposes, expires_at=None
                ),
                timeout=20,
            )
        assert again.rate == made.rate
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


def test_probing_node_is_quarantined_until_lifted_and_across_a_restart(tmp_path: Path) -> None:
    with KeyServerRig(tmp_path / "ks", extra="[quarantine]\nrefusals = 20").running() as rig:
        key = rig.create_key()
        thief, honest = rig.pki.svid(AGENT), rig.pki.svid("keyreeve/agent/b")
        for agent in (thief, honest):
            rig.grant(key.key_id, agent.spiffe_id)
        with rig.caller(thief) as stubs:
            verify_p256(key.spki_der, stubs.sign(key.key_id))
            probes = keyserver_pb2.SignBatch(items=[sign_item(number, f"k-guess-{number}") for number in range(25)])
            assert (
                len([result for answer in stubs.signing.SignStream(iter([probes])) for result in answer.results]) == 25
            )
            event = rig.process.wait_event("holder_quarantined")
            assert (event["level"], event["holder"], event["cause"]) == ("error", thief.spiffe_id, "refusals")
            error = outcome(lambda: stubs.sign(key.key_id))
            assert error is not None
            assert (type(error).__name__, error.code.value) == ("Quarantined", "quarantined")
        with rig.caller(honest) as stubs:
            verify_p256(key.spki_der, stubs.sign(key.key_id))
        os.kill(rig.pids()[1], signal.SIGKILL)
        rig.process.wait_ready()
        with rig.caller(thief) as stubs:
            error = until_refused(lambda: stubs.sign(key.key_id))
            assert error.code.value == "quarantined"
            lift = keyserver_pb2.LiftQuarantineRequest(holder=thief.spiffe_id)
            with rig.caller(rig.pki.svid("keyreeve/ca")) as ca:  # may look, not touch
                (listed,) = ca.quarantines.ListQuarantines(
                    keyserver_pb2.ListQuarantinesRequest(), timeout=20
                ).quarantines
                assert (listed.holder, listed.cause) == (thief.spiffe_id, keyserver_pb2.QUARANTINE_CAUSE_REFUSALS)
                error = outcome(lambda: ca.quarantines.LiftQuarantine(lift, timeout=20))
                assert isinstance(error, PermissionDenied)
            with rig.local() as local:
                assert local.quarantines.LiftQuarantine(lift, timeout=20).HasField("lifted_at")
            verify_p256(key.spki_der, stubs.sign(key.key_id))


def until_refused(call: Callable[[], object]) -> KeyreeveError:
    """The first answer that is not that the server is away."""
    deadline = monotonic() + 20
    while True:
        error = outcome(call)
        assert error is not None
        if error.code is not ErrorCode.UNAVAILABLE or monotonic() > deadline:
            return error


def test_quarantine_by_hand(tmp_path: Path) -> None:
    with KeyServerRig(tmp_path / "ks").running() as rig, rig.local() as local:
        key, agent = rig.create_key(), rig.pki.svid(AGENT)
        rig.grant(key.key_id, agent.spiffe_id)
        with rig.caller(agent) as stubs:
            stubs.sign(key.key_id)
            add = keyserver_pb2.AddQuarantineRequest(holder=agent.spiffe_id, reason="node is broken into")
            made = local.quarantines.AddQuarantine(add, timeout=20)
            assert (made.reason, made.set_by, made.HasField("until")) == ("node is broken into", "local", False)
            error = outcome(lambda: stubs.sign(key.key_id))
            assert isinstance(error, Quarantined)
            assert "broken into" not in error.detail
        for wrong in ({"reason": ""}, {"reason": "x" * 513}, {"reason": "two\nlines"}, {"holder": "spiffe://else/a"}):
            request = keyserver_pb2.AddQuarantineRequest(**{"holder": agent.spiffe_id, "reason": "r", **wrong})
            assert isinstance(outcome(lambda request=request: local.quarantines.AddQuarantine(request)), InvalidRequest)  # type: ignore[misc]
        client = KeyAdminClient(local.channel)
        (listed,) = client.list_quarantines()
        assert (listed.holder, listed.cause, listed.until) == (agent.spiffe_id, "operator", None)
        assert client.lift_quarantine(SpiffeId.parse(agent.spiffe_id)).lifted_at is not None
        assert not list(client.list_quarantines())
        absent = keyserver_pb2.LiftQuarantineRequest(holder=rig.pki.spiffe_id("keyreeve/agent/none"))
        assert isinstance(outcome(lambda: local.quarantines.LiftQuarantine(absent)), NotFound)
