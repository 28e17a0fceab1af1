"""The life of a worker process of any backend: `python -m PROGRAM FD`. One question at a time; the signer ends it by closing the socket."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from collections.abc import Callable

from keyreeve_common.errors import MalformedFrame

from keyreeve_keyserver.backends import worker_frames as frames

EXIT_MALFORMED = 65


def run_worker(answer: Callable[[frames.Question], frames.Answer]) -> int:
    """Serves the descriptor that is the only argument; the exit code."""
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        return serve(connection, answer)


def serve(connection: socket.socket, answer: Callable[[frames.Question], frames.Answer]) -> int:
    """Answers questions until the peer closes. The exit code is EXIT_MALFORMED where a question broke a rule."""
    splitter = frames.splitter()
    while data := connection.recv(262_144):
        try:
            for frame in splitter.feed(data):
                connection.sendall(answer(frames.parse_question(frame)).to_bytes())
        except MalformedFrame:
            return EXIT_MALFORMED
        except BrokenPipeError:
            return 0
    return 0
