"""Debian's nginx with our OpenSSL provider on the files that a real agent writes: it serves, takes up a renewal, and survives a withdrawal."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from keyreeve_testing.processes import ManagedProcess, free_port

PROVIDER_DIR = Path(
    os.environ.get("KEYREEVE_PROVIDER_DIR", Path(__file__).resolve().parents[3] / "client/openssl-provider/build")
)
NGINX = "/usr/sbin/nginx"
pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(os.geteuid() != 0, reason="nginx's workers change their user: needs root"),
    pytest.mark.skipif(shutil.which(NGINX) is None, reason="needs Debian's nginx"),
]


@pytest.fixture(autouse=True)
def _provider_is_built() -> None:
    if not (PROVIDER_DIR / "keyreeve.so").is_file():
        pytest.fail(f"{PROVIDER_DIR}/keyreeve.so is missing: run make -C client/openssl-provider", pytrace=False)


@dataclass
class Site:
    """One nginx with one TLS server."""

    directory: Path
    files: Path
    authorities: str
    port: int

    def write(self) -> None:
        temporary = "".join(
            f"{name}_temp_path {self.directory}/{name};"
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (self.directory / "nginx.conf").write_text(f"""
user www-data; worker_processes 2; daemon off; pid {self.directory}/nginx.pid; error_log stderr info;
events {{ worker_connections 64; }}
http {{ access_log off; {temporary}
  server {{ listen 127.0.0.1:{self.port} ssl; ssl_protocols TLSv1.3; ssl_session_tickets off; ssl_session_cache off;
    ssl_certificate {self.files}/current/chain.pem; ssl_certificate_key {self.files}/current/key.pem;
    location / {{ return 200 'served'; }} }} }}
""")
        (self.directory / "openssl.cnf").write_text(f"""openssl_conf = init
[init]
providers = providers
[providers]
default = default_provider
keyreeve = keyreeve_provider
[default_provider]
activate = 1
[keyreeve_provider]
module = {PROVIDER_DIR}/keyreeve.so
activate = 1
""")

    @contextmanager
    def running(self, until: Any) -> Iterator[ManagedProcess]:
        process = ManagedProcess(
            [NGINX, "-e", "stderr", "-c", self.directory / "nginx.conf"],
            env={"OPENSSL_CONF": str(self.directory / "openssl.cnf")},
        )
        with process:
            process.start()
            until(self.accepts)
            yield process
            process.terminate()

    def accepts(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        except ConnectionRefusedError:
            return False
        return True

    def serial(self) -> int:
        """One full handshake, verified to the bundle; the leaf's serial. Raises: ssl.SSLError."""
        context = ssl.create_default_context(cadata=self.authorities)
        context.check_hostname = False
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=10) as raw,
            context.wrap_socket(raw) as connection,
        ):
            leaf = x509.load_der_x509_certificate(connection.getpeercert(binary_form=True) or b"")
            return leaf.serial_number


def test_nginx_serves_renews_and_outlives_a_withdrawal(world: Any, until: Any) -> None:
    pid_file = world.run_dir / "nginx.pid"
    reload = f"test ! -e {pid_file} || exec kill -HUP $(cat {pid_file})"
    files = world.add_proxy("nginx", "/web", 'group = "www-data"', f'reload_command = ["/bin/sh", "-c", "{reload}"]')
    first = world.assignment(selectors=("user:www-data", f"path:{os.path.realpath(NGINX)}"))
    world.ca.push(first)
    agent = world.start()
    site = Site(world.run_dir, files, world.pki.bundle_pem.decode(), free_port())
    site.write()
    with site.running(until) as nginx:
        assert site.serial() == x509.load_der_x509_certificate(first.chain_der[0]).serial_number
        assert world.key_server.signed == {"key-web": 1}

        second = world.assignment(selectors=("user:www-data", f"path:{os.path.realpath(NGINX)}"), revision=2)
        world.ca.push(second)
        agent.wait_event("proxy_reloaded", lambda event: event["version"] == "v2")
        until(lambda: site.serial() == x509.load_der_x509_certificate(second.chain_der[0]).serial_number)

        world.ca.push()
        agent.wait_event("proxy_files_withdrawn")
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            site.serial()
        assert nginx.running
        world.ca.push(second)
        until(lambda: not (files / "withdrawn").exists())
        assert site.serial()

        agent.kill()
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            site.serial()
        world.start()
        assert site.serial()
