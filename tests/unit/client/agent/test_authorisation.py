"""Who may use which key: properties over made-up entries and peers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_client.agent.authorisation import Delegate, KeyRules, Selector, Selectors
from keyreeve_common.errors import KeyNotFound
from keyreeve_common.identity import SpiffeId
from keyreeve_common.key_id import KeyId


@dataclass(frozen=True)
class Entry:
    spiffe_id: SpiffeId
    key_id: KeyId
    selectors: Selectors
    delegates: tuple[Delegate, ...] = ()


def unix(*values: str) -> Selectors:
    return frozenset(Selector("unix", value) for value in values)


def sid(path: str) -> SpiffeId:
    return SpiffeId.parse(f"spiffe://example.org/{path}")


SELECTORS = st.frozensets(
    st.sampled_from(sorted(unix("uid:1", "uid:2", "gid:1", "path:/bin/a", "sha256:aa"))), max_size=4
)
NAMES = st.sampled_from(["a", "b", "c"])
DELEGATES = st.builds(Delegate, SELECTORS, st.none() | NAMES.map(sid))
ENTRIES = st.lists(
    st.builds(Entry, NAMES.map(sid), NAMES.map(lambda n: KeyId(f"key-{n}")), SELECTORS, st.lists(DELEGATES).map(tuple))
)


def may(rules: KeyRules, key_id: KeyId, peer: Selectors) -> bool:
    try:
        rules.check(key_id, peer)
    except KeyNotFound:
        return False
    return True


def _has(needed: Selectors, peer: Selectors) -> bool:
    return bool(needed) and needed <= peer


def expected(entries: list[Entry], key_id: KeyId, peer: Selectors) -> bool:
    """The rule as the design says it, without any table."""
    attested = {entry.spiffe_id for entry in entries if _has(entry.selectors, peer)}
    return any(
        _has(entry.selectors, peer) or any(_has(d.selectors, peer) or d.spiffe_id in attested for d in entry.delegates)
        for entry in entries
        if entry.key_id == key_id
    )


@given(ENTRIES, NAMES, SELECTORS)
def test_follows_the_rule(entries: list[Entry], name: str, peer: Selectors) -> None:
    key_id = KeyId(f"key-{name}")
    assert may(KeyRules.of(entries), key_id, peer) is expected(entries, key_id, peer)


@given(ENTRIES, NAMES, SELECTORS, SELECTORS)
def test_more_selectors_never_take_a_key_away(
    entries: list[Entry], name: str, peer: Selectors, more: Selectors
) -> None:
    rules, key_id = KeyRules.of(entries), KeyId(f"key-{name}")
    assert may(rules, key_id, peer | more) or not may(rules, key_id, peer)


@given(ENTRIES, NAMES)
def test_a_peer_without_selectors_uses_nothing(entries: list[Entry], name: str) -> None:
    assert not may(KeyRules.of(entries), KeyId(f"key-{name}"), frozenset())


COSTLY = frozenset({"unix:path", "unix:sha256"})


@given(ENTRIES, NAMES, SELECTORS)
def test_learning_only_what_is_asked_for_decides_alike(entries: list[Entry], name: str, peer: Selectors) -> None:
    """A lazy peer that learns the kinds it is told to ends at the same decision as one that knows everything."""
    rules, key_id = KeyRules.of(entries), KeyId(f"key-{name}")
    cheap = frozenset(selector for selector in peer if selector.kind not in COSTLY)
    kinds = rules.kinds_to_learn(key_id, cheap, COSTLY)
    learnt = cheap | {selector for selector in peer if selector.kind in kinds}
    assert may(rules, key_id, learnt) is may(rules, key_id, peer)


def test_nothing_costly_is_learnt_of_a_peer_that_is_out_already() -> None:
    rules = KeyRules.of([Entry(sid("a"), KeyId("key-a"), unix("uid:1", "sha256:aa"))])
    assert rules.kinds_to_learn(KeyId("key-a"), unix("uid:2"), COSTLY) == frozenset()
    assert rules.kinds_to_learn(KeyId("key-a"), unix("uid:1"), COSTLY) == {"unix:sha256"}


def test_being_a_delegate_is_not_handed_on() -> None:
    proxy = Entry(sid("proxy"), KeyId("key-proxy"), unix("uid:33"), (Delegate(unix("uid:44")),))
    web = Entry(sid("web"), KeyId("key-web"), unix("uid:1"), (Delegate(spiffe_id=sid("proxy")),))
    rules = KeyRules.of([proxy, web])
    assert may(rules, KeyId("key-web"), unix("uid:33"))
    assert may(rules, KeyId("key-proxy"), unix("uid:44"))
    assert not may(rules, KeyId("key-web"), unix("uid:44"))


def test_unknown_and_forbidden_are_the_same_error() -> None:
    rules = KeyRules.of([Entry(sid("a"), KeyId("key-a"), unix("uid:1"))])
    said = []
    for key_id in ("key-a", "key-none"):
        with pytest.raises(KeyNotFound) as caught:
            rules.check(KeyId(key_id), unix("uid:2"))
        said.append((caught.value.code, caught.value.detail, caught.value.retry_after))
    assert said[0] == said[1]
