"""A private PostgreSQL cluster for tests, reached through a Unix socket in a directory of its own. Needs Debian's postgresql.

`initdb` and `postgres` refuse to run as root, so as root they run as the user `postgres`.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from keyreeve_testing.processes import children_of

_VERSIONS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
BIN = _VERSIONS[0] if _VERSIONS else None


def postgres_is_installed() -> bool:
    return BIN is not None and (BIN / "postgres").exists()


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """`make_database` gives the URL of a fresh, empty database; `stop` and `start` stand for an outage."""

    directory: Path

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def make_database(self) -> str:
        """A SQLAlchemy URL for psycopg 3."""
        name = f"test_{secrets.token_hex(6)}"
        self._run("createdb", "-h", str(self.directory), "-U", "postgres", name)
        return f"postgresql+psycopg://postgres@/{name}?host={self.directory}"

    def start(self) -> None:
        self._run("pg_ctl", "-D", str(self.data), "-l", str(self.directory / "log"), "-w", "-t", "60", "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.data), "-m", "immediate", "-w", "stop")

    def freeze(self) -> None:
        """SIGSTOP to every process of it: connections stand, nothing answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        postmaster = int((self.data / "postmaster.pid").read_text().splitlines()[0])
        os.kill(postmaster, number)  # first, so that it starts no further child
        for child in children_of(postmaster):
            with suppress(ProcessLookupError):
                os.kill(child, number)

    def kill(self) -> None:
        """SIGKILL to the postmaster; its children end by themselves."""
        pid = int((self.data / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, signal.SIGKILL)

    def _run(self, program: str, *args: str) -> None:
        assert BIN is not None
        done = subprocess.run(
            [*_as_postgres(), str(BIN / program), *args],
            cwd=self.directory,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if program != "pg_ctl" else subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=120,
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"{program} failed with {done.returncode}: {(done.stdout or b'').decode(errors='replace')}"
            )


def _as_postgres() -> list[str]:
    if os.geteuid() != 0:
        return []
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--"]


@contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """A started cluster, stopped and removed at the end. One per test session is enough: databases are cheap."""
    assert BIN is not None, "PostgreSQL is not installed"
    # pytest's own directories are closed to the user postgres, so this one stands beside them.
    directory = Path(tempfile.mkdtemp(prefix="keyreeve-pg-"))
    if os.geteuid() == 0:
        account = pwd.getpwnam("postgres")
        os.chown(directory, account.pw_uid, account.pw_gid)
    server = PostgresServer(directory)
    try:
        server._run("initdb", "-D", str(server.data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync")
        with (server.data / "postgresql.conf").open("a") as conf:
            conf.write(
                f"listen_addresses = ''\nunix_socket_directories = '{directory}'\nfsync = off\n"
                "max_connections = 60\nshared_buffers = '16MB'\nlog_min_messages = warning\n"
            )
        server.start()
        yield server
    finally:
        if (server.data / "postmaster.pid").exists():
            server.stop()
        shutil.rmtree(directory, ignore_errors=True)
