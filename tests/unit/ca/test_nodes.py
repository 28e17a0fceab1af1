"""Join tokens, attestation, renewal, eviction: what each bad input or moment answers."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from keyreeve_ca.domain.attestation import check_agent_version, public_key_of_csr, token_text
from keyreeve_ca.node_service import (
    attest_node,
    authorise_agent,
    ban_agent,
    create_join_token,
    evict_agent,
    renew_agent_svid,
    unban_agent,
)
from keyreeve_common.errors import (
    AgentBanned,
    InvalidRequest,
    InvalidSpiffeId,
    JoinTokenInvalid,
    KeyTypeNotSupported,
    NotFound,
    PermissionDenied,
    StorageBusy,
    Unavailable,
)
from keyreeve_common.identity import SpiffeId
from keyreeve_common.x509_svid import X509Svid, parse_x509_svid

N1 = "spiffe://example.org/keyreeve/agent/n1"


def attest(rig: Any, csr: bytes, token: str | None = None) -> X509Svid:
    text = token if token is not None else create_join_token(rig.ca, agent_id=N1, ttl=None)[0]
    _, record, bundle = attest_node(rig.ca, token=text, csr_der=csr, agent_version="1")
    assert bundle.authorities
    return parse_x509_svid(x509.load_der_x509_certificate(record.chain_der[0]))


def test_only_the_hash_of_a_token_is_kept(rig: Any) -> None:
    text, kept = create_join_token(rig.ca, agent_id="", ttl=None)
    assert len(text) == 43
    assert str(kept.agent_id).startswith("spiffe://example.org/keyreeve/agent/")
    with rig.store.engine.connect() as connection:
        raw: Any = connection.connection.driver_connection
        dump = "\n".join(raw.iterdump())
    assert text not in dump
    assert kept.token_hash.hex() in dump.lower()


def test_used_expired_unknown_and_malformed_tokens_are_refused_alike(rig: Any, csr: bytes) -> None:
    used, _ = create_join_token(rig.ca, agent_id=N1, ttl=None)
    attest(rig, csr, used)
    expired, _ = create_join_token(rig.ca, agent_id=N1, ttl=timedelta(seconds=1))
    rig.clock.advance(timedelta(seconds=1))
    answers = set()
    for token in (used, expired, token_text(b"\0" * 32), "", "x", "\udc80", "x" * 100_000):
        with pytest.raises(JoinTokenInvalid) as refused:
            attest(rig, csr, token)
        answers.add(str(refused.value))
    assert len(answers) == 1


def test_bad_csr_does_not_use_the_token_up(rig: Any, csr: bytes) -> None:
    token, _ = create_join_token(rig.ca, agent_id=N1, ttl=None)
    with pytest.raises(InvalidRequest):
        attest(rig, b"nonsense", token)
    assert attest(rig, csr, token)


def test_key_cluster_that_is_away_does_not_use_the_token_up(rig: Any, csr: bytes) -> None:
    token, _ = create_join_token(rig.ca, agent_id=N1, ttl=None)
    rig.cluster.failure = Unavailable("away")
    with pytest.raises(Unavailable):
        attest(rig, csr, token)
    rig.cluster.failure = None
    assert attest(rig, csr, token)


@pytest.mark.parametrize(
    "agent_id",
    ["spiffe://example.org/web", "spiffe://example.org/keyreeve/agent/", "spiffe://example.org/keyreeve/agent/a/b",
     "spiffe://example.org/keyreeve/ca", "spiffe://other.org/keyreeve/agent/a", "x"],
)  # fmt: skip
def test_token_for_no_agent_is_refused(rig: Any, agent_id: str) -> None:
    with pytest.raises((InvalidRequest, InvalidSpiffeId)):
        create_join_token(rig.ca, agent_id=agent_id, ttl=None)


@pytest.mark.parametrize("ttl", [timedelta(0), timedelta(seconds=-5), timedelta(hours=24, seconds=1)])
def test_token_life_is_bounded(rig: Any, ttl: timedelta) -> None:
    with pytest.raises(InvalidRequest, match="24 hours"):
        create_join_token(rig.ca, agent_id=N1, ttl=ttl)


def tampered(csr: bytes) -> bytes:
    return csr[:-1] + bytes([csr[-1] ^ 1])


def weak_csr() -> bytes:
    key = rsa.generate_private_key(65537, 1024)  # noqa: S505 - refused, that is the test
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def test_bad_csrs_are_refused(csr: bytes) -> None:
    assert public_key_of_csr(csr)
    for bad in (b"", b"x", csr[:-5], csr + b"x", tampered(csr), b"\x30" * 20_000):
        with pytest.raises(InvalidRequest):
            public_key_of_csr(bad)
    with pytest.raises(KeyTypeNotSupported):
        public_key_of_csr(weak_csr())


def test_agent_version_is_bounded() -> None:
    assert check_agent_version("0.1.0 (test)") == "0.1.0 (test)"
    for bad in ("x" * 256, "a\nb", "\x00"):
        with pytest.raises(InvalidRequest):
            check_agent_version(bad)


def test_only_the_newest_svid_and_the_one_before_act(rig: Any, csr: bytes) -> None:
    first = attest(rig, csr)

    def renew(caller: X509Svid) -> X509Svid:
        record = renew_agent_svid(rig.ca, caller, csr)
        return parse_x509_svid(x509.load_der_x509_certificate(record.chain_der[0]))

    second = renew(first)
    again = renew(first)  # the answer was lost, the agent asks again with what it has
    with pytest.raises(PermissionDenied):
        authorise_agent(rig.ca, second)
    third = renew(again)
    with pytest.raises(PermissionDenied, match="attested anew"):
        authorise_agent(rig.ca, first)
    assert authorise_agent(rig.ca, third).serials == (third.serial, again.serial)


def test_evicted_banned_and_unknown_agents_do_not_act(rig: Any, csr: bytes) -> None:
    svid = attest(rig, csr)
    evict_agent(rig.ca, N1)
    with pytest.raises(PermissionDenied, match="evicted"):
        renew_agent_svid(rig.ca, svid, csr)
    spare, _ = create_join_token(rig.ca, agent_id=N1, ttl=None)
    ban_agent(rig.ca, N1)
    with pytest.raises(AgentBanned):
        authorise_agent(rig.ca, svid)
    with pytest.raises(AgentBanned):
        create_join_token(rig.ca, agent_id=N1, ttl=None)
    with pytest.raises(AgentBanned):
        attest(rig, csr, spare)
    unban_agent(rig.ca, N1)
    with pytest.raises(PermissionDenied):
        authorise_agent(rig.ca, svid)
    fresh = attest(rig, csr)
    assert authorise_agent(rig.ca, fresh)
    with pytest.raises(NotFound):
        ban_agent(rig.ca, "spiffe://example.org/keyreeve/agent/none")
    with rig.store.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM agents")
    with pytest.raises(PermissionDenied, match="not attested"):
        authorise_agent(rig.ca, fresh)


def during_the_next_signature(rig: Any, monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Runs `act` once, while the key cluster signs."""
    sign, left = rig.cluster.sign, [act]

    def slow(*arguments: Any) -> bytes:
        if left:
            left.pop()()
        return bytes(sign(*arguments))

    monkeypatch.setattr(rig.cluster, "sign", slow)


@pytest.mark.parametrize(("bar", "refusal"), [(ban_agent, AgentBanned), (evict_agent, PermissionDenied)])
def test_renewal_that_is_under_way_undoes_no_eviction(
    rig: Any, csr: bytes, monkeypatch: pytest.MonkeyPatch, bar: Any, refusal: type[Exception]
) -> None:
    first = attest(rig, csr)
    during_the_next_signature(rig, monkeypatch, lambda: bar(rig.ca, N1))
    with pytest.raises(refusal):
        renew_agent_svid(rig.ca, first, csr)
    with pytest.raises(refusal):
        authorise_agent(rig.ca, first)


def test_renewal_that_is_under_way_does_not_take_a_new_attestation_away(
    rig: Any, csr: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    stolen, fresh = attest(rig, csr), []
    during_the_next_signature(rig, monkeypatch, lambda: fresh.append(attest(rig, csr)))
    with pytest.raises(PermissionDenied):
        renew_agent_svid(rig.ca, stolen, csr)
    assert authorise_agent(rig.ca, fresh[0]).serials == (fresh[0].serial,)


def test_attestation_that_is_under_way_undoes_no_ban(rig: Any, csr: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    attest(rig, csr)
    token, _ = create_join_token(rig.ca, agent_id=N1, ttl=None)
    during_the_next_signature(rig, monkeypatch, lambda: ban_agent(rig.ca, N1))
    with pytest.raises(AgentBanned):
        attest(rig, csr, token)
    assert rig.store.get_agent(SpiffeId.parse(N1)).banned


def test_agent_that_could_not_be_recorded_does_not_use_the_token_up(
    rig: Any, csr: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, _ = create_join_token(rig.ca, agent_id=N1, ttl=None)

    def busy(_: Any) -> bool:
        raise StorageBusy("locked")

    with monkeypatch.context() as broken:
        broken.setattr(rig.store, "save_agent", busy)
        with pytest.raises(StorageBusy):
            attest(rig, csr, token)
    assert attest(rig, csr, token)
