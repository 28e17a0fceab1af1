"""The launcher: starts, ends and outlives no worker. `python -m keyreeve_keyserver.backends.launcher FD PARENT`.

The signer may not exec and knows no PIN; this small process does both for it. It reads each secret file once, into locked memory where it may,
and gives each worker what is its own through a pipe. It parses only what the signer sends, starts only what `Prepare` named, and ends, with all
its workers, when the signer closes the socket.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

from keyreeve_common.errors import (
    ConfigInvalid,
    KeyreeveError,
    MalformedFrame,
    TokenUnavailable,
)
from keyreeve_common.files import check_secret_file, read_secret

from keyreeve_keyserver.backends.launch import (
    MAX_MESSAGE_BYTES,
    MAX_START_BYTES,
    Kill,
    Order,
    Prepare,
    Ready,
    Refused,
    Report,
    Spawn,
    Spawned,
    WorkerSpec,
    WorkerStart,
    parse_order,
    report_bytes,
)
from keyreeve_keyserver.domain.secret import Secret
from keyreeve_keyserver.hardening.environment import worker_environment
from keyreeve_keyserver.hardening.lockdown import Protections, protect_self
from keyreeve_keyserver.hardening.process import end_with_parent

EXIT_MALFORMED = 65
_KILL_SECONDS = 2


class Launcher:
    """Holds the workers it started and the secrets it read."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._specs: dict[str, WorkerSpec] | None = None
        self._secrets: dict[tuple[str, str], Secret] = {}
        self._workers: dict[int, subprocess.Popen[bytes]] = {}

    def run(self) -> int:
        """Serves the signer until it closes; the exit code."""
        try:
            while data := self._connection.recv(MAX_MESSAGE_BYTES):
                self._obey(parse_order(data))
        except MalformedFrame:
            return EXIT_MALFORMED
        except ConnectionError:
            return 0
        finally:
            for pid in list(self._workers):
                self._kill(pid)
        return 0

    def _obey(self, order: Order) -> None:
        if isinstance(order, Prepare):
            self._prepare(order)
        elif isinstance(order, Spawn):
            self._spawn(order)
        else:
            assert isinstance(order, Kill)  # noqa: S101 - the last kind of order
            self._kill(order.pid)

    def _prepare(self, order: Prepare) -> None:
        """A file that is missing is looked for again at each Spawn: the backend is down meanwhile, the signer is not."""
        if self._specs is not None:
            raise MalformedFrame("the launcher is prepared already")
        self._specs = {spec.backend: spec for spec in order.workers}
        try:
            for spec in order.workers:
                with suppress(TokenUnavailable):
                    self._secrets_of(spec)
        except KeyreeveError as error:
            self._report(Refused(0, error))
        else:
            self._report(Ready())

    def _spawn(self, order: Spawn) -> None:
        spec = (self._specs or {}).get(order.backend)
        if spec is None:
            raise MalformedFrame("no such worker was prepared")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        with ours, theirs:
            try:
                process = self._start(spec, theirs)
            except KeyreeveError as error:
                self._report(Refused(order.number, error))
                return
            except OSError as error:
                text = f"the worker cannot be started: {error.strerror}"
                self._report(Refused(order.number, TokenUnavailable(text)))
                return
            self._workers[process.pid] = process
            self._report(Spawned(order.number, process.pid), ours)

    def _start(self, spec: WorkerSpec, theirs: socket.socket) -> subprocess.Popen[bytes]:
        start = WorkerStart(spec.settings, self._secrets_of(spec), spec.reach).to_bytes()
        if len(start) > MAX_START_BYTES:
            raise ConfigInvalid(f"backend {spec.backend}: settings and secrets are longer than {MAX_START_BYTES} bytes")
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            os.write(writing, start)
            return subprocess.Popen(
                [sys.executable, "-P", "-m", spec.program, str(theirs.fileno()), str(reading), str(os.getpid())],
                pass_fds=(theirs.fileno(), reading),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=worker_environment(os.environ),
            )
        finally:
            os.close(writing)
            os.close(reading)

    def _secrets_of(self, spec: WorkerSpec) -> dict[str, Secret]:
        """Raises: ConfigInvalid where a file is open to other users, TokenUnavailable where it cannot be read."""
        found: dict[str, Secret] = {}
        for name, path in spec.secret_files.items():
            key = (spec.backend, name)
            if key not in self._secrets:
                if not _exists(path):
                    raise TokenUnavailable(f"{name} {path} cannot be read: give the worker's user access to it")
                check_secret_file(path)
                try:
                    self._secrets[key] = Secret(read_secret(path))
                except ConfigInvalid as error:
                    raise TokenUnavailable(f"{name}: {error.detail}") from None
            found[name] = self._secrets[key]
        return found

    def _kill(self, pid: int) -> None:
        process = self._workers.pop(pid, None)
        if process is not None:
            process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_SECONDS)

    def _report(self, report: Report, *sockets: socket.socket) -> None:
        socket.send_fds(self._connection, [report_bytes(report)], [each.fileno() for each in sockets])


def _exists(path: os.PathLike[str]) -> bool:
    with suppress(OSError):
        os.stat(path)
        return True
    return False


def main() -> int:
    protect_self(Protections())
    os.umask(0o077)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends with the signer, which still answers what was begun
    end_with_parent(int(sys.argv[2]))
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        return Launcher(connection).run()


if __name__ == "__main__":
    sys.exit(main())
