"""Debian's Apache: keys load before it drops root and forks, as in nginx."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_agent import FakeAgent
from keyreeve_testing.processes import free_port
from provider_support import Authority, Identity, accepts, handshake, running, wait_until

APACHE = "/usr/sbin/apache2"
MODULES = "/usr/lib/apache2/modules"


def write_configuration(work: Path, identity: Identity, port: int) -> Path:
    (work / "www").mkdir()
    (work / "www/index.html").write_text("served by keyreeve")
    path = work / "apache.conf"
    path.write_text(
        f"ServerRoot {work}\nServerName localhost\nPidFile {work}/apache.pid\nErrorLog {work}/error.log\n"
        f"Listen 127.0.0.1:{port}\nUser nobody\nGroup nogroup\nDocumentRoot {work}/www\n"
        f"LoadModule mpm_event_module {MODULES}/mod_mpm_event.so\n"
        f"LoadModule authz_core_module {MODULES}/mod_authz_core.so\n"
        f"LoadModule dir_module {MODULES}/mod_dir.so\nDirectoryIndex index.html\n"
        f"LoadModule ssl_module {MODULES}/mod_ssl.so\nSSLEngine on\nSSLProtocol TLSv1.3\n"
        f"SSLCertificateFile {identity.certificate_file}\nSSLCertificateKeyFile {identity.reference_file}\n"
    )
    return path


@pytest.mark.parametrize("kind", ["ec-p256", "ec-p384", "rsa-2048", "ed25519"])
def test_apache_serves(
    kind: str,
    work: Path,
    env: dict[str, str],
    agent: FakeAgent,
    authority: Authority,
    identity_of: Callable[[str], Identity],
) -> None:
    port = free_port()
    configuration = write_configuration(work, identity_of(kind), port)
    with running([APACHE, "-DFOREGROUND", "-f", str(configuration)], log=work / "apache.out", env=env):
        wait_until(lambda: accepts(port), "Apache")
        assert not agent.requests
        for _ in range(3):
            assert b"served by keyreeve" in handshake(port, authority)
    assert len(agent.requests) == 3
