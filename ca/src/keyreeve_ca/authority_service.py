"""Use cases on authorities: make the root and the issuing ones, activate, rotate. Their keys are made in and never leave the key cluster."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from hashlib import sha256
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key
from keyreeve_client.key_admin import AuthorityKind, AuthorityProfile, ClusterKey, KeySpec
from keyreeve_common.errors import FailedPrecondition, KeyreeveError
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import key_type_of
from keyreeve_common.telemetry import log, log_warning

from keyreeve_ca.domain.authority import (
    Authority,
    AuthorityAction,
    AuthorityState,
    activate,
    authority_id_of,
    check_can_prepare,
    due_action,
    next_number,
    prepare,
    prepared_authority,
)
from keyreeve_ca.domain.issuance import (
    ROOT_PATH_LENGTH,
    SERIAL_BYTES,
    AuthorityOrder,
    authority_subject,
    build_authority,
    check_issued,
    make_serial,
    sign_builder,
    validity,
)
from keyreeve_ca.domain.records import SvidRecord, SvidState
from keyreeve_ca.domain.svid_lint import check_authority
from keyreeve_ca.service import Ca, sign_as
from keyreeve_ca.upstream_service import certify_by_upstream, with_upstream_root

_PURPOSES = frozenset({Purpose.X509_CERTIFICATE})
_PURPOSES_UPSTREAM = _PURPOSES | {Purpose.CERTIFICATE_REQUEST}


def root_of(authorities: list[Authority], now: datetime) -> Authority:
    """Our root that signs issuing authorities: the newest that has not expired. Raises: FailedPrecondition."""
    roots = [each for each in authorities if each.root and not each.is_expired(now) and not each.is_upstream]
    if not roots:
        raise FailedPrecondition(
            "there is no root authority in the key cluster; run keyreeve init, or name the upstream"
        )
    return max(roots, key=lambda each: each.number)


def ensure_authority_key(ca: Ca, *, root: bool, number: int) -> ClusterKey:
    """The key of the authority with this number; a retry gives the same key again."""
    policy = ca.policy
    kind = "root" if root else "issuing"
    by_upstream = ca.upstream is not None and not root
    mark = sha256(policy.trust_domain.name.encode()).hexdigest()[:32]
    longest = max(policy.workload.max_ttl, policy.agent.max_ttl, policy.service.max_ttl)
    profile = AuthorityProfile(
        trust_domain=policy.trust_domain,
        kind=AuthorityKind.ROOT if root else AuthorityKind.ISSUING,
        subject_der=authority_subject(policy.trust_domain, root=root, number=number).public_bytes(),
        max_validity=(policy.lives.root_ttl if root else longest) + policy.lives.max_backdate,
        max_backdate=policy.lives.max_backdate,
        max_path_length=ROOT_PATH_LENGTH if root else 0,
    )
    return ca.cluster.create_key(
        KeySpec(
            request_id=f"authority-{kind}-{mark}-{number}" + ("-upstream" if by_upstream else ""),
            key_type=policy.authority_key_type,
            role=KeyRole.AUTHORITY,
            purposes=_PURPOSES_UPSTREAM if by_upstream else _PURPOSES,
            label=f"{policy.trust_domain.id} {kind} authority {number}"[:250],
            backend=policy.authority_backend,
            authority_profile=profile,
        )
    )


def ensure_own_grant(ca: Ca, key_id: str) -> bool:
    """Lets the CA use an authority key, unless a grant was ever made: one that was revoked stays so. Whether it made one."""
    if ca.cluster.list_grants(key_id=key_id, holder=ca.policy.ca_id):
        return False
    purposes = ca.cluster.get_key(key_id).purposes & _PURPOSES_UPSTREAM
    ca.cluster.create_grant(key_id, ca.policy.ca_id, purposes=purposes, expires_at=None)
    return True


def make_root(ca: Ca) -> Authority:
    """The first root, self-signed through the key cluster or the upstream's; the one that is there, if there is one."""
    authorities = ca.store.list_authorities()
    existing = [each for each in authorities if each.root]
    if existing:
        return existing[0]
    if ca.upstream is not None:
        root, after = with_upstream_root(ca, ca.upstream, authorities)
    else:
        key = ensure_authority_key(ca, root=True, number=1)
        root = _certify(ca, key, root=None, number=1)
        after = [*authorities, root]
    ca.store.save_authorities(after, expected=authorities)
    log("root_authority_made", authority_id=root.authority_id, not_after=root.not_after.isoformat())
    return root


def prepare_authority(ca: Ca) -> Authority:
    """Makes the next issuing authority. Raises: Conflict when a usable one is prepared already."""
    now = ca.clock()
    stored = ca.store.list_authorities()
    check_can_prepare(stored, now)
    number = next_number(stored, root=False)
    if ca.upstream is None:
        authorities, root = stored, root_of(stored, now)
    else:  # it may have another root by now
        root, authorities = with_upstream_root(ca, ca.upstream, stored)
    key = ensure_authority_key(ca, root=False, number=number)
    ensure_own_grant(ca, key.key_id)
    if ca.upstream is None:
        fresh = _certify(ca, key, root=root, number=number)
    else:
        fresh = certify_by_upstream(ca, ca.upstream, key, root=root, number=number)
    after = prepare(authorities, fresh, now)
    ca.store.save_authorities(after, expected=stored)
    log("authority_prepared", authority_id=fresh.authority_id, not_after=fresh.not_after.isoformat())
    return next(each for each in after if each.authority_id == fresh.authority_id)


def activate_authority(ca: Ca, authority_id: str) -> Authority:
    """Raises: NotFound, FailedPrecondition, Conflict."""
    authorities = ca.store.list_authorities()
    after = activate(authorities, authority_id, ca.clock())
    ca.store.save_authorities(after, expected=authorities)
    log("authority_activated", authority_id=authority_id)
    return next(each for each in after if each.authority_id == authority_id)


def rotate_authorities(ca: Ca) -> AuthorityAction:
    """Does what the life cycle says is due, and says what that was."""
    authorities = ca.store.list_authorities()
    action = due_action(authorities, ca.clock())
    if action is AuthorityAction.PREPARE:
        prepare_authority(ca)
    if action is AuthorityAction.ACTIVATE:
        prepared = prepared_authority(authorities)
        assert prepared is not None  # noqa: S101 - due_action saw it
        activate_authority(ca, prepared.authority_id)
    return action


def _certify(ca: Ca, key: ClusterKey, *, root: Authority | None, number: int) -> Authority:
    """The authority's certificate: built, linted, recorded, signed by the root (or by itself), verified, recorded."""
    policy, now = ca.policy, ca.clock()
    public_key = cast("CertificatePublicKeyTypes", load_der_public_key(key.spki_der))
    issuer = root.certificate if root else None
    life = policy.lives.issuing_ttl if root else policy.lives.root_ttl
    start, end = validity(now, life, backdate=policy.lives.backdate, issuer=issuer)
    serial = make_serial(ca.entropy(SERIAL_BYTES))
    subject = authority_subject(policy.trust_domain, root=root is None, number=number)
    order = AuthorityOrder(policy.trust_domain, subject, public_key, serial, start, end, issuer)
    builder = build_authority(order)
    signer_key: Any = issuer.public_key() if issuer else public_key
    linted = sign_builder(builder, ca.lint_key(key_type_of(signer_key)))
    check_authority(linted, trust_domain=policy.trust_domain, issuer=issuer, now=now)
    record = SvidRecord(
        serial=f"{serial:x}",
        spiffe_id=policy.trust_domain.id,
        subject=f"authority-{authority_id_of(linted)}",
        authority_id=root.authority_id if root else authority_id_of(linted),
        state=SvidState.INTENDED,
        not_before=start,
        not_after=end,
        created_at=now,
        key_id=key.key_id,
    )
    ca.store.record_intent(record)
    unsigned = Authority(authority_id_of(linted), AuthorityState.PREPARED, key.key_id, linted, root is None, number)
    try:
        issued = sign_as(ca, root or unsigned, builder)
        check_issued(issued, linted, issuer)
    except KeyreeveError as error:
        log_warning("authority_not_certified", code=error.code.value, detail=error.detail)
        ca.store.record_failed(record.serial, str(error))
        raise
    ca.store.record_issued(record.serial, [issued.public_bytes(Encoding.DER)])
    state = AuthorityState.ACTIVE if root is None else AuthorityState.PREPARED
    return replace(unsigned, certificate=issued, state=state)
