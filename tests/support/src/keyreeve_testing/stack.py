"""A whole Keyreeve on loopback: key server, CA, agent, nginx with the provider, in one directory. The demo and the integration tests drive it.

Everything is started from real configuration through real command lines, administration goes through the `keyreeve` command. Sockets and
web pages lie in a short directory of their own that nginx's workers can reach, because the other may be below /root.
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

from cryptography import x509

from keyreeve_testing.processes import ManagedProcess, children_of, command_line, descendants_of, free_port
from keyreeve_testing.softhsm import SoftHsmToken, make_softhsm_token

NGINX = "/usr/sbin/nginx"
CURL = "/usr/bin/curl"
REPOSITORY = Path(__file__).resolve().parents[4]
PROVIDER = Path(os.environ.get("KEYREEVE_PROVIDER_DIR", REPOSITORY / "client/openssl-provider/build")) / "keyreeve.so"
PATIENCE_S = 30.0


class StackFailed(AssertionError):
    """Something of the stack did not do what it should; the text says what."""


@dataclass(frozen=True, slots=True)
class Served:
    """An identity that nginx serves, on a port of its own, with the key in a backend of the key server."""

    name: str
    path: str
    key_type: str = "ec-p256"
    backend: str = ""
    mutual: bool = False
    protocols: str = "TLSv1.3"
    settings: str = ""  # more of nginx's, each with its semicolon
    purposes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StackConfig:
    """`directory` is created; it must be empty or one that a stack made before, which is then removed."""

    directory: Path
    trust_domain: str = "demo.test"
    agent: str = "/keyreeve/agent/node-1"
    served: tuple[Served, ...] = (Served("frontend", "/ns/web/sa/frontend", mutual=True),)
    client: str | None = "/ns/web/sa/client"
    client_purposes: tuple[str, ...] = ()
    software_backend: bool = True
    svid_ttl: str = "1h"
    nginx_workers: int = 2
    download_bytes: int = 3 << 20
    download_rate: str = "512k"


@dataclass(frozen=True, slots=True)
class CurlResult:
    """`connect_ms` is the time of the TLS handshake alone."""

    code: int
    body: bytes
    error: str
    handshake_ms: float

    @property
    def ok(self) -> bool:
        return self.code == 0


@dataclass
class Stack:
    """`start` brings everything up; `close` ends every process by its id. As a context manager it does both."""

    config: StackConfig
    say: Callable[[str], None] = lambda _: None
    entries: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.processes: dict[str, ManagedProcess] = {}
        self.nginx: subprocess.Popen[bytes] | None = None
        self.token: SoftHsmToken | None = None
        self.run_dir = Path("/nonexistent")
        self.ports = {served.name: free_port() for served in self.config.served}
        self.ca_port, self.attest_port, self.key_server_port = free_port(), free_port(), free_port()

    # Paths

    @property
    def directory(self) -> Path:
        return self.config.directory

    @property
    def etc(self) -> Path:
        return self.directory / "etc"

    @property
    def ca_socket(self) -> Path:
        return self.run_dir / "ca" / "admin.sock"

    @property
    def key_server_socket(self) -> Path:
        return self.run_dir / "keyserver" / "admin.sock"

    @property
    def sign_socket(self) -> Path:
        return self.run_dir / "agent" / "sign.sock"

    @property
    def openssl_conf(self) -> Path:
        return self.etc / "openssl.cnf"

    @property
    def catalog(self) -> Path:
        return self.directory / "keyserver" / "catalog.sqlite3"

    @property
    def passphrase_file(self) -> Path:
        return self.directory / "secrets" / "passphrase"

    @property
    def audit_directory(self) -> Path:
        return self.directory / "audit"

    @property
    def kdf_file(self) -> Path:
        return self.directory / "secrets" / "passphrase.kdf"

    def svid_dir(self, name: str) -> Path:
        """What the agent writes for a proxy: chain.pem, key.pem (a reference), bundle.pem."""
        return self.directory / "proxies" / name / "current"

    @property
    def bundle(self) -> Path:
        return self.directory / "bundle.pem"

    @property
    def agent_id(self) -> str:
        return self.spiffe_id(self.config.agent)

    def spiffe_id(self, path: str) -> str:
        return f"spiffe://{self.config.trust_domain}{path}"

    def dns_name(self, name: str) -> str:
        return f"{name}.{self.config.trust_domain}"

    @property
    def worker_user(self) -> str:
        """Whom nginx's workers run as: root gives them a user of their own, others cannot."""
        return "www-data" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name

    # Life

    def start(self) -> Stack:
        self.prepare()
        self.start_key_server()
        self.ceremony()
        self.start_ca()
        self.start_agent()
        self.create_entries()
        self.start_nginx()
        return self

    def __enter__(self) -> Stack:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what was started, each by its id, in the reverse order; the directory stays, for its logs."""
        self.stop_nginx()
        for process in reversed(self.processes.values()):
            if process.running:
                process.process.send_signal(signal.SIGTERM)
        for process in reversed(self.processes.values()):
            with contextlib.suppress(AssertionError):
                process.wait(10.0)
            process.close()
        self.processes.clear()
        shutil.rmtree(self.run_dir, ignore_errors=True)

    # Steps

    def prepare(self) -> None:
        """Directories, token, secrets, configuration files."""
        if not PROVIDER.is_file():
            raise StackFailed(f"{PROVIDER} is missing: run make -C client/openssl-provider")
        self._clear_directory()
        for name in ("etc", "ca", "keyserver", "secrets", "proxies", "log", "nginx"):
            (self.directory / name).mkdir(mode=0o700 if name in ("ca", "keyserver", "secrets") else 0o755)
        self._make_run_dir()
        self.say("a SoftHSM token of its own, with a random PIN that stands in a file of mode 0600")
        self.token = make_softhsm_token(self.directory / "token", label="keyreeve-demo")
        self._write_secret(self.passphrase_file, secrets.token_urlsafe(32))
        self._write_configs()

    def _clear_directory(self) -> None:
        mark = self.directory / ".keyreeve-stack"
        if self.directory.exists():
            if not mark.exists() and any(self.directory.iterdir()):
                raise StackFailed(
                    f"{self.directory} is not empty and was not made by this program: name another directory"
                )
            shutil.rmtree(self.directory)
        self.directory.mkdir(parents=True, mode=0o755)
        mark.touch()

    def _make_run_dir(self) -> None:
        """Short (a Unix socket's path has at most 107 bytes), and open for nginx's workers to pass."""
        base = "/run" if os.geteuid() == 0 and os.access("/run", os.W_OK) else None
        self.run_dir = Path(tempfile.mkdtemp(prefix="keyreeve-", dir=base))
        self.run_dir.chmod(0o755)
        for name, mode in (("ca", 0o700), ("keyserver", 0o700), ("agent", 0o755), ("www", 0o755)):
            (self.run_dir / name).mkdir()
            (self.run_dir / name).chmod(mode)
        (self.run_dir / "www" / "index.html").write_text("served by nginx, which holds no private key\n")
        (self.run_dir / "www" / "download").write_bytes(secrets.token_bytes(self.config.download_bytes))
        for page in (self.run_dir / "www").iterdir():
            page.chmod(0o644)

    @staticmethod
    def _write_secret(path: Path, text: str) -> None:
        path.touch(mode=0o600)
        path.write_text(text + "\n")

    def _write_configs(self) -> None:
        self._write("signer.toml", self._signer_toml())
        self._write("keyserver.toml", self._keyserver_toml())
        self._write("ca.toml", self._ca_toml())
        self._write("agent.toml", self._agent_toml())
        self._write("openssl.cnf", _OPENSSL_CNF.format(provider=PROVIDER))
        self._write("nginx.conf", self._nginx_conf())
        reload = self.etc / "reload-nginx"
        reload.write_text(f'#!/bin/sh\n[ ! -s {self._nginx_pid} ] || kill -HUP "$(cat {self._nginx_pid})"\n')
        reload.chmod(0o755)

    def _write(self, name: str, text: str) -> None:
        (self.etc / name).write_text(text)

    def _signer_toml(self) -> str:
        assert self.token is not None
        software = '\n[[backend]]\nname = "software"\nkind = "software"\n' if self.config.software_backend else ""
        return f"""default_backend = "softhsm"

[sealing]
passphrase_file = "{self.passphrase_file}"
kdf_file = "{self.kdf_file}"

[[backend]]
name = "softhsm"
kind = "pkcs11"
module = "{self.token.module}"
token_label = "{self.token.label}"
pin_file = "{self.token.pin_file}"
softhsm_conf = "{self.token.conf}"
{software}
[audit]
directory = "{self.audit_directory}"
"""

    def _keyserver_toml(self) -> str:
        return f"""trust_domain = "{self.config.trust_domain}"
listen = "127.0.0.1:{self.key_server_port}"
admin_socket = "{self.key_server_socket}"
state_dir = "{self.directory / "keyserver"}"
signer_config = "{self.etc / "signer.toml"}"
"""

    def _ca_toml(self) -> str:
        return f"""trust_domain = "{self.config.trust_domain}"
state_dir = "{self.directory / "ca"}"
admin_socket = "{self.ca_socket}"
listen = "127.0.0.1:{self.ca_port}"
attest_listen = "127.0.0.1:{self.attest_port}"
bundle_file = "{self.bundle}"

[key_cluster]
addresses = ["127.0.0.1:{self.key_server_port}"]
admin_socket = "{self.key_server_socket}"
"""

    def _agent_toml(self) -> str:
        identities = [(served.name, served.path) for served in self.config.served]
        if self.config.client is not None:
            identities.append(("client", self.config.client))
        return f"""trust_domain = "{self.config.trust_domain}"
bundle_file = "{self.bundle}"
join_token_file = "{self.directory / "secrets" / "join-token"}"
state_dir = "{self.run_dir / "agent-state"}"

[ca]
address = "127.0.0.1:{self.ca_port}"
attest_address = "127.0.0.1:{self.attest_port}"

[key_server]
addresses = ["127.0.0.1:{self.key_server_port}"]

[sign_socket]
path = "{self.sign_socket}"
""" + "".join(self._proxy_block(name, path) for name, path in identities)

    def _proxy_block(self, name: str, path: str) -> str:
        return f"""
[[proxy]]
name = "{name}"
spiffe_id = "{self.spiffe_id(path)}"
directory = "{self.directory / "proxies" / name}"
""" + ("" if name == "client" else f'reload_command = ["{self.etc / "reload-nginx"}"]\n')

    @property
    def _nginx_pid(self) -> Path:
        return self.directory / "nginx" / "nginx.pid"

    def _nginx_conf(self) -> str:
        user = f"user {self.worker_user};\n" if os.geteuid() == 0 else ""
        temporary = "".join(
            f"    {name}_temp_path {self.directory}/nginx/{name};\n"
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        servers = "".join(self._server_block(served) for served in self.config.served)
        return f"""{user}worker_processes {self.config.nginx_workers};
daemon off;
pid {self._nginx_pid};
error_log {self.directory}/log/nginx-error.log info;
events {{ worker_connections 256; }}
http {{
    access_log off;
{temporary}{servers}}}
"""

    def _server_block(self, served: Served) -> str:
        files = self.svid_dir(served.name)
        mutual = f"""        ssl_client_certificate {files}/bundle.pem;
        ssl_verify_client on;
        ssl_verify_depth 3;
"""
        return f"""    server {{
        listen 127.0.0.1:{self.ports[served.name]} ssl;
        server_name {self.dns_name(served.name)};
        ssl_certificate {files}/chain.pem;
        ssl_certificate_key {files}/key.pem;
        ssl_protocols {served.protocols};
        {served.settings}
        ssl_session_tickets off;
        ssl_session_cache off;
{mutual if served.mutual else ""}        root {self.run_dir}/www;
        default_type text/plain;
        location = /download {{ limit_rate {self.config.download_rate}; }}
    }}
"""

    def start_key_server(self) -> None:
        self.say("key server: supervisor, front end, signer and its PKCS#11 workers")
        self._start("keyserver", "keyreeve_keyserver", "keyserver.toml")

    def ceremony(self) -> None:
        self.say("ceremony (keyreeve init): root and issuing authority in the token, first identities of the services")
        for step in self.cli("init", "--config", str(self.etc / "ca.toml")):
            self.say(f"  {step['state']:8} {step['step']}: {step['detail']}")

    def start_ca(self) -> None:
        self.say("CA")
        self._start("ca", "keyreeve_ca", "ca.toml")

    def start_agent(self) -> None:
        self.say(f"agent {self.agent_id}, let in by a join token")
        token_file = self.directory / "secrets" / "join-token"
        token_file.unlink(missing_ok=True)
        self.cli("token", "create", "--agent-id", self.agent_id, "--out-file", str(token_file))
        self._start("agent", "keyreeve_client.agent", "agent.toml")

    def _start(self, name: str, module: str, config: str) -> None:
        process = ManagedProcess.python_module(
            module, "--config", self.etc / config, name=name, log_path=self.directory / "log" / f"{name}.log"
        )
        self.processes[name] = process
        process.start_ready(PATIENCE_S)

    def create_entries(self) -> None:
        """The identities that nginx serves are its workers' by delegation; the client's is curl's own."""
        for served in self.config.served:
            self.create_entry(
                served.name,
                served.path,
                served.key_type,
                served.backend,
                delegate=f"unix:user:{self.worker_user}",
                purposes=served.purposes,
            )
        if self.config.client is not None:
            self.create_entry(
                "client",
                self.config.client,
                selector=f"unix:uid:{os.geteuid()}",
                purposes=self.config.client_purposes,
            )
        for name in self.entries:
            self.wait_until(lambda name=name: (self.svid_dir(name) / "chain.pem").exists(), f"files of {name}")  # type: ignore[misc]

    def create_entry(
        self,
        name: str,
        path: str,
        key_type: str = "ec-p256",
        backend: str = "",
        *,
        selector: str = "",
        delegate: str = "",
        purposes: tuple[str, ...] = (),
    ) -> str:
        """Creates an entry and returns its id. A workload that nothing here runs as keeps an entry that only its delegate uses."""
        arguments = ["entry", "create", "--spiffe-id", self.spiffe_id(path), "--parent", self.agent_id]
        arguments += [
            "--selector",
            selector or "unix:user:nobody",
            "--key-type",
            key_type,
            "--ttl",
            self.config.svid_ttl,
        ]
        arguments += ["--dns", self.dns_name(name)]
        arguments += ["--key-backend", backend] if backend else []
        arguments += ["--delegate", delegate] if delegate else []
        for purpose in purposes:
            arguments += ["--purpose", purpose]
        self.entries[name] = str(self.cli(*arguments)["entry_id"])
        return self.entries[name]

    def start_nginx(self) -> None:
        self.say(f"nginx, workers as {self.worker_user}, with the provider and key references")
        with (self.directory / "log" / "nginx.log").open("ab") as log:
            self.nginx = subprocess.Popen(
                self.nginx_command(),
                env=self.openssl_env(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        for port in self.ports.values():
            self.wait_until(lambda port=port: _accepts(port), f"nginx on port {port}")  # type: ignore[misc]

    def stop_nginx(self) -> None:
        if self.nginx is None:
            return
        self.nginx.terminate()
        try:
            self.nginx.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.nginx.pid, signal.SIGKILL)
            self.nginx.wait()
        self.nginx = None

    def nginx_command(self) -> list[str]:
        return [NGINX, "-p", str(self.directory / "nginx"), "-e", str(self.directory / "log" / "nginx-error.log"),
                "-c", str(self.etc / "nginx.conf")]  # fmt: skip

    # Asking and using it

    def cli_command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "keyreeve_client.cli", *arguments]

    def cli_env(self) -> dict[str, str]:
        sockets = {"KEYREEVE_CA_SOCKET": str(self.ca_socket), "KEYREEVE_KEY_SERVER_SOCKET": str(self.key_server_socket)}
        return {**os.environ, **sockets}

    def cli(self, *arguments: str) -> Any:
        """What the command answers, parsed. Raises: StackFailed."""
        return json.loads(self.cli_text("--output", "json", *arguments))

    def cli_text(self, *arguments: str) -> str:
        done = subprocess.run(
            self.cli_command(*arguments), env=self.cli_env(), capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode != 0:
            raise StackFailed(f"keyreeve {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def key_of(self, path: str) -> dict[str, Any]:
        """The key of an identity, as the key server tells it."""
        return dict(self.cli("key", "show", self.svid_of(path)["key_id"]))

    def svid_of(self, path: str) -> dict[str, Any]:
        return dict(self.cli("svid", "show", self.spiffe_id(path)))

    def openssl_env(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "LC_ALL": "C", "OPENSSL_CONF": str(self.openssl_conf)}

    def curl_command(self, name: str, path: str = "/") -> list[str]:
        """curl with the client's keyless SVID; it verifies the server to the trust bundle."""
        host, port = self.dns_name(name), self.ports[name]
        command = [CURL, "--silent", "--show-error", "--max-time", "60", "--tlsv1.3", "--cacert", str(self.bundle)]
        command += ["--resolve", f"{host}:{port}:127.0.0.1", f"https://{host}:{port}{path}"]
        if self.config.client is not None:
            files = self.svid_dir("client")
            command += ["--cert", str(files / "chain.pem"), "--key", str(files / "key.pem")]
        return command

    def curl(self, name: str, path: str = "/") -> CurlResult:
        timing = ["--write-out", "%{stderr}times %{time_connect} %{time_appconnect}\n"]
        done = subprocess.run(
            [*self.curl_command(name, path), *timing],
            env=self.openssl_env(),
            capture_output=True,
            timeout=90,
            check=False,
        )
        lines = done.stderr.decode(errors="replace").splitlines()
        times = next((line.split()[1:] for line in lines if line.startswith("times ")), ["0", "0"])
        error = " ".join(line for line in lines if not line.startswith("times "))
        return CurlResult(done.returncode, done.stdout, error, (float(times[1]) - float(times[0])) * 1000)

    def handshake(self, name: str) -> x509.Certificate:
        """One TLS handshake as a client that shows no certificate; the server's leaf. Raises: OSError (of which ssl.SSLError is one)."""
        context = ssl.create_default_context(cafile=str(self.bundle))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        with (
            socket.create_connection(("127.0.0.1", self.ports[name]), timeout=10) as raw,
            context.wrap_socket(raw, server_hostname=self.dns_name(name)) as tls,
        ):
            der = tls.getpeercert(binary_form=True)
        assert der is not None
        return x509.load_der_x509_certificate(der)

    @property
    def download_digest(self) -> str:
        return sha256((self.run_dir / "www" / "download").read_bytes()).hexdigest()

    def nginx_workers(self) -> set[int]:
        return set(children_of(self.nginx.pid)) if self.nginx else set()

    def pids(self) -> dict[str, list[int]]:
        """Every process by its role. The signer stands for itself and its PKCS#11 workers apart."""
        server = self.processes["keyserver"].pid
        roles: dict[str, list[int]] = {"supervisor": [server], "front end": [], "signer": [], "PKCS#11 worker": []}
        for child in children_of(server):
            role = "signer" if "keyreeve_keyserver.signer" in command_line(child) else "front end"
            roles[role].append(child)
            if role == "signer":
                roles["PKCS#11 worker"] += descendants_of(child)
        roles["CA"] = [self.processes["ca"].pid, *descendants_of(self.processes["ca"].pid)]
        roles["agent"] = [self.processes["agent"].pid, *descendants_of(self.processes["agent"].pid)]
        if self.nginx is not None:
            roles["nginx master"] = [self.nginx.pid]
            roles["nginx worker"] = sorted(self.nginx_workers())
        return roles

    @contextlib.contextmanager
    def as_worker_user(self) -> Iterator[None]:
        """Connections that are opened here are nginx's user's: the kernel notes the effective ids at connect (SO_PEERCRED)."""
        if os.geteuid() != 0:
            yield
            return
        user = pwd.getpwnam(self.worker_user)
        groups = os.getgroups()
        os.setgroups([each.gr_gid for each in grp.getgrall() if user.pw_name in each.gr_mem] or [user.pw_gid])
        os.setegid(user.pw_gid)
        os.seteuid(user.pw_uid)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups(groups)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float = PATIENCE_S) -> float:
        """Polls for what nothing announces; the seconds that it took. Raises: StackFailed."""
        started = time.monotonic()
        while not condition():
            for name, process in self.processes.items():
                if not process.running:
                    raise StackFailed(f"{name} ended while waiting for {what}\n{process.log_tail(20)}")
            if time.monotonic() - started > timeout:
                raise StackFailed(f"waited {timeout:g} s for {what}; logs are in {self.directory / 'log'}")
            time.sleep(0.01)
        return time.monotonic() - started


_OPENSSL_CNF = """openssl_conf = openssl_init
[openssl_init]
providers = providers
[providers]
default = default_provider
keyreeve = keyreeve_provider
[default_provider]
activate = 1
[keyreeve_provider]
module = {provider}
activate = 1
"""


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False
