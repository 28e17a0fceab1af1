"""Processor time of a proxy for a full TLS 1.3 handshake, local key against remote: `python bench/node_handshakes.py [--handshakes 4000]`.

One worker of nginx and one thread of HAProxy (`ssl-mode-async`) serve the same kind of key twice, once from a file and once by the provider.
Rounds of both are interleaved in one run, and only the proxy's own processor time counts; clients are processes of their own, without
resumption. The remote key's agent is `answering_agent` below, so that no key server shares the machine. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pwd
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID
from keyreeve_common.key_id import KeyId
from keyreeve_common.key_reference import KeyReference
from keyreeve_testing.processes import children_of, free_port
from keyreeve_testing.stack import NGINX, PROVIDER
from node_agent import cpu_seconds

HAPROXY = "/usr/sbin/haproxy"
AGENT = Path(__file__).with_name("node_answering_agent.py")
CLIENTS = 2
AT_ONCE = 16
KEY_TYPES = ("ec-p256", "rsa-2048")
_PATIENCE_S = 20.0
_NO_LINGER = struct.pack("ii", 1, 0)  # closing resets: no TIME_WAIT, of which there would be thousands


@dataclass(frozen=True, slots=True)
class Files:
    """One kind of key: the certificate, and the key once whole and once as a reference."""

    certificate: Path
    local: Path
    remote: Path


def write_key(directory: Path, key_type: str, socket_path: Path) -> Files:
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey = (
        ec.generate_private_key(ec.SECP256R1()) if key_type == "ec-p256" else rsa.generate_private_key(65537, 2048)
    )
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")]), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, SHA256())
    )
    files = Files(*(directory / f"{key_type}.{end}" for end in ("crt", "local.key", "remote.key")))
    files.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
    files.local.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    files.remote.write_text(KeyReference(KeyId(f"k-{key_type}"), str(socket_path), spki).to_pem())
    for path in (files.certificate, files.local, files.remote):
        path.chmod(0o644)
    return files


def nginx_command(directory: Path, files: Files, key: Path, port: int) -> tuple[list[str], dict[str, str]]:
    """One worker, which is a child of the process that is started."""
    here = directory / f"nginx-{port}"
    here.mkdir()
    user = f"user {'nobody nogroup' if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name};\n"
    temporary = "".join(
        f"{name}_temp_path {here}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (here / "nginx.conf").write_text(
        f"{user if os.geteuid() == 0 else ''}worker_processes 1; daemon off; pid {here}/pid; error_log {here}/log;\n"
        f"events {{ worker_connections 1024; }}\nhttp {{ access_log off; {temporary}\n"
        f"server {{ listen 127.0.0.1:{port} ssl backlog=1024; ssl_certificate {files.certificate};\n"
        f"ssl_certificate_key {key}; ssl_protocols TLSv1.3; ssl_session_tickets off; ssl_session_cache off;\n"
        "location / { return 200 'ok'; } } }\n"
    )
    (here / "openssl.cnf").write_text(
        "openssl_conf = init\n[init]\nproviders = providers\n[providers]\ndefault = default_provider\n"
        "keyreeve = keyreeve_provider\n[default_provider]\nactivate = 1\n"
        f"[keyreeve_provider]\nmodule = {PROVIDER}\nactivate = 1\n"
    )
    environment = {"PATH": os.environ["PATH"], "OPENSSL_CONF": str(here / "openssl.cnf")}
    return [NGINX, "-e", f"{here}/log", "-c", f"{here}/nginx.conf"], environment


def haproxy_command(directory: Path, files: Files, key: Path, port: int) -> tuple[list[str], dict[str, str]]:
    """One process with one thread."""
    both, path = directory / f"haproxy-{port}.pem", directory / f"haproxy-{port}.cfg"
    both.write_bytes(files.certificate.read_bytes() + key.read_bytes())
    path.write_text(
        f"global\n  nbthread 1\n  maxconn 4096\n  ssl-provider-path {PROVIDER.parent}\n  ssl-provider default\n"
        "  ssl-provider keyreeve\n  ssl-mode-async\n  tune.ssl.cachesize 0\n"
        "defaults\n  mode http\n  timeout connect 5s\n  timeout client 20s\n  timeout server 20s\n"
        f"frontend bench\n  bind 127.0.0.1:{port} ssl crt {both} ssl-min-ver TLSv1.3 no-tls-tickets backlog 1024\n"
        "  http-request return status 200 content-type text/plain string ok\n"
    )
    return [HAPROXY, "-db", "-f", str(path)], {"PATH": os.environ["PATH"]}


PROXIES = {"nginx": nginx_command, "haproxy": haproxy_command}


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running proxy; `pid` is the process that shakes hands."""

    port: int
    pid: int


@contextmanager
def proxy(kind: str, directory: Path, files: Files, key: Path) -> Iterator[Proxy]:
    port = free_port()
    command, environment = PROXIES[kind](directory, files, key, port)
    with (directory / "proxies.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(port)
        yield Proxy(port, children_of(process.pid)[0] if kind == "nginx" else process.pid)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(port: int) -> None:
    """Raises: TimeoutError."""
    ends_at = time.monotonic() + _PATIENCE_S
    while time.monotonic() < ends_at:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise TimeoutError(f"nothing listens on port {port}")


def shake_hands(port: int, count: int, at_once: int) -> int:
    """`count` full handshakes from this process, `at_once` in flight, each with a connection of its own; how many succeeded."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    poll, waiting = select.epoll(), dict[int, ssl.SSLSocket]()
    done = started = 0
    while started < count or waiting:
        while started < count and len(waiting) < at_once:
            raw = socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_S)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            wrapped = context.wrap_socket(raw, do_handshake_on_connect=False)
            wrapped.setblocking(False)
            started += 1
            if _goes_on(wrapped) is None:  # which also sends the ClientHello
                waiting[wrapped.fileno()] = wrapped
                poll.register(wrapped.fileno(), select.EPOLLIN)
            else:
                wrapped.close()
        for descriptor, _ in poll.poll(_PATIENCE_S):
            succeeded = _goes_on(waiting[descriptor])
            if succeeded is not None:
                poll.unregister(descriptor)
                waiting.pop(descriptor).close()
                done += succeeded
    poll.close()
    return done


def _goes_on(connection: ssl.SSLSocket) -> bool | None:
    """None while the handshake waits for the server, else whether it succeeded."""
    try:
        connection.do_handshake()
    except ssl.SSLWantReadError:
        return None
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Round:
    handshakes: int
    cpu_us: float
    per_second: float


def one_round(running: Proxy, handshakes: int, *, clients: int, at_once: int) -> Round:
    """`clients` processes; processor time of the proxy for one handshake."""
    context = multiprocessing.get_context("fork")
    before, began = cpu_seconds(running.pid), time.monotonic()
    with context.Pool(clients) as pool:
        share = handshakes // clients
        done = sum(pool.starmap(shake_hands, [(running.port, share, at_once)] * clients))
    lasted = time.monotonic() - began
    return Round(done, (cpu_seconds(running.pid) - before) / max(done, 1) * 1e6, done / lasted)


@contextmanager
def answering_agent(socket_path: Path, keys: dict[str, Path], *, delay_ms: int = 0) -> Iterator[int]:
    """An agent in a process of its own that signs with these keys, after a delay; its pid."""
    options = [f"{key_id}={path}" for key_id, path in keys.items()]
    command = [sys.executable, str(AGENT), "--socket", str(socket_path), "--delay-ms", str(delay_ms), *options]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None or process.stdout.readline().strip() != "ready":
            raise RuntimeError("the answering agent did not start")
        yield process.pid
    finally:
        process.kill()
        process.wait()


def measure(
    *,
    handshakes: int = 4000,
    rounds: int = 4,
    proxies: tuple[str, ...] = ("nginx", "haproxy"),
    key_types: tuple[str, ...] = KEY_TYPES,
) -> dict[str, Any]:
    """By proxy and kind of key: processor time in microseconds for a handshake (median of the rounds) and the ratio remote to local."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="keyreeve-bench-") as name, ExitStack() as stack:
        directory = Path(name)
        directory.chmod(0o755)
        socket_path = directory / "s"
        files = {key_type: write_key(directory, key_type, socket_path) for key_type in key_types}
        stack.enter_context(
            answering_agent(socket_path, {f"k-{key_type}": each.local for key_type, each in files.items()})
        )
        for kind in proxies:
            for key_type, each in files.items():
                with (
                    proxy(kind, directory, each, each.local) as local,
                    proxy(kind, directory, each, each.remote) as far,
                ):
                    found[f"{kind} {key_type}"] = compare(local, far, handshakes=handshakes, rounds=rounds)
    return found


def compare(local: Proxy, remote: Proxy, *, handshakes: int, rounds: int) -> dict[str, Any]:
    share = handshakes // rounds
    taken: dict[str, list[Round]] = {"local": [], "remote": []}
    for running in (local, remote):
        one_round(running, 200, clients=CLIENTS, at_once=AT_ONCE)
    for _ in range(rounds):
        for name, running in (("local", local), ("remote", remote)):
            taken[name].append(one_round(running, share, clients=CLIENTS, at_once=AT_ONCE))
    cpu = {name: median(each.cpu_us for each in each_round) for name, each_round in taken.items()}
    return {
        "handshakes": {name: sum(each.handshakes for each in each_round) for name, each_round in taken.items()},
        "cpu_us": {name: round(value, 1) for name, value in cpu.items()},
        "ratio": round(cpu["remote"] / cpu["local"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--handshakes", type=int, default=4000, help="of each of local and remote, by proxy and key")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--proxy", choices=PROXIES, action="append")
    parser.add_argument("--key-type", choices=KEY_TYPES, action="append")
    parser.add_argument("--output", choices=("json",), default="json")
    arguments = parser.parse_args()
    result = measure(
        handshakes=arguments.handshakes,
        rounds=arguments.rounds,
        proxies=tuple(arguments.proxy or PROXIES),
        key_types=tuple(arguments.key_type or KEY_TYPES),
    )
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
