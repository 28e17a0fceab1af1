"""Any profile on any accepted key yields an SVID that the lint and independent verifiers accept: cryptography, openssl, pkilint."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import PolicyBuilder, Store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keyreeve_ca.domain.authority import Authority, AuthorityState, authority_id_of
from keyreeve_ca.domain.issuance import (
    AuthorityOrder,
    LeafOrder,
    authority_subject,
    build_authority,
    build_leaf,
    check_issued,
    make_serial,
    sign_builder,
    validity,
)
from keyreeve_ca.domain.profiles import SvidKind, SvidProfile
from keyreeve_ca.domain.svid_lint import LintContext, check_authority, lint_svid
from keyreeve_ca.signers.local import ThrowAwayKeys
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.schemes import KeyType
from keyreeve_common.x509_svid import verify_chain

TD = TrustDomain("example.org")
NOW = datetime(2026, 6, 1, 12, 0, 0, tzinfo=UTC)
SUBJECT_KEYS, ISSUER_KEYS, LINT_KEYS = ThrowAwayKeys(), ThrowAwayKeys(), ThrowAwayKeys()
ISSUER_TYPES = [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048, KeyType.RSA_3072]
SUBJECT_TYPES = [*ISSUER_TYPES, KeyType.ED25519]


def make_authority(key_type: KeyType, issuer: Authority | None, issuer_key: Any) -> tuple[Authority, Any]:
    keys = ThrowAwayKeys()
    key = keys(key_type) if issuer is None else ISSUER_KEYS(key_type)
    root = issuer is None
    life = timedelta(days=3650) if root else timedelta(days=30)
    start, end = validity(NOW, life, backdate=timedelta(seconds=10), issuer=issuer.certificate if issuer else None)
    order = AuthorityOrder(
        TD,
        authority_subject(TD, root=root, number=1),
        key.public_key(),
        make_serial(b"\x01" * 16),
        start,
        end,
        issuer.certificate if issuer else None,
    )
    certificate = sign_builder(build_authority(order), issuer_key or key)
    check_authority(certificate, trust_domain=TD, issuer=order.issuer, now=NOW)
    return Authority(authority_id_of(certificate), AuthorityState.ACTIVE, "k", certificate, root), key


ROOT, ROOT_KEY = make_authority(KeyType.EC_P384, None, None)
ISSUERS = {key_type: make_authority(key_type, ROOT, ROOT_KEY)[0] for key_type in ISSUER_TYPES}

segment = st.from_regex(r"[a-zA-Z0-9._-]{1,30}", fullmatch=True).filter(lambda text: text not in (".", ".."))
label = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
dns_names = st.lists(
    st.builds(
        lambda star, parts: star + ".".join(parts), st.sampled_from(["", "*."]), st.lists(label, min_size=2, max_size=3)
    ),
    unique=True,
    max_size=5,
).map(tuple)
paths = st.lists(segment, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))
workloads = paths.filter(lambda path: not (path + "/").startswith("/keyreeve/"))


@st.composite
def profiles(draw: Any) -> tuple[SvidProfile, SpiffeId]:
    kind = draw(st.sampled_from(SvidKind))
    ttl = timedelta(seconds=draw(st.integers(1, 29 * 86_400)))
    profile = SvidProfile(kind, ttl, max(ttl, timedelta(days=29)), timedelta(seconds=draw(st.integers(0, 3600))))
    path = {
        SvidKind.WORKLOAD: workloads,
        SvidKind.AGENT: segment.map(lambda name: f"/keyreeve/agent/{name}"),
        SvidKind.SERVICE: st.sampled_from(["/keyreeve/ca", "/keyreeve/keyserver", "/keyreeve/a/b"]),
    }[kind]
    return profile, SpiffeId(TD, draw(path))


def issue(
    profile: SvidProfile, spiffe_id: SpiffeId, subject: KeyType, issuer: KeyType, names: tuple[str, ...], entropy: bytes
) -> x509.Certificate:
    profile.check_id(spiffe_id)
    authority = ISSUERS[issuer].certificate
    start, end = validity(NOW, profile.ttl, backdate=profile.backdate, issuer=authority)
    key = SUBJECT_KEYS(subject).public_key()
    order = LeafOrder(spiffe_id, key, make_serial(entropy), start, end, names, profile.is_infrastructure)
    builder = build_leaf(order, authority)
    linted = sign_builder(builder, LINT_KEYS(issuer))
    issued = sign_builder(builder, ISSUER_KEYS(issuer))
    check_issued(issued, linted, authority)
    context = LintContext(TD, authority, NOW, profile.max_ttl, timedelta(hours=1), profile.is_infrastructure)
    assert lint_svid(linted, context) == ()
    return issued


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    profiles(),
    st.sampled_from(SUBJECT_TYPES),
    st.sampled_from(ISSUER_TYPES),
    dns_names,
    st.binary(min_size=16, max_size=16),
)
def test_any_profile_on_any_key_verifies(
    chosen: tuple[SvidProfile, SpiffeId], subject: KeyType, issuer: KeyType, names: tuple[str, ...], entropy: bytes
) -> None:
    profile, spiffe_id = chosen
    leaf = issue(profile, spiffe_id, subject, issuer, names, entropy)
    chain = [leaf, ISSUERS[issuer].certificate]
    svid = verify_chain(chain, trust_domain=TD, authorities=[ROOT.certificate], now=NOW)
    assert svid.spiffe_id == spiffe_id
    verified = (
        PolicyBuilder().store(Store([ROOT.certificate])).time(NOW).build_client_verifier().verify(leaf, chain[1:])
    )
    assert verified.chain == [leaf, ISSUERS[issuer].certificate, ROOT.certificate]


@pytest.mark.parametrize("issuer", ISSUER_TYPES)
@pytest.mark.parametrize("subject", SUBJECT_TYPES)
def test_openssl_verifies(tmp_path: Path, subject: KeyType, issuer: KeyType) -> None:
    profile = SvidProfile(SvidKind.WORKLOAD, timedelta(hours=1), timedelta(hours=24))
    leaf = issue(profile, SpiffeId(TD, "/web"), subject, issuer, ("web.example.org",), b"\x07" * 16)
    files = {"root": ROOT.certificate, "issuing": ISSUERS[issuer].certificate, "leaf": leaf}
    for name, certificate in files.items():
        (tmp_path / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    at = str(int(NOW.timestamp()))
    base = ["openssl", "verify", "-x509_strict", "-attime", at, "-CAfile", "root.pem", "-untrusted", "issuing.pem"]
    for purpose in ("sslserver", "sslclient"):
        done = subprocess.run(
            [*base, "-purpose", purpose, "-verify_hostname", "web.example.org", "leaf.pem"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def pkilint_findings(directory: Path, certificate: x509.Certificate) -> set[tuple[str, str]]:
    path = directory / "certificate.pem"
    path.write_bytes(certificate.public_bytes(Encoding.PEM))
    program = Path(sys.executable).parent / "lint_pkix_cert"
    done = subprocess.run(
        [str(program), "lint", "-s", "WARNING", "-f", "JSON", str(path)], capture_output=True, text=True, check=False
    )
    results = json.loads(done.stdout)["results"]
    return {
        (finding["code"], result["node_path"])
        for result in results
        for finding in result["finding_descriptions"]
        if finding["severity"] in ("WARNING", "ERROR", "FATAL")
    }


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048])
def test_pkilint_has_one_known_finding(tmp_path: Path, key_type: KeyType) -> None:
    profile = SvidProfile(SvidKind.SERVICE, timedelta(hours=1), timedelta(hours=24))
    leaf = issue(profile, SpiffeId(TD, "/keyreeve/ca"), key_type, key_type, (), b"\x07" * 16)
    for certificate in (leaf, ISSUERS[key_type].certificate, ROOT.certificate):
        findings = pkilint_findings(tmp_path, certificate)
        assert {code for code, _ in findings} == {"pkix.invalid_uri_syntax"}, findings
        assert all("subjectAltName" in where for _, where in findings), findings
