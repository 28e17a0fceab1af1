"""Use cases with a parent authority outside of the key cluster: take its root, have it certify an issuing authority.

The issuing authority's key is born in the key cluster as always, and asks for its certificate itself (purpose certificate_request). What comes
back is held to the same lint as a certificate that our own root signs: the parent is trusted to sign, not to decide what.
"""

from __future__ import annotations

from datetime import datetime
from typing import cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from cryptography.x509.oid import ExtensionOID
from keyreeve_client.key_admin import ClusterKey
from keyreeve_client.remote_key import certificate_hash
from keyreeve_common.errors import FailedPrecondition, ProfileViolation
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import key_type_of
from keyreeve_common.telemetry import log

from keyreeve_ca.domain.authority import UPSTREAM_KEY, Authority, AuthorityState, authority_id_of, next_number
from keyreeve_ca.domain.issuance import authority_subject, validity
from keyreeve_ca.domain.records import SvidRecord, SvidState
from keyreeve_ca.domain.svid_lint import check_authority
from keyreeve_ca.ports import UpstreamAuthority
from keyreeve_ca.service import Ca


def with_upstream_root(
    ca: Ca, upstream: UpstreamAuthority, authorities: list[Authority]
) -> tuple[Authority, list[Authority]]:
    """The parent's root of now, and all authorities with it: it joins the bundle when its first issuing authority is prepared.

    Raises: FailedPrecondition when it cannot be a root of SVIDs.
    """
    certificate = upstream.fetch_root()
    _check_root(certificate, ca.clock())
    authority_id = authority_id_of(certificate)
    for each in authorities:
        if each.root and each.certificate == certificate:
            return each, authorities
    key_id = f"{UPSTREAM_KEY}{authority_id}"[:64]
    root = Authority(
        authority_id, AuthorityState.ACTIVE, key_id, certificate, root=True, number=next_number(authorities, root=True)
    )
    log("upstream_root_found", authority_id=authority_id, upstream=upstream.name, not_after=root.not_after.isoformat())
    return root, [*authorities, root]


def certify_by_upstream(
    ca: Ca, upstream: UpstreamAuthority, key: ClusterKey, *, root: Authority, number: int
) -> Authority:
    """The certificate of an issuing authority: requested, checked, recorded. Its serial is the parent's, so no intent comes before.

    Raises: ProfileViolation when the parent signed something else than was asked for; FailedPrecondition, Unavailable.
    """
    policy, now = ca.policy, ca.clock()
    start, end = validity(now, policy.lives.issuing_ttl, backdate=policy.lives.backdate, issuer=root.certificate)
    subject = authority_subject(policy.trust_domain, root=False, number=number)
    log("authority_requested", upstream=upstream.name, key_id=key.key_id, not_after=end.isoformat())
    issued = upstream.sign_authority(
        _request(ca, key, subject), not_after=end, backdate=max(now - start, policy.lives.backdate)
    )
    _check_issued(ca, issued, key=key, subject=subject, root=root.certificate, end=end, now=now)
    record = SvidRecord(
        serial=f"{issued.serial_number:x}",
        spiffe_id=policy.trust_domain.id,
        subject=f"authority-{authority_id_of(issued)}",
        authority_id=root.authority_id,
        state=SvidState.INTENDED,
        not_before=issued.not_valid_before_utc,
        not_after=issued.not_valid_after_utc,
        created_at=now,
        key_id=key.key_id,
    )
    ca.store.record_intent(record)
    ca.store.record_issued(record.serial, [issued.public_bytes(Encoding.DER)])
    return Authority(authority_id_of(issued), AuthorityState.PREPARED, key.key_id, issued, root=False, number=number)


def _request(ca: Ca, key: ClusterKey, subject: x509.Name) -> bytes:
    own_id = x509.UniformResourceIdentifier(str(ca.policy.trust_domain.id))
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .add_extension(x509.SubjectAlternativeName([own_id]), critical=False)
    )
    private_key = ca.cluster.private_key(key.key_id, key.spki_der, purpose=Purpose.CERTIFICATE_REQUEST)
    public_key = private_key.public_key()
    rsa_padding = padding.PKCS1v15() if isinstance(public_key, rsa.RSAPublicKey) else None
    request = builder.sign(private_key, certificate_hash(key_type_of(public_key)), rsa_padding=rsa_padding)
    return request.public_bytes(Encoding.DER)


def _check_root(certificate: x509.Certificate, now: datetime) -> None:
    try:
        certificate.verify_directly_issued_by(certificate)
    except (InvalidSignature, ValueError, TypeError):
        raise FailedPrecondition(
            "the upstream's issuer is not self-signed: give a mount and issuer whose certificate is a root, since chains"
            " of several authorities are not supported"
        ) from None
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except x509.ExtensionNotFound:
        raise FailedPrecondition("the upstream's root lacks basicConstraints or subjectKeyIdentifier") from None
    if not constraints.ca or constraints.path_length == 0:
        raise FailedPrecondition("the upstream's root may sign no authority: its path length is 0")
    if certificate.not_valid_after_utc <= now:
        raise FailedPrecondition("the upstream's root has expired: rotate it there")
    _check_no_name_constraints(certificate, "the upstream's root")


def _check_issued(
    ca: Ca,
    issued: x509.Certificate,
    *,
    key: ClusterKey,
    subject: x509.Name,
    root: x509.Certificate,
    end: datetime,
    now: datetime,
) -> None:
    """Raises: ProfileViolation, FailedPrecondition."""
    public_key = cast("CertificatePublicKeyTypes", load_der_public_key(key.spki_der))
    spki = issued.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    rules = {
        "key_is_the_requested_one": spki == public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        "subject_is_the_requested_one": issued.subject.public_bytes() == subject.public_bytes(),
        "not_after_is_not_later_than_requested": issued.not_valid_after_utc <= end,
        "serial_fits": 0 < issued.serial_number.bit_length() <= 159,
    }
    broken = [name for name, holds in rules.items() if not holds]
    try:
        issued.verify_directly_issued_by(root)
    except (InvalidSignature, ValueError, TypeError):
        broken.append("signature_is_of_the_root")
    if broken:
        raise ProfileViolation(f"the upstream signed something else than was asked for: {', '.join(broken)}")
    _check_no_name_constraints(issued, "the certificate that the upstream signed")
    try:
        check_authority(issued, trust_domain=ca.policy.trust_domain, issuer=root, now=now)
    except x509.ExtensionNotFound as error:
        raise ProfileViolation(f"the upstream signed a certificate without {error.oid.dotted_string}") from None


def _check_no_name_constraints(certificate: x509.Certificate, what: str) -> None:
    """Verifiers differ in which they know of DNS and URI constraints, and one that knows none refuses every SVID below."""
    if any(extension.oid == ExtensionOID.NAME_CONSTRAINTS for extension in certificate.extensions):
        raise FailedPrecondition(
            f"{what} has name constraints: use an issuer without, SVIDs below them fail in some verifiers"
        )
