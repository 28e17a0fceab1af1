"""Rotation of entries' keys: overlap until the last certificate ends, nothing lost by a crash, and no way around a withdrawal."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from keyreeve_ca.assignment_service import sync_agent
from keyreeve_ca.domain.grants import EXPIRY_MARGIN
from keyreeve_ca.entry_service import create_entry, delete_entry
from keyreeve_ca.rotation_service import retire_former_keys, rotate_entry_key
from keyreeve_ca.store.engine import write_transaction
from keyreeve_ca.store.entry_records import withdraw
from keyreeve_ca.withdrawal_service import withdraw_grants
from keyreeve_client.key_admin import KeyState
from keyreeve_common.errors import FailedPrecondition, KeyreeveError, Unavailable
from keyreeve_common.identity import SpiffeId, TrustDomain

TD = TrustDomain("example.org")
N1 = SpiffeId(TD, "/keyreeve/agent/n1")
N2 = SpiffeId(TD, "/keyreeve/agent/n2")
SECOND = timedelta(seconds=1)


@pytest.fixture
def entry(rig: Any) -> Any:
    return create_entry(rig.ca, rig.entry())


def only(rig: Any) -> Any:
    (assignment,) = sync_agent(rig.ca, N1)
    assert assignment.error is None
    return assignment


def test_new_key_and_svid_at_once_and_the_old_key_until_its_last_certificate_ends(rig: Any, entry: Any) -> None:
    before = only(rig)
    rig.clock.advance(timedelta(minutes=1))
    record = rotate_entry_key(rig.ca, entry.entry_id)
    after = only(rig)
    assert after.svid == record
    assert after.key.generation == before.key.generation + 1
    assert record.key_id == after.key.key_id != before.key.key_id
    assert after.former_key_ids == (before.key.key_id,)
    assert rig.cluster.retirements == {before.key.key_id: before.svid.not_after + EXPIRY_MARGIN}
    (grant,) = rig.cluster.list_grants(key_id=after.key.key_id, holder=N1)
    assert grant.expires_at == after.svid.not_after + EXPIRY_MARGIN
    assert rig.cluster.get_key(before.key.key_id).state is KeyState.ENABLED
    rig.clock.now = before.svid.not_after + 2 * EXPIRY_MARGIN + SECOND
    retire_former_keys(rig.ca)
    assert only(rig).former_key_ids == ()


def test_entry_without_a_key_in_use_is_not_rotated(rig: Any, entry: Any) -> None:
    with pytest.raises(FailedPrecondition, match="no key in use"):
        rotate_entry_key(rig.ca, entry.entry_id)


@pytest.mark.parametrize("at", ["replace_managed_key", "record_intents", "record_results", "save_retirement"])
def test_crash_at_any_step_is_gone_on_with(rig: Any, entry: Any, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    before = only(rig)

    def lost(*_: object, **__: object) -> None:
        raise Unavailable("the CA died here")

    with monkeypatch.context() as patched:
        patched.setattr(rig.store, at, lost)
        with pytest.raises(Unavailable):
            rotate_entry_key(rig.ca, entry.entry_id)
    if only(rig).key.key_id == before.key.key_id:
        rotate_entry_key(rig.ca, entry.entry_id)
    after = only(rig)
    retire_former_keys(rig.ca)
    assert after.svid.key_id == after.key.key_id != before.key.key_id
    assert list(rig.cluster.successors.items()) == [(before.key.key_id, after.key.key_id)]
    assert before.key.key_id in rig.cluster.retirements


def test_old_key_is_not_retired_before_there_is_an_svid_over_the_new_one(
    rig: Any, entry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(rig)

    def lost(*_: object, **__: object) -> None:
        raise Unavailable("gone")

    with monkeypatch.context() as patched:
        patched.setattr(rig.store, "record_intents", lost)
        with pytest.raises(Unavailable):
            rotate_entry_key(rig.ca, entry.entry_id)
    retire_former_keys(rig.ca)
    assert rig.cluster.retirements == {}


def test_identity_that_is_taken_away_goes_with_both_keys(rig: Any, entry: Any) -> None:
    before = only(rig)
    rotate_entry_key(rig.ca, entry.entry_id)
    after = only(rig)
    delete_entry(rig.ca, entry.entry_id)
    withdraw_grants(rig.ca)
    for key_id in (before.key.key_id, after.key.key_id):
        (grant,) = rig.cluster.list_grants(key_id=key_id, holder=N1)
        assert grant.is_revoked, key_id
        assert rig.cluster.get_key(key_id).state is KeyState.DISABLED


def test_revocation_by_an_operator_survives_the_rotation(rig: Any, entry: Any) -> None:
    before = only(rig)
    rig.cluster.revoke_grant(before.key.key_id, N1)
    rotate_entry_key(rig.ca, entry.entry_id)
    (assignment,) = sync_agent(rig.ca, N1)
    assert isinstance(assignment.error, KeyreeveError)
    assert "an operator revoked" in assignment.error.detail


def test_each_rotation_is_a_generation(rig: Any, entry: Any) -> None:
    keys = [only(rig).key.key_id]
    for _ in range(3):
        rotate_entry_key(rig.ca, entry.entry_id)
        keys.append(only(rig).key.key_id)
    assert len(set(keys)) == 4
    assert set(only(rig).former_key_ids) == set(keys[:-1])


def test_node_that_is_expelled_right_after_a_rotation_has_no_grant_of_the_new_key(rig: Any) -> None:
    """Its row names the old key still: nobody assigned anything to it since."""
    first = create_entry(rig.ca, rig.entry())
    create_entry(rig.ca, rig.entry(agent="n2"))
    sync_agent(rig.ca, N1)
    (lost,) = sync_agent(rig.ca, N2)
    record = rotate_entry_key(rig.ca, first.entry_id)
    with write_transaction(rig.store.engine) as connection:
        withdraw(connection, N2)
    withdraw_grants(rig.ca)
    for key_id in (lost.key.key_id, record.key_id):
        (grant,) = rig.cluster.list_grants(key_id=key_id, holder=N2)
        assert grant.is_revoked, key_id
    sync_agent(rig.ca, N1)
    (kept,) = rig.cluster.list_grants(key_id=record.key_id, holder=N1)
    assert not kept.is_revoked
    (again,) = sync_agent(rig.ca, N2)  # attested anew: the withdrawal was the CA's own, no operator's
    assert again.error is None
    assert again.key.key_id == record.key_id


@pytest.mark.parametrize("by", ["ca", "operator"])
def test_what_was_taken_away_while_a_rotation_was_cut_off_stays_so(
    rig: Any, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """The copy of the grants is older than the revocation: the repetition finds the key that was made before it."""
    first = create_entry(rig.ca, rig.entry())
    create_entry(rig.ca, rig.entry(agent="n2"))
    sync_agent(rig.ca, N1)
    (lost,) = sync_agent(rig.ca, N2)

    def dies(*_: object, **__: object) -> None:
        raise Unavailable("the CA died here")

    with monkeypatch.context() as patched:
        patched.setattr(rig.store, "replace_managed_key", dies)
        with pytest.raises(Unavailable):
            rotate_entry_key(rig.ca, first.entry_id)
    rig.clock.advance(SECOND)
    if by == "ca":
        with write_transaction(rig.store.engine) as connection:
            withdraw(connection, N2)
        withdraw_grants(rig.ca)
    else:
        rig.cluster.revoke_grant(lost.key.key_id, N2)
    rig.clock.advance(SECOND)
    record = rotate_entry_key(rig.ca, first.entry_id)
    (grant,) = rig.cluster.list_grants(key_id=record.key_id, holder=N2)
    assert grant.is_revoked
    (kept,) = rig.cluster.list_grants(key_id=record.key_id, holder=N1)
    assert not kept.is_revoked
    (again,) = sync_agent(rig.ca, N2)
    assert (again.error is None) == (by == "ca")
