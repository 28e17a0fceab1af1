"""`python -m keyreeve_keyserver.frontend`: the network-facing process, started by the supervisor, or alone with `--frontend-only`."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

from keyreeve_common import event_loop
from keyreeve_common.errors import ConfigInvalid, KeyreeveError
from keyreeve_common.telemetry import configure_logging, log_error, notify_ready

from keyreeve_keyserver.config import KeyServerConfig, load_keyserver_config
from keyreeve_keyserver.domain.pair import Pair, parse_pair
from keyreeve_keyserver.frontend.app import FrontEnd

EX_CONFIG = 78
SERVICE = "keyreeve-keyserver-frontend"


def main() -> int:
    parser = argparse.ArgumentParser(prog="keyreeve-keyserver-frontend", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="keyserver.toml")
    parser.add_argument("--frames-fd", type=int, help="inherited end of the socketpair to the signer")
    parser.add_argument("--supervisor-fd", type=int, help="inherited end of the supervisor's socketpair")
    parser.add_argument("--pair", default="1/1", help="NUMBER/COUNT: which of a host's front ends this is")
    arguments = parser.parse_args()
    configure_logging(SERVICE)
    try:
        config = load_keyserver_config(arguments.config)
        pair = parse_pair(arguments.pair)
        return run_front_end(config, pair, frames_fd=arguments.frames_fd, supervisor_fd=arguments.supervisor_fd)
    except KeyreeveError as error:
        log_error("front_end_failed", code=error.code.value, detail=error.detail)
        return EX_CONFIG if isinstance(error, ConfigInvalid) else 1


def run_front_end(
    config: KeyServerConfig, pair: Pair, *, frames_fd: int | None = None, supervisor_fd: int | None = None
) -> int:
    """Serves until it is told to stop. Without `frames_fd` it connects to `signer_socket`. Raises: ConfigInvalid and others at start."""
    event_loop.run(_serve(config.of_pair(pair), pair, frames_fd, supervisor_fd))
    return 0


async def _serve(config: KeyServerConfig, pair: Pair, frames_fd: int | None, supervisor_fd: int | None) -> None:
    front_end = FrontEnd(config, pair=pair)
    supervisor = socket.socket(fileno=supervisor_fd) if supervisor_fd is not None else None

    async def ready() -> None:
        if supervisor is not None:
            supervisor.send(b"READY\n")
        else:
            notify_ready("serving")

    if supervisor is not None:
        supervisor.setblocking(False)
        watch = asyncio.create_task(_stop_at_end_of(supervisor, front_end))
        watch.add_done_callback(lambda _: None)
    if frames_fd is not None:
        await front_end.run(lambda link: link.serve_descriptor(frames_fd), ready, wait_for_signer=True)
        return
    path = config.signer_socket
    if path is None:
        raise ConfigInvalid("signer_socket: is missing; it names the socket of the signer's own unit")
    await front_end.run(lambda link: link.serve_path(path), ready, wait_for_signer=False)


async def _stop_at_end_of(supervisor: socket.socket, front_end: FrontEnd) -> None:
    """A supervisor that is gone could never stop us: then we stop ourselves, and the signer follows."""
    with suppress(OSError):  # it was killed before it read what we sent
        while await asyncio.get_running_loop().sock_recv(supervisor, 64):
            pass
    front_end.stop()


if __name__ == "__main__":
    sys.stdout.flush()
    os.umask(0o077)
    sys.exit(main())
