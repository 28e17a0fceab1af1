"""Issuing: the one story by which every SVID of this CA comes to be, told for a batch at once (ADR 29).

Each order stands for itself: what fails for one is its own outcome, and the others go on. What the batch shares is one look at the authorities,
one transaction for all intents, one signing call, one transaction for all results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from keyreeve_common.errors import Conflict, KeyreeveError
from keyreeve_common.purposes import Purpose
from keyreeve_common.telemetry import log, log_error

from keyreeve_ca.domain.authority import Authority, active_authority
from keyreeve_ca.domain.issuance import (
    SERIAL_BYTES,
    LeafOrder,
    Unsigned,
    build_leaf,
    chain_without_root,
    check_issued,
    leave_unsigned,
    make_serial,
    validity,
)
from keyreeve_ca.domain.records import SvidRecord, SvidState
from keyreeve_ca.domain.svid_lint import LintContext, check_svid, spki_hash
from keyreeve_ca.service import Ca, Outcome, SvidOrder


@dataclass(frozen=True, slots=True)
class _Intent:
    """An SVID that passed the lint, before it is signed."""

    record: SvidRecord
    unsigned: Unsigned


@dataclass(frozen=True, slots=True)
class _Issuer:
    """The authority of one batch, and what its leaves are held against."""

    authority: Authority
    blocked: frozenset[bytes]
    now: datetime

    @property
    def certificate(self) -> x509.Certificate:
        return self.authority.certificate


_Planned: TypeAlias = _Intent | KeyreeveError


def issue_x509_svid(ca: Ca, order: SvidOrder) -> SvidRecord:
    """Issues one SVID, or leaves a record of why not.

    Raises: InvalidRequest, ProfileViolation, FailedPrecondition, Unavailable, Internal. Spec: spiffe.md 9.4; boulder.
    """
    (outcome,) = issue_x509_svids(ca, [order])
    if isinstance(outcome, KeyreeveError):
        raise outcome
    return outcome


def issue_x509_svids(ca: Ca, orders: Sequence[SvidOrder]) -> list[Outcome]:
    """One outcome for each order, in their order; those of other callers who come at the same time go with them."""
    return ca.flow.run(orders, lambda batch: issue_batch(ca, batch))


def issue_batch(ca: Ca, orders: Sequence[SvidOrder]) -> list[Outcome]:
    """One outcome for each order. Raises: nothing that is the fault of one order alone."""
    # 1. to 4. For each order by itself: authorise, allocate a serial, build, lint.
    try:
        issuer = _issuer(ca)
    except KeyreeveError as error:
        return [error] * len(orders)
    planned: list[_Planned] = [_plan_guarded(ca, order, issuer) for order in orders]
    # 5. Record the intents: from here on the serials are taken.
    planned = _record_intents(ca, planned)
    # 6. Sign, 7. verify against the TBS and the authority.
    outcomes = _sign(ca, planned, issuer.authority)
    # 8. Record the results; an SVID that is not on record is not given out.
    return _record_results(ca, planned, outcomes)


def _issuer(ca: Ca) -> _Issuer:
    authorities = ca.store.list_authorities()
    keys = frozenset(spki_hash(each.certificate.public_key()) for each in authorities)
    return _Issuer(active_authority(authorities), ca.policy.blocked | keys, ca.clock())


def _plan_guarded(ca: Ca, order: SvidOrder, issuer: _Issuer) -> _Planned:
    try:
        return _plan(ca, order, issuer)
    except KeyreeveError as error:
        return error


def _plan(ca: Ca, order: SvidOrder, issuer: _Issuer) -> _Intent:
    ca.check_own(order.spiffe_id)
    order.profile.check_id(order.spiffe_id)
    serial = make_serial(ca.entropy(SERIAL_BYTES))
    start, end = validity(
        issuer.now, order.profile.life(order.ttl), backdate=order.profile.backdate, issuer=issuer.certificate
    )
    leaf = LeafOrder(
        order.spiffe_id, order.public_key, serial, start, end, order.dns_names, order.profile.is_infrastructure
    )
    unsigned = leave_unsigned(build_leaf(leaf, issuer.certificate), issuer.certificate.public_key())
    check_svid(unsigned.linted, _lint_context(ca, order, issuer))
    record = SvidRecord(
        serial=f"{serial:x}",
        spiffe_id=order.spiffe_id,
        subject=order.subject,
        authority_id=issuer.authority.authority_id,
        state=SvidState.INTENDED,
        not_before=start,
        not_after=end,
        created_at=issuer.now,
        entry_id=order.entry_id,
        key_id=order.key_id,
        wanted=order.wanted,
    )
    return _Intent(record, unsigned)


def _lint_context(ca: Ca, order: SvidOrder, issuer: _Issuer) -> LintContext:
    return LintContext(
        trust_domain=ca.policy.trust_domain,
        issuer=issuer.certificate,
        now=issuer.now,
        max_life=order.profile.max_ttl,
        max_backdate=ca.policy.lives.max_backdate,
        infrastructure=order.profile.is_infrastructure,
        blocked=issuer.blocked,
    )


def _record_intents(ca: Ca, planned: Sequence[_Planned]) -> list[_Planned]:
    """The same, but for those that could not be recorded."""
    intents = [each for each in planned if isinstance(each, _Intent)]
    if not intents:
        return list(planned)
    try:
        ca.store.record_intents([each.record for each in intents])
    except Conflict:  # a serial was used before: that costs no other order its SVID
        return [_record_alone(ca, each) if isinstance(each, _Intent) else each for each in planned]
    except KeyreeveError as error:
        return [error if isinstance(each, _Intent) else each for each in planned]
    return list(planned)


def _record_alone(ca: Ca, intent: _Intent) -> _Planned:
    try:
        ca.store.record_intents([intent.record])
    except KeyreeveError as error:
        log_error("svid_intent_refused", serial=intent.record.serial, code=error.code.value, detail=error.detail)
        return error
    return intent


def _sign(ca: Ca, planned: Sequence[_Planned], authority: Authority) -> list[Outcome]:
    intents = [each for each in planned if isinstance(each, _Intent)]
    signed = iter(_signatures(ca, intents, authority))
    return [_verified(each, next(signed), authority) if isinstance(each, _Intent) else each for each in planned]


def _signatures(ca: Ca, intents: Sequence[_Intent], authority: Authority) -> Sequence[bytes | KeyreeveError]:
    if not intents:
        return []
    scheme = intents[0].unsigned.scheme  # one authority, one key type, one scheme
    messages = [each.unsigned.tbs_der for each in intents]
    try:
        return ca.cluster.sign_many(authority.key_id, scheme, Purpose.X509_CERTIFICATE, messages=messages)
    except KeyreeveError as error:
        return [error] * len(intents)


def _verified(intent: _Intent, signature: bytes | KeyreeveError, authority: Authority) -> Outcome:
    """The record of the SVID with its chain, if it is the linted one and the authority's signature holds."""
    if isinstance(signature, KeyreeveError):
        return signature
    try:
        issued = intent.unsigned.signed(signature)
        check_issued(issued, intent.unsigned.linted, authority.certificate)
    except KeyreeveError as error:
        return error
    chain = chain_without_root(issued, [authority.certificate])
    chain_der = tuple(each.public_bytes(Encoding.DER) for each in chain)
    return replace(intent.record, state=SvidState.ISSUED, chain_der=chain_der, current=True)


def _record_results(ca: Ca, planned: Sequence[_Planned], outcomes: Sequence[Outcome]) -> list[Outcome]:
    issued = [each for each in outcomes if isinstance(each, SvidRecord)]
    failures = {
        intent.record.serial: str(outcome)
        for intent, outcome in zip(planned, outcomes, strict=True)
        if isinstance(intent, _Intent) and isinstance(outcome, KeyreeveError)
    }
    try:
        if issued or failures:
            ca.store.record_results(issued, failures)
    except KeyreeveError as error:
        for serial in failures:
            log_error("svid_failure_not_recorded", serial=serial, detail=error.detail)
        return [error if isinstance(each, SvidRecord) else each for each in outcomes]
    for each in issued:
        log("svid_issued", spiffe_id=str(each.spiffe_id), serial=each.serial, not_after=each.not_after.isoformat())
    return list(outcomes)
