"""The front end's own identity: what a restart takes up again."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from pathlib import Path

import pytest
from keyreeve_common.errors import SvidInvalid
from keyreeve_common.identity import TrustDomain
from keyreeve_keyserver.frontend import tls_identity
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


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_identity, "FOLLOW_S", 0.01)


@pytest.mark.usefixtures("often")
async def test_another_front_end_takes_up_what_is_installed_at_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever stands there meanwhile: one that stopped looking would serve its old SVID until that ends."""
    pki = TestPki()
    ours = pki.spiffe_id("keyreeve/keyserver")
    first, second = identity(tmp_path, pki), identity(tmp_path, pki)
    first.build_csr(ours)
    taken: asyncio.Queue[int] = asyncio.Queue()

    async def on_installed() -> None:
        assert second.installed is not None
        taken.put_nowait(second.installed.svid.serial)

    following = asyncio.create_task(second.follow(on_installed))
    async with asyncio.timeout(10):
        for _ in range(2):
            installed = first.install(pki.svid_for_csr(first.build_csr(ours), ours), pki.trust_domain, pki.bundle_der)
            assert await taken.get() == installed.serial
        (tmp_path / "svid.pem").unlink()
        (tmp_path / "svid.pem").mkdir()
        with caplog.at_level(logging.WARNING):
            while "installed_svid_not_usable" not in caplog.text:
                await asyncio.sleep(0)
        assert taken.empty()
        assert not following.done()
        (tmp_path / "svid.pem").rmdir()
        installed = first.install(pki.svid_for_csr(first.build_csr(ours), ours), pki.trust_domain, pki.bundle_der)
        assert await taken.get() == installed.serial
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
