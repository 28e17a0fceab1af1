"""What becomes of grants and keys: made, extended, withdrawn, and never brought back against an operator's will."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from keyreeve_ca.assignment_service import renew_at, renew_entry_svid, sync_agent
from keyreeve_ca.domain.entries import KeyScope, Selector
from keyreeve_ca.domain.grants import EXPIRY_MARGIN
from keyreeve_ca.domain.records import SvidState
from keyreeve_ca.entry_service import create_entry, delete_entry, update_entry
from keyreeve_ca.service import Locks
from keyreeve_ca.withdrawal_service import withdraw_grants
from keyreeve_client.key_admin import KeyState
from keyreeve_common.errors import (
    DeadlineExceeded,
    ErrorCode,
    Internal,
    KeyreeveError,
    RateLimited,
    StorageBusy,
    Unavailable,
)
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import KeyType

TD = TrustDomain("example.org")
N1, N2 = SpiffeId(TD, "/keyreeve/agent/n1"), SpiffeId(TD, "/keyreeve/agent/n2")
BOTH = frozenset({Purpose.TLS13_SERVER_VERIFY, Purpose.TLS13_CLIENT_VERIFY})


def only(rig: Any, agent: SpiffeId = N1) -> Any:
    (assignment,) = sync_agent(rig.ca, agent)
    return assignment


def grant_of(rig: Any, key_id: str, agent: SpiffeId = N1) -> Any:
    (grant,) = rig.cluster.list_grants(key_id=key_id, holder=agent)
    return grant


def test_first_sync_makes_key_svid_and_grant_and_the_second_nothing(rig: Any) -> None:
    create_entry(rig.ca, rig.entry())
    first = only(rig)
    grant = grant_of(rig, first.key.key_id)
    assert grant.expires_at == first.svid.not_after + EXPIRY_MARGIN
    assert grant.purposes == BOTH
    mark = rig.store.change_sequence()
    second = only(rig)
    assert (second.key, second.svid) == (first.key, first.svid)
    assert grant_of(rig, first.key.key_id) == grant
    assert rig.store.change_sequence() == mark


def test_what_an_entry_opts_in_to_is_in_its_key_and_its_grant(rig: Any) -> None:
    asked = BOTH | {Purpose.TLS12_SERVER_KEY_EXCHANGE, Purpose.TLS12_CLIENT_VERIFY, Purpose.DIGEST}
    create_entry(rig.ca, rig.entry(purposes=asked))
    first = only(rig)
    assert rig.cluster.get_key(first.key.key_id).purposes == asked
    assert grant_of(rig, first.key.key_id).purposes == asked


def test_svid_is_renewed_at_half_life_and_its_grant_extended(rig: Any) -> None:
    create_entry(rig.ca, rig.entry())
    first = only(rig)
    life = first.svid.not_after - first.svid.created_at
    assert 0.45 <= (renew_at(first.svid) - first.svid.created_at) / life <= 0.55
    rig.clock.now = renew_at(first.svid) - timedelta(seconds=1)
    assert only(rig).svid == first.svid
    rig.clock.now = renew_at(first.svid)
    second = only(rig)
    assert second.svid.serial != first.svid.serial
    assert second.key == first.key
    assert grant_of(rig, first.key.key_id).expires_at == second.svid.not_after + EXPIRY_MARGIN


def test_svid_that_lives_shorter_than_it_is_back_dated_is_not_issued_without_end(rig: Any) -> None:
    create_entry(rig.ca, rig.entry(x509_svid_ttl=timedelta(seconds=5)))  # back-dated by 10 s
    first = only(rig)
    assert only(rig).svid == first.svid
    rig.clock.advance(timedelta(seconds=2))
    assert only(rig).svid == first.svid
    rig.clock.advance(timedelta(seconds=1))
    assert only(rig).svid.serial != first.svid.serial


def test_svid_from_a_clock_that_was_ahead_is_replaced(rig: Any) -> None:
    create_entry(rig.ca, rig.entry())
    rig.clock.advance(timedelta(minutes=20))
    ahead = only(rig)
    rig.clock.advance(-timedelta(minutes=20))
    assert ahead.svid.not_before > rig.clock.now
    assert only(rig).svid.not_before <= rig.clock.now


def test_changed_order_is_issued_at_once(rig: Any) -> None:
    entry = create_entry(rig.ca, rig.entry())
    first = only(rig)
    update_entry(rig.ca, replace(entry, dns_names=("a.example.org",)), read_revision=1)
    assert only(rig).svid.serial != first.svid.serial


def test_sharing_entries_have_all_names_and_the_shortest_life(rig: Any) -> None:
    create_entry(rig.ca, rig.entry(dns_names=("b.example.org",), x509_svid_ttl=timedelta(minutes=30)))
    create_entry(rig.ca, rig.entry(agent="n2", dns_names=("a.example.org",)))
    one, two = only(rig), only(rig, N2)
    assert one.svid == two.svid
    assert one.svid.not_after == rig.clock.now + timedelta(minutes=30)


def test_key_scope_node_has_a_key_per_agent(rig: Any) -> None:
    for agent in ("n1", "n2"):
        create_entry(rig.ca, rig.entry(agent=agent, key_scope=KeyScope.NODE))
    assert only(rig).key.key_id != only(rig, N2).key.key_id


def test_expired_grant_is_made_again(rig: Any) -> None:
    create_entry(rig.ca, rig.entry())
    first = only(rig)
    rig.clock.now = first.svid.not_after + timedelta(days=1)  # the CA was away that long
    second = only(rig)
    assert second.error is None
    assert grant_of(rig, first.key.key_id).expires_at > rig.clock.now


def test_grant_ends_with_the_entry(rig: Any) -> None:
    ends = rig.clock.now + timedelta(minutes=7)
    create_entry(rig.ca, rig.entry(expires_at=ends))
    assert grant_of(rig, only(rig).key.key_id).expires_at == ends


def test_key_that_an_operator_disabled_is_not_enabled_by_a_new_entry(rig: Any) -> None:
    entry = create_entry(rig.ca, rig.entry())
    key_id = only(rig).key.key_id
    rig.cluster.disable_key(key_id)
    delete_entry(rig.ca, entry.entry_id)
    withdraw_grants(rig.ca)
    create_entry(rig.ca, rig.entry())
    assert only(rig).error.code is ErrorCode.KEY_DISABLED
    rig.cluster.enable_key(key_id)
    assert only(rig).key.key_id == key_id


def test_key_that_was_destroyed_after_it_retired_is_replaced(rig: Any) -> None:
    entry = create_entry(rig.ca, rig.entry())
    key_id = only(rig).key.key_id
    delete_entry(rig.ca, entry.entry_id)
    withdraw_grants(rig.ca)
    rig.cluster.destroy_key(key_id)
    create_entry(rig.ca, rig.entry())
    again = only(rig)
    assert again.error is None
    assert again.key.key_id != key_id


def test_destroyed_key_does_not_stand_in_the_way_of_another_kind(rig: Any) -> None:
    entry = create_entry(rig.ca, rig.entry())
    key_id = only(rig).key.key_id
    rig.cluster.destroy_key(key_id)
    delete_entry(rig.ca, entry.entry_id)
    create_entry(rig.ca, rig.entry(key_type=KeyType.EC_P384))  # before the withdrawal ran
    assert only(rig).error is None


def test_other_kind_of_key_is_another_key_and_keeps_the_revocation(rig: Any) -> None:
    entry = create_entry(rig.ca, rig.entry())
    first = only(rig)
    rig.cluster.revoke_grant(first.key.key_id, N1)
    assert only(rig).error.code is ErrorCode.PERMISSION_DENIED
    delete_entry(rig.ca, entry.entry_id)
    withdraw_grants(rig.ca)
    create_entry(rig.ca, rig.entry(key_type=KeyType.EC_P384))
    second = only(rig)
    assert second.error.code is ErrorCode.PERMISSION_DENIED
    assert not rig.cluster.list_grants(holder=N1)[1:]
    created = [each for each in rig.store.list_managed_keys() if each.generation == 2]
    rig.cluster.create_grant(created[0].key_id, N1, purposes=BOTH, expires_at=None)
    assert only(rig).error is None


def test_entries_that_came_to_disagree_make_no_keys_without_end(rig: Any) -> None:
    create_entry(rig.ca, rig.entry())
    first = only(rig)
    rig.store.create_entry(
        rig.entry(selectors=(Selector("unix", "uid:2"),), key_type=KeyType.EC_P384)
    )  # past the check
    keys = len(rig.cluster._keys)
    for _ in range(3):
        assert [each.error.code if each.error else None for each in sync_agent(rig.ca, N1)].count(None) == 1
    assert len(rig.cluster._keys) == keys
    assert rig.cluster.get_key(first.key.key_id).state is KeyState.ENABLED


def test_key_of_another_kind_disables_the_one_before(rig: Any) -> None:
    entry = create_entry(rig.ca, rig.entry())
    first = only(rig)
    delete_entry(rig.ca, entry.entry_id)
    create_entry(rig.ca, rig.entry(key_type=KeyType.EC_P384))  # before the withdrawal ran
    second = only(rig)
    assert second.error is None
    assert second.key.key_id != first.key.key_id
    assert rig.cluster.get_key(first.key.key_id).state is KeyState.DISABLED


def test_one_failing_entry_does_not_stop_the_others(rig: Any) -> None:
    create_entry(rig.ca, rig.entry())
    revoked = create_entry(rig.ca, rig.entry("/other"))
    key_id = next(each.key.key_id for each in sync_agent(rig.ca, N1) if each.entry == revoked)
    rig.cluster.revoke_grant(key_id, N1)
    by_entry = {each.entry.spiffe_id.path: each for each in sync_agent(rig.ca, N1)}
    assert by_entry["/web"].error is None
    assert by_entry["/other"].error.code is ErrorCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    "failure", [Unavailable("away"), RateLimited("busy"), Internal("a bug"), DeadlineExceeded("late")]
)
def test_cluster_that_fails_leaves_what_is_valid_and_says_what_is_missing(rig: Any, failure: KeyreeveError) -> None:
    create_entry(rig.ca, rig.entry())
    good = only(rig)
    create_entry(rig.ca, rig.entry("/new"))
    rig.cluster.failure = failure
    by_path = {each.entry.spiffe_id.path: each for each in sync_agent(rig.ca, N1)}
    assert by_path["/web"].svid == good.svid
    assert by_path["/new"].error.code is failure.code
    rig.clock.now = good.svid.not_after
    assert all(each.error is not None for each in sync_agent(rig.ca, N1))
    rig.cluster.failure = None
    assert all(each.error is None for each in sync_agent(rig.ca, N1))


def test_failed_withdrawal_is_done_later(rig: Any) -> None:
    entry = create_entry(rig.ca, rig.entry())
    key_id = only(rig).key.key_id
    delete_entry(rig.ca, entry.entry_id)
    rig.cluster.failure = Unavailable("away")
    with pytest.raises(Unavailable):
        withdraw_grants(rig.ca)
    rig.cluster.failure = None
    assert not grant_of(rig, key_id).is_revoked
    withdraw_grants(rig.ca)
    assert grant_of(rig, key_id).is_revoked
    withdraw_grants(rig.ca)


@pytest.mark.parametrize("gone_again", [False, True])
def test_grant_that_could_not_be_made_again_at_once_is_made_later(
    rig: Any, monkeypatch: pytest.MonkeyPatch, gone_again: bool
) -> None:
    entry = create_entry(rig.ca, rig.entry())
    key_id = only(rig).key.key_id
    delete_entry(rig.ca, entry.entry_id)
    withdraw_grants(rig.ca)
    again = create_entry(rig.ca, rig.entry())

    def away(*_: Any, **__: Any) -> Any:
        raise Unavailable("away")

    with monkeypatch.context() as broken:
        broken.setattr(rig.cluster, "create_grant", away)
        assert only(rig).error.code is ErrorCode.UNAVAILABLE
    if gone_again:
        delete_entry(rig.ca, again.entry_id)
        withdraw_grants(rig.ca)
        create_entry(rig.ca, rig.entry())
    assert only(rig).error is None
    assert not grant_of(rig, key_id).is_revoked


def test_grant_that_another_instance_withdrew_before_it_was_made_is_revoked(rig: Any) -> None:
    entry = create_entry(rig.ca, rig.entry())
    other = replace(rig.ca, locks=Locks())
    create = rig.cluster.create_grant

    def withdraw_first(*arguments: Any, **named: Any) -> Any:
        delete_entry(other, entry.entry_id)
        withdraw_grants(other)
        return create(*arguments, **named)

    rig.cluster.create_grant = withdraw_first
    assignment = only(rig)
    withdraw_grants(other)
    assert grant_of(rig, assignment.key.key_id).is_revoked


@pytest.mark.parametrize("when", ["list_grants", "create_grant", "extend_grant"])
def test_entry_that_is_deleted_during_a_sync_leaves_no_grant(rig: Any, when: str) -> None:
    entry = create_entry(rig.ca, rig.entry())
    if when != "create_grant":
        first = only(rig)
        rig.clock.now = renew_at(first.svid)
    real = getattr(rig.cluster, when)

    def delete_first(*arguments: Any, **named: Any) -> Any:
        setattr(rig.cluster, when, real)
        answer = real(*arguments, **named)
        delete_entry(rig.ca, entry.entry_id)
        return answer

    setattr(rig.cluster, when, delete_first)
    sync_agent(rig.ca, N1)
    withdraw_grants(rig.ca)
    (grant,) = rig.cluster.list_grants(holder=N1)
    assert grant.is_revoked
    create_entry(rig.ca, rig.entry())
    assert only(rig).error is None


def test_intent_is_on_record_before_the_signature_and_the_failure_after(rig: Any) -> None:
    entry = create_entry(rig.ca, rig.entry())
    only(rig)
    real = rig.cluster.sign

    def look_then_fail(*_: Any) -> bytes:
        assert rig.store.list_svids(limit=1)[0].state is SvidState.INTENDED
        raise Unavailable("away")

    rig.cluster.sign = look_then_fail
    with pytest.raises(Unavailable):
        renew_entry_svid(rig.ca, entry.entry_id)
    rig.cluster.sign = real
    (last,) = rig.store.list_svids(limit=1)
    assert (last.state, last.failure) == (SvidState.FAILED, "unavailable: away")


def test_svid_that_is_not_on_record_is_not_given_out(rig: Any) -> None:
    entry = create_entry(rig.ca, rig.entry())
    first = only(rig)

    def busy(*_: Any) -> None:
        raise StorageBusy("locked")

    rig.store.record_results = busy
    with pytest.raises(StorageBusy):
        renew_entry_svid(rig.ca, entry.entry_id)
    del rig.store.record_results
    assert only(rig).svid == first.svid


class GrantLife(RuleBasedStateMachine):
    """Entries come and go, time passes, rounds run, an operator revokes: no act of the CA makes a revoked grant work."""

    rig: Any = None

    @initialize()
    def begin(self) -> None:
        self.entry: Any = None
        self.stopped = False
        self.path = f"/w{len(self.rig.used)}"
        self.rig.used.append(self.path)
        self.key_id = ""

    @rule(uid=st.integers(1, 5))
    def entry_is_created(self, uid: int) -> None:
        if self.entry is None:
            self.entry = create_entry(
                self.rig.ca, self.rig.entry(self.path, selectors=(Selector("unix", f"uid:{uid}"),))
            )

    @precondition(lambda self: self.entry is not None)
    @rule()
    def entry_is_deleted(self) -> None:
        delete_entry(self.rig.ca, self.entry.entry_id)
        self.entry = None

    @rule()
    def withdrawals_run(self) -> None:
        withdraw_grants(self.rig.ca)

    @rule(minutes=st.integers(1, 90))
    def time_passes(self, minutes: int) -> None:
        self.rig.clock.advance(timedelta(minutes=minutes))

    @rule()
    def sync(self) -> None:
        for assignment in sync_agent(self.rig.ca, N1):
            if assignment.entry == self.entry:
                assert (assignment.error is not None) == self.stopped
                if assignment.key is not None:
                    self.key_id = assignment.key.key_id

    @precondition(lambda self: self.entry is not None)
    @rule()
    def svid_is_renewed(self) -> None:
        renew_entry_svid(self.rig.ca, self.entry.entry_id)

    @precondition(lambda self: bool(self.key_id))
    @rule()
    def operator_revokes(self) -> None:
        if not self.rig.cluster.list_grants(key_id=self.key_id, holder=N1)[0].is_revoked:
            self.rig.cluster.revoke_grant(self.key_id, N1)
            self.stopped = True

    @precondition(lambda self: bool(self.key_id) and self.stopped and self.entry is not None)
    @rule()
    def operator_grants(self) -> None:
        self.rig.cluster.create_grant(self.key_id, N1, purposes=BOTH, expires_at=None)
        self.stopped = False

    @invariant()
    def revoked_stays_revoked(self) -> None:
        if getattr(self, "stopped", False):
            assert self.rig.cluster.list_grants(key_id=self.key_id, holder=N1)[0].is_revoked


def test_life_of_grants(rig: Any) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    class Bound(GrantLife):
        pass

    Bound.rig = rig
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    run_state_machine_as_test(
        Bound, settings=settings(max_examples=15, stateful_step_count=15, deadline=None, suppress_health_check=checks)
    )
