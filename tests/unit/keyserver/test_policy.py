"""Who may use which key: properties."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import InvalidRequest, KeyDisabled, KeyNotFound, KeyreeveError, PurposeNotPermitted
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import PURPOSES_OF_ROLE, KeyRole, Purpose
from keyreeve_keyserver.domain.keys import KeyState
from keyreeve_keyserver.domain.policy import (
    Grant,
    KeyFacts,
    authorize_holder,
    authorize_local,
    check_grantable,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
KEY = KeyId("k-1")
times = st.integers(-1000, 1000).map(lambda seconds: NOW + timedelta(seconds=seconds))
purposes = st.sampled_from(list(Purpose))
purpose_numbers = purposes | st.integers(0, 300)


@st.composite
def keys(draw: st.DrawFn) -> KeyFacts:
    role = draw(st.sampled_from(list(KeyRole)))
    chosen = draw(st.frozensets(st.sampled_from(sorted(PURPOSES_OF_ROLE[role])), min_size=1))
    return KeyFacts(KEY, role, chosen, draw(st.sampled_from(list(KeyState))))


grants = st.builds(
    Grant,
    key_id=st.just(KEY),
    holder=st.just("spiffe://example.org/a"),
    purposes=st.frozensets(purposes),
    created_at=times,
    expires_at=st.none() | times,
    revoked_at=st.none() | times,
)


def refusal(key: KeyFacts | None, grant: Grant | None, purpose: int) -> KeyreeveError | None:
    try:
        authorize_holder(key, grant, purpose, NOW)
    except KeyreeveError as error:
        return error
    return None


@given(keys(), grants, purpose_numbers)
def test_permission_needs_everything_at_once(key: KeyFacts, grant: Grant, purpose: int) -> None:
    live = grant.revoked_at is None and (grant.expires_at is None or grant.expires_at > NOW)
    wanted = live and key.state is KeyState.ENABLED and purpose in grant.purposes and purpose in key.purposes
    assert (refusal(key, grant, purpose) is None) == wanted


@given(keys(), purpose_numbers)
def test_stranger_cannot_tell_a_key_from_none(key: KeyFacts, purpose: int) -> None:
    forbidden, unknown = refusal(key, None, purpose), refusal(None, None, purpose)
    assert type(forbidden) is type(unknown) is KeyNotFound
    assert forbidden is not None
    assert unknown is not None
    assert (forbidden.code, forbidden.detail, forbidden.retry_after) == (
        unknown.code,
        unknown.detail,
        unknown.retry_after,
    )


@given(keys(), grants, purpose_numbers)
def test_dead_grant_is_no_grant(key: KeyFacts, grant: Grant, purpose: int) -> None:
    if not grant.is_live(NOW):
        assert str(refusal(key, grant, purpose)) == str(refusal(None, None, purpose))


@given(keys(), purpose_numbers)
def test_local_operator_only_certifies(key: KeyFacts, purpose: int) -> None:
    try:
        authorize_local(key, purpose)
    except KeyreeveError:
        return
    assert key.role is KeyRole.AUTHORITY
    assert purpose in (Purpose.X509_CERTIFICATE, Purpose.CERTIFICATE_REQUEST)
    assert key.state is KeyState.ENABLED


def test_holder_learns_why() -> None:
    server = frozenset({Purpose.TLS13_SERVER_VERIFY})
    grant = Grant(KEY, "spiffe://example.org/a", server, NOW)
    disabled = KeyFacts(KEY, KeyRole.HANDSHAKE, server, KeyState.DISABLED)
    assert type(refusal(disabled, grant, Purpose.TLS13_SERVER_VERIFY)) is KeyDisabled
    assert type(refusal(disabled, grant, Purpose.TLS13_CLIENT_VERIFY)) is PurposeNotPermitted


def test_grant_cannot_exceed_its_key() -> None:
    server = frozenset({Purpose.TLS13_SERVER_VERIFY})
    key = KeyFacts(KEY, KeyRole.HANDSHAKE, server, KeyState.ENABLED)
    check_grantable(key, server, NOW + timedelta(seconds=1), NOW)
    with pytest.raises(InvalidRequest, match="tls13_client_verify"):
        check_grantable(key, server | {Purpose.TLS13_CLIENT_VERIFY}, None, NOW)
    with pytest.raises(InvalidRequest, match="at least one"):
        check_grantable(key, frozenset(), None, NOW)
    with pytest.raises(InvalidRequest, match="not in the future"):
        check_grantable(key, server, NOW, NOW)
    with pytest.raises(KeyNotFound):
        check_grantable(KeyFacts(KEY, KeyRole.HANDSHAKE, server, KeyState.DESTROYED), server, None, NOW)
