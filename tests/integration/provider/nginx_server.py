"""Debian's nginx on loopback, with one TLS 1.3 server and workers that drop root."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from keyreeve_testing.processes import free_port
from provider_support import Identity, accepts, running, wait_until

NGINX = "/usr/sbin/nginx"


@dataclass
class Nginx:
    work: Path
    identity: Identity
    env: dict[str, str]
    workers: int = 2
    protocols: str = "TLSv1.3"
    port: int = field(default_factory=free_port)
    _stack: ExitStack = field(default_factory=ExitStack)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.work / "error.log"

    @property
    def pid_file(self) -> Path:
        return self.work / "nginx.pid"

    def write(self, certificate: Path | None = None, key: Path | None = None) -> Path:
        path = self.work / "nginx.conf"
        path.write_text(
            f"user nobody nogroup;\nworker_processes {self.workers};\ndaemon off;\n"
            f"pid {self.pid_file};\nerror_log {self.log} info;\n"
            "events { worker_connections 256; }\n"
            "http {\n  access_log off;\n"
            + "".join(
                f"  {name}_temp_path {self.work}/{name};\n"
                for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            )
            + f"  server {{\n    listen 127.0.0.1:{self.port} ssl;\n"
            f"    ssl_certificate {certificate or self.identity.certificate_file};\n"
            f"    ssl_certificate_key {key or self.identity.reference_file};\n"
            f"    ssl_protocols {self.protocols};\n    ssl_session_tickets off;\n    ssl_session_cache off;\n"
            "    location / { return 200 'served by keyreeve'; }\n  }\n}\n"
        )
        return path

    def check(self, certificate: Path | None = None, key: Path | None = None) -> subprocess.CompletedProcess[str]:
        """`nginx -t`"""
        return subprocess.run(
            [NGINX, "-t", "-e", "stderr", "-c", str(self.write(certificate, key))],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def __enter__(self) -> Nginx:
        self._process = self._stack.enter_context(
            running([NGINX, "-e", str(self.log), "-c", str(self.write())], log=self.work / "nginx.out", env=self.env)
        )
        wait_until(lambda: accepts(self.port), f"nginx on port {self.port}")
        wait_until(lambda: len(self.worker_pids()) == self.workers, "every worker")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def reload(self) -> None:
        """`nginx -s reload` and its new workers."""
        before = self.worker_pids()
        subprocess.run([NGINX, "-e", str(self.log), "-c", str(self.write()), "-s", "reload"],
                       env=self.env, check=True, timeout=30, capture_output=True)  # fmt: skip
        wait_until(lambda: len(self.worker_pids() - before) >= self.workers, "new workers")

    def worker_pids(self) -> set[int]:
        assert self._process is not None
        pid = self._process.pid
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}

    def wait_for_log(self, text: str) -> None:
        """The client may see the alert before the worker has written its line."""
        wait_until(lambda: text in self.log.read_text(), f"{text!r} in nginx's error log")
