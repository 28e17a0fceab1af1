"""The life cycle of issuing authorities as a state machine, and the rotation through the service."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

import pytest
from cryptography import x509
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from keyreeve_ca.authority_service import activate_authority, make_root, prepare_authority, rotate_authorities
from keyreeve_ca.domain.authority import (
    Authority,
    AuthorityAction,
    AuthorityState,
    activate,
    active_authority,
    authority_id_of,
    due_action,
    prepare,
    prepared_authority,
)
from keyreeve_ca.domain.issuance import AuthorityOrder, authority_subject, build_authority, sign_builder
from keyreeve_ca.signers.local import ThrowAwayKeys
from keyreeve_common.errors import Conflict, FailedPrecondition, NotFound, Unavailable
from keyreeve_common.identity import TrustDomain
from keyreeve_common.schemes import KeyType

TD = TrustDomain("example.org")
START = datetime(2026, 1, 1, tzinfo=UTC)
LIFE = timedelta(days=30)
KEY = ThrowAwayKeys()(KeyType.EC_P256)


@lru_cache(maxsize=4096)
def certificate(number: int, start: datetime) -> x509.Certificate:
    subject = authority_subject(TD, root=False, number=number)
    return sign_builder(
        build_authority(AuthorityOrder(TD, subject, KEY.public_key(), 1 << 64, start, start + LIFE)), KEY
    )


def authority(number: int, start: datetime) -> Authority:
    return Authority(f"a{number}", AuthorityState.PREPARED, f"k{number}", certificate(number, start), number=number)


class LifeCycle(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.made = 0
        self.authorities: tuple[Authority, ...] = ()
        self.prepare()

    def prepare(self) -> None:
        self.authorities = prepare(self.authorities, authority(self.made + 1, self.now), self.now)
        self.made += 1

    @rule(hours=st.integers(1, 24 * 40))
    def time_passes(self, hours: int) -> None:
        self.now += timedelta(hours=hours)

    @rule()
    def rotation_ticks(self) -> None:
        match due_action(self.authorities, self.now):
            case AuthorityAction.PREPARE:
                self.prepare()
            case AuthorityAction.ACTIVATE:
                prepared = prepared_authority(self.authorities)
                assert prepared is not None
                self.authorities = activate(self.authorities, prepared.authority_id, self.now)

    @rule()
    def operator_prepares(self) -> None:
        prepared = prepared_authority(self.authorities)
        if prepared is not None and not prepared.is_expired(self.now):
            with pytest.raises(Conflict):
                self.prepare()
        else:
            self.prepare()

    @rule(data=st.data())
    def operator_activates_any(self, data: Any) -> None:
        chosen = data.draw(st.sampled_from(self.authorities))
        if chosen.state is AuthorityState.PREPARED and not chosen.is_expired(self.now):
            self.authorities = activate(self.authorities, chosen.authority_id, self.now)
            assert active_authority(self.authorities).authority_id == chosen.authority_id
        else:
            with pytest.raises(FailedPrecondition):
                activate(self.authorities, chosen.authority_id, self.now)

    @rule()
    def unknown_authority_is_not_found(self) -> None:
        with pytest.raises(NotFound):
            activate(self.authorities, "nobody", self.now)

    @precondition(lambda self: self.made > 0)
    @invariant()
    def one_is_active_and_at_most_one_is_prepared(self) -> None:
        states = [each.state for each in self.authorities]
        assert states.count(AuthorityState.ACTIVE) == 1
        assert states.count(AuthorityState.PREPARED) <= 1
        assert len({each.authority_id for each in self.authorities}) == self.made

    @precondition(lambda self: self.made > 0)
    @invariant()
    def two_ticks_always_lead_to_one_that_signs(self) -> None:
        state = self.authorities
        for step in range(2):
            match due_action(state, self.now):
                case AuthorityAction.PREPARE:
                    state = prepare(state, authority(9000 + step, self.now), self.now)
                case AuthorityAction.ACTIVATE:
                    prepared = prepared_authority(state)
                    assert prepared is not None
                    state = activate(state, prepared.authority_id, self.now)
        assert not active_authority(state).is_expired(self.now)


LifeCycle.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLifeCycle = LifeCycle.TestCase


def test_prepared_at_half_life_and_activated_when_a_sixth_is_left() -> None:
    first = authority(1, START)
    state = prepare((), first, START)
    assert due_action(state, START + LIFE / 2 - timedelta(seconds=1)) is AuthorityAction.NONE
    assert due_action(state, START + LIFE / 2) is AuthorityAction.PREPARE
    state = prepare(state, authority(2, START + LIFE / 2), START + LIFE / 2)
    assert due_action(state, START + LIFE * 5 / 6 - timedelta(seconds=1)) is AuthorityAction.NONE
    assert due_action(state, START + LIFE * 5 / 6) is AuthorityAction.ACTIVATE


def test_rotation_through_the_service(rig: Any) -> None:
    (_, first) = rig.store.list_authorities()
    rig.clock.now = first.prepare_next_at
    assert rotate_authorities(rig.ca) is AuthorityAction.PREPARE
    assert rotate_authorities(rig.ca) is AuthorityAction.NONE
    with pytest.raises(Conflict):
        prepare_authority(rig.ca)
    rig.clock.now = first.activate_next_at
    assert rotate_authorities(rig.ca) is AuthorityAction.ACTIVATE
    states = [(each.number, each.state) for each in rig.store.list_authorities() if not each.root]
    assert states == [(1, AuthorityState.OLD), (2, AuthorityState.ACTIVE)]
    with pytest.raises(FailedPrecondition):
        activate_authority(rig.ca, first.authority_id)


def test_retry_after_a_failed_signature_makes_no_second_key(rig: Any) -> None:
    (_, first) = rig.store.list_authorities()
    rig.clock.now = first.prepare_next_at
    keys = len(rig.cluster._keys)
    real_sign = rig.cluster.sign
    rig.cluster.sign = lambda *_: (_ for _ in ()).throw(Unavailable("away"))
    with pytest.raises(Unavailable):
        prepare_authority(rig.ca)
    rig.cluster.sign = real_sign
    second = prepare_authority(rig.ca)
    assert len(rig.cluster._keys) == keys + 1
    assert authority_id_of(second.certificate) == second.authority_id
    failed = [each for each in rig.store.list_svids() if each.failure]
    assert [each.failure for each in failed] == ["unavailable: away"]


def test_root_is_made_once(rig: Any) -> None:
    assert make_root(rig.ca).authority_id == make_root(rig.ca).authority_id
    assert len(rig.store.list_authorities()) == 2
