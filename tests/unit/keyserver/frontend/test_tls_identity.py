"""The front end's own identity: what a restart takes up again."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from keyreeve_common.errors import SvidInvalid
from keyreeve_common.identity import TrustDomain
from keyreeve_keyserver.frontend.tls_identity import TlsIdentity
from keyreeve_testing.pki import TestPki


def identity(directory: Path, pki: TestPki) -> TlsIdentity:
    trust_domain = TrustDomain(pki.trust_domain)
    return TlsIdentity(directory, trust_domain=trust_domain, spiffe_id=None, clock=lambda: datetime.now(UTC))


def test_a_csr_that_came_to_nothing_does_not_cost_the_installed_svid(tmp_path: Path) -> None:
    pki = TestPki()
    ours, other = pki.spiffe_id("keyreeve/keyserver"), pki.spiffe_id("keyreeve/other")
    first = identity(tmp_path, pki)
    chain = pki.svid_for_csr(first.build_csr(ours), ours)
    first.install(chain, pki.trust_domain, pki.bundle_der)
    first.build_csr(other)
    with pytest.raises(SvidInvalid, match="expected is"):
        first.install(chain, pki.trust_domain, pki.bundle_der)
    again = identity(tmp_path, pki)
    again.load()
    assert again.installed is not None
    assert str(again.installed.svid.spiffe_id) == ours
