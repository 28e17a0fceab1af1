"""Every bad entry is refused with the rule that it breaks; a good one goes through proto and back."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from keyreeve_ca.domain.entries import Custody, Delegate, KeyScope, Selector
from keyreeve_ca.entry_service import create_entry, delete_entry, list_entries, prune_expired_entries, update_entry
from keyreeve_ca.grpc_api.protos import entry_from_proto, entry_to_proto
from keyreeve_common.errors import (
    Conflict,
    FailedPrecondition,
    InvalidRequest,
    InvalidSpiffeId,
    NotFound,
)
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import KeyType
from keyreeve_common.v1 import ca_pb2, types_pb2

TD = TrustDomain("example.org")
UID = Selector("unix", "uid:1")

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no selector": ({"selectors": ()}, "no selector"),
    "selector twice": ({"selectors": (UID, UID)}, "twice"),
    "33 selectors": ({"selectors": tuple(Selector("unix", f"uid:{n}") for n in range(33))}, "more than 32 selectors"),
    "delegate twice": ({"delegates": (Delegate((UID,)), Delegate((UID,)))}, "delegate twice"),
    "foreign delegate": ({"delegates": (Delegate(spiffe_id=SpiffeId.parse("spiffe://x/y")),)}, "another trust domain"),
    "parent is no agent": ({"parent_id": SpiffeId(TD, "/host")}, "parent_id is not an agent"),
    "parent too deep": ({"parent_id": SpiffeId(TD, "/keyreeve/agent/a/b")}, "parent_id is not an agent"),
    "foreign parent": ({"parent_id": SpiffeId.parse("spiffe://x/keyreeve/agent/a")}, "parent_id is of another"),
    "ttl of 0": ({"x509_svid_ttl": timedelta(0)}, "x509_svid_ttl"),
    "negative ttl": ({"x509_svid_ttl": timedelta(seconds=-1)}, "x509_svid_ttl"),
    "ttl of 31 days": ({"x509_svid_ttl": timedelta(days=31)}, "x509_svid_ttl"),
    "DNS name upper case": ({"dns_names": ("Web.example.org",)}, "lower-case"),
    "DNS name with space": ({"dns_names": ("a b",)}, "lower-case"),
    "DNS name empty": ({"dns_names": ("",)}, "lower-case"),
    "DNS name too long": ({"dns_names": (".".join(["a" * 60] * 5),)}, "253"),
    "DNS wildcard inside": ({"dns_names": ("a.*.org",)}, "lower-case"),
    "DNS name twice": ({"dns_names": ("a.org", "a.org")}, "twice"),
    "65 DNS names": ({"dns_names": tuple(f"a{n}.org" for n in range(65))}, "64 DNS names"),
    "reserved zone": ({"dns_names": ("keyreeve.invalid",)}, "reserved"),
    "in reserved zone": ({"dns_names": ("id-1.keyreeve.invalid",)}, "reserved"),
    "wildcard in reserved zone": ({"dns_names": ("*.keyreeve.invalid",)}, "reserved"),
    "wildcard over reserved zone": ({"dns_names": ("*.invalid",)}, "reserved"),
    "odd backend": ({"key_backend": "../x"}, "key_backend"),
    "long hint": ({"hint": "é" * 513}, "hint"),
    "digest with Ed25519": (
        {"purposes": frozenset({Purpose.DIGEST}), "key_type": KeyType.ED25519},
        "purposes holds digest",
    ),
    "token purpose": ({"purposes": frozenset({Purpose.JWT_SVID})}, "purposes"),
    "CRL purpose": ({"purposes": frozenset({Purpose.X509_CRL})}, "purposes"),
    "authority purpose": ({"purposes": frozenset({Purpose.X509_CERTIFICATE})}, "purposes"),
    "no purpose": ({"purposes": frozenset()}, "purposes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_entry_is_refused_by_rule(rig: Any, case: str) -> None:
    changes, rule = BAD[case]
    rig.entry()
    with pytest.raises(InvalidRequest, match=rule):
        rig.entry(**changes)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("", "x"), ("Unix", "uid:1"), ("k8s:ns", "x"), ("unix", ""), ("unix", "uid"), ("unix", "uid:"), ("unix", "uid:-1"),
        ("unix", "uid:01"), ("unix", "uid:root"), ("unix", "shell:x"), ("unix", "path:bin"), ("unix", "sha256:AB"),
        ("k8s", "ns:\n"), ("k8s", "x" * 1025), ("k8s", "\udc80"),
    ],
)  # fmt: skip
def test_bad_selector_is_refused(kind: str, value: str) -> None:
    assert str(Selector("unix", "uid:1")) == "unix:uid:1"
    with pytest.raises(InvalidRequest):
        Selector(kind, value)


def test_delegate_is_one_of_two() -> None:
    Delegate((UID,))
    for odd in ({}, {"selectors": (UID,), "spiffe_id": SpiffeId(TD, "/a")}, {"selectors": (UID, UID)}):
        with pytest.raises(InvalidRequest):
            Delegate(**odd)


def test_custody_node_is_not_offered_yet(rig: Any) -> None:
    with pytest.raises(FailedPrecondition, match="not offered yet"):
        rig.entry(custody=Custody.NODE)


def test_foreign_trust_domain_is_refused(rig: Any) -> None:
    foreign = rig.entry()
    foreign = replace(
        foreign,
        spiffe_id=SpiffeId.parse("spiffe://other.org/a"),
        parent_id=SpiffeId.parse("spiffe://other.org/keyreeve/agent/a"),
    )
    with pytest.raises(InvalidRequest, match="not in trust domain"):
        create_entry(rig.ca, foreign)


def test_ttl_over_the_cas_maximum_and_past_expiry_are_refused(rig: Any) -> None:
    with pytest.raises(InvalidRequest, match="maximum of 86400"):
        create_entry(rig.ca, rig.entry(x509_svid_ttl=timedelta(hours=25)))
    late = rig.entry(expires_at=rig.clock.now + timedelta(seconds=1))
    rig.clock.advance(timedelta(seconds=2))
    with pytest.raises(InvalidRequest, match="past"):
        create_entry(rig.ca, late)


def test_duplicates_and_stale_updates_are_conflicts(rig: Any) -> None:
    entry = create_entry(rig.ca, rig.entry())
    with pytest.raises(Conflict):
        create_entry(rig.ca, rig.entry())
    update_entry(rig.ca, replace(entry, hint="x"), read_revision=1)
    with pytest.raises(Conflict):
        update_entry(rig.ca, replace(entry, hint="y"), read_revision=1)
    with pytest.raises(NotFound):
        update_entry(rig.ca, replace(entry, entry_id="none"), read_revision=1)


@pytest.mark.parametrize(
    "change",
    [
        {"spiffe_id": SpiffeId(TD, "/other")},
        {"parent_id": SpiffeId(TD, "/keyreeve/agent/n2")},
        {"key_scope": KeyScope.NODE},
        {"key_type": KeyType.RSA_2048},
        {"key_backend": "hsm"},
        {"purposes": frozenset({Purpose.TLS13_SERVER_VERIFY})},
    ],
)
def test_what_an_update_cannot_change(rig: Any, change: dict[str, Any]) -> None:
    entry = create_entry(rig.ca, rig.entry())
    with pytest.raises(InvalidRequest, match="cannot be changed"):
        update_entry(rig.ca, replace(entry, **change), read_revision=1)


def test_entries_that_share_a_key_agree_on_it(rig: Any) -> None:
    create_entry(rig.ca, rig.entry())
    with pytest.raises(FailedPrecondition, match="shares the key"):
        create_entry(rig.ca, rig.entry(agent="n2", key_type=KeyType.RSA_2048))
    create_entry(rig.ca, rig.entry(agent="n2", key_type=KeyType.RSA_2048, key_scope=KeyScope.NODE))


def test_expired_entries_are_pruned(rig: Any) -> None:
    create_entry(rig.ca, rig.entry(expires_at=rig.clock.now + timedelta(minutes=1)))
    kept = create_entry(rig.ca, rig.entry("/kept"))
    assert prune_expired_entries(rig.ca) == 0
    rig.clock.advance(timedelta(minutes=2))
    assert prune_expired_entries(rig.ca) == 1
    assert list_entries(rig.ca, spiffe_id="", parent_id="", limit=10, after="") == [kept]
    delete_entry(rig.ca, kept.entry_id)


def test_entry_goes_through_proto_and_back(rig: Any) -> None:
    entry = rig.entry(
        delegates=(Delegate((UID,)), Delegate(spiffe_id=SpiffeId(TD, "/proxy"))),
        x509_svid_ttl=timedelta(seconds=90),
        dns_names=("a.example.org",),
        key_scope=KeyScope.NODE,
        key_type=KeyType.EC_P384,
        hint="x",
        expires_at=rig.clock.now + timedelta(days=1),
    )
    assert entry_from_proto(entry_to_proto(entry), entry_id=entry.entry_id, now=entry.created_at) == entry


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"spiffe_id": ""}, "spiffe_id: is missing"),
        ({"spiffe_id": "https://x"}, "ID-01"),
        ({"parent_id": ""}, "parent_id: is missing"),
        ({"custody": 99}, "custody"),
        ({"key_scope": 99}, "key_scope"),
        ({"key_type": 99}, "key_type"),
        ({"purposes": [99]}, "purposes"),
        ({"purposes": [types_pb2.PURPOSE_UNSPECIFIED]}, "purposes"),
    ],
)
def test_bad_proto_is_refused_by_field(rig: Any, change: dict[str, Any], rule: str) -> None:
    message = entry_to_proto(rig.entry())
    for name, value in change.items():
        if isinstance(value, list):
            del getattr(message, name)[:]
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    with pytest.raises((InvalidRequest, InvalidSpiffeId), match=rule):
        entry_from_proto(message, entry_id="e", now=rig.clock.now)


def test_times_out_of_range_are_refused(rig: Any) -> None:
    for field, seconds in (("x509_svid_ttl", 2**62), ("expires_at", 2**62)):
        message = ca_pb2.Entry(spiffe_id="spiffe://example.org/a", parent_id="spiffe://example.org/keyreeve/agent/a")
        getattr(message, field).seconds = seconds
        with pytest.raises(InvalidRequest, match=field):
            entry_from_proto(message, entry_id="e", now=rig.clock.now)
