"""Use cases on nodes: join tokens, attestation, renewal, eviction, bans. An agent acts only with its newest SVID or the one before it."""

from __future__ import annotations

from datetime import timedelta

from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from keyreeve_common.bundle import Bundle
from keyreeve_common.errors import AgentBanned, KeyreeveError, NotFound, PermissionDenied
from keyreeve_common.identity import SpiffeId
from keyreeve_common.telemetry import log, log_warning
from keyreeve_common.x509_svid import X509Svid

from keyreeve_ca.domain.attestation import (
    ATTESTATION_TYPE,
    TOKEN_BYTES,
    JoinToken,
    agent_id_for,
    check_agent_version,
    check_token_ttl,
    public_key_of_csr,
    token_hash,
    token_text,
)
from keyreeve_ca.domain.records import Agent, SvidRecord, digest_of
from keyreeve_ca.issuance_service import issue_x509_svid
from keyreeve_ca.service import Ca, SvidOrder, current_bundle

_BANNED = "agent is banned; unban it first"
_UNKNOWN = "agent is not attested; it needs a new join token"


def create_join_token(ca: Ca, *, agent_id: str, ttl: timedelta | None) -> tuple[str, JoinToken]:
    """The token, shown this once, and what is kept of it. Raises: InvalidRequest, AgentBanned."""
    life = check_token_ttl(ttl)
    spiffe_id = agent_id_for(agent_id, ca.policy.trust_domain, ca.entropy(16))
    _check_not_banned(ca, spiffe_id)
    text = token_text(ca.entropy(TOKEN_BYTES))
    token = JoinToken(token_hash(text), spiffe_id, ca.clock() + life)
    ca.store.add_join_token(token)
    log("join_token_created", agent_id=str(spiffe_id), expires_at=token.expires_at.isoformat())
    return text, token


def attest_node(ca: Ca, *, token: str, csr_der: bytes, agent_version: str) -> tuple[SpiffeId, SvidRecord, Bundle]:
    """A node becomes an agent. A bad CSR does not use the token up, nor does an SVID that could not be issued.

    Raises: JoinTokenInvalid, InvalidRequest, KeyTypeNotSupported, AgentBanned, Unavailable.
    """
    version = check_agent_version(agent_version)
    public_key = public_key_of_csr(csr_der)
    taken = ca.store.take_join_token(token_hash(token), ca.clock())
    try:
        _check_not_banned(ca, taken.agent_id)
        record = _issue_agent_svid(ca, taken.agent_id, public_key)
        _save_attested(ca, taken.agent_id, record, version)
    except AgentBanned:
        raise
    except KeyreeveError:
        ca.store.add_join_token(taken)  # nothing was given out for it
        raise
    log("agent_attested", agent_id=str(taken.agent_id), serial=record.serial)
    return taken.agent_id, record, current_bundle(ca)


def _save_attested(ca: Ca, agent_id: SpiffeId, record: SvidRecord, version: str) -> None:
    now = ca.clock()
    attested = Agent(
        spiffe_id=agent_id,
        attestation_type=ATTESTATION_TYPE,
        serials=(record.serial,),
        svid_not_after=record.not_after,
        attested_at=now,
        last_seen_at=now,
        agent_version=version,
    )
    if not ca.store.save_agent(attested):
        raise AgentBanned(_BANNED)  # while its SVID was made


def renew_agent_svid(ca: Ca, caller: X509Svid, csr_der: bytes) -> SvidRecord:
    """Raises: PermissionDenied, AgentBanned, InvalidRequest, KeyTypeNotSupported, Unavailable."""
    agent = authorise_agent(ca, caller)
    record = _issue_agent_svid(ca, agent.spiffe_id, public_key_of_csr(csr_der))
    saved = ca.store.renew_agent(
        agent.spiffe_id,
        renewed_from=caller.serial,
        serial=record.serial,
        not_after=record.not_after,
        seen_at=ca.clock(),
    )
    if not saved:
        authorise_agent(ca, caller)  # says what happened while the SVID was made
        raise PermissionDenied(_UNKNOWN)
    return record


def authorise_agent(ca: Ca, caller: X509Svid) -> Agent:
    """The agent that this SVID is of, if it may act now. Raises: PermissionDenied, AgentBanned."""
    try:
        agent = ca.store.get_agent(caller.spiffe_id)
    except NotFound:
        raise PermissionDenied(_UNKNOWN) from None
    if agent.banned:
        raise AgentBanned("agent is banned")
    if agent.evicted:
        raise PermissionDenied("agent was evicted; it needs a new join token")
    if caller.serial not in agent.serials:
        raise PermissionDenied("SVID was replaced: the node attested anew since")
    return agent


def _issue_agent_svid(ca: Ca, agent_id: SpiffeId, public_key: CertificatePublicKeyTypes) -> SvidRecord:
    order = SvidOrder(
        profile=ca.policy.agent,
        spiffe_id=agent_id,
        public_key=public_key,
        subject=f"agent-{digest_of(agent_id)}",
    )
    return issue_x509_svid(ca, order)


def _check_not_banned(ca: Ca, agent_id: SpiffeId) -> None:
    try:
        if ca.store.get_agent(agent_id).banned:
            raise AgentBanned(_BANNED)
    except NotFound:
        return


def list_agents(ca: Ca, *, limit: int, after: str) -> list[Agent]:
    return ca.store.list_agents(limit=limit, after=after)


def evict_agent(ca: Ca, spiffe_id: str) -> Agent:
    """Ends its streams, grants and right to renew; it must attest anew. Raises: NotFound."""
    return _stand(ca, spiffe_id, banned=None, evicted=True, event="agent_evicted")


def ban_agent(ca: Ca, spiffe_id: str) -> Agent:
    """Evicts it and refuses its SPIFFE ID until it is unbanned. Raises: NotFound."""
    return _stand(ca, spiffe_id, banned=True, evicted=True, event="agent_banned")


def unban_agent(ca: Ca, spiffe_id: str) -> Agent:
    """Lets the SPIFFE ID attest again; it stays evicted until it does. Raises: NotFound."""
    return _stand(ca, spiffe_id, banned=False, evicted=True, event="agent_unbanned")


def _stand(ca: Ca, spiffe_id: str, *, banned: bool | None, evicted: bool, event: str) -> Agent:
    agent = ca.store.set_agent_standing(SpiffeId.parse(spiffe_id), banned=banned, evicted=evicted)
    log_warning(event, agent_id=spiffe_id)
    return agent
