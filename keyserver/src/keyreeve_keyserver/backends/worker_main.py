"""The life of a worker process of any backend: `python -m PROGRAM FD START_FD PARENT`, started by the launcher.

What it may know comes through the pipe START_FD, once, at its start: its settings and its secrets (`WorkerStart`). A program is
`run_worker(lambda start: Worker(start).answer)`. Questions are answered in their order; those that wait stay in the socket. It ends when the
signer closes the socket, or its launcher ends.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable

from keyreeve_common.errors import Internal, KeyreeveError, MalformedFrame
from keyreeve_common.telemetry import configure_logging

from keyreeve_keyserver.backends import worker_frames as frames
from keyreeve_keyserver.backends.launch import MAX_START_BYTES, WorkerStart, parse_worker_start
from keyreeve_keyserver.hardening.lockdown import Protections, confine_worker, protect_self
from keyreeve_keyserver.hardening.process import end_with_parent

EXIT_MALFORMED = 65
Answering = Callable[[frames.Question], frames.Answer]


def run_worker(begin: Callable[[WorkerStart], Answering]) -> int:
    """Serves the socket with what `begin` makes of settings and secrets; the exit code."""
    protections = Protections()
    protect_self(protections)
    os.umask(0o077)
    configure_logging("worker")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(int(sys.argv[3]))
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        start = _read_start(int(sys.argv[2]))
        confine_worker(protections, start.reach)
        return serve(connection, _told(guarded(begin(start)), protections))


def guarded(answer: Answering) -> Answering:
    """Every fault becomes an answer. Of one of ours only the kind is told: its text may hold what the worker knows."""

    def guarded_answer(question: frames.Question) -> frames.Answer:
        try:
            return answer(question)
        except KeyreeveError as error:
            return frames.Failed(error)
        except Exception as error:
            return frames.Failed(Internal(f"worker: {type(error).__name__}"))

    return guarded_answer


def _told(answer: Answering, protections: Protections) -> Answering:
    """The answer to `Open` tells the signer also how the worker is protected."""

    def told(question: frames.Question) -> frames.Answer:
        given = answer(question)
        if isinstance(question, frames.Open) and isinstance(given, frames.Done):
            return frames.Done({**given.answer, "protections": protections.describe()})
        return given

    return told


def _read_start(descriptor: int) -> WorkerStart:
    """Raises: MalformedFrame."""
    with open(descriptor, "rb", buffering=0) as pipe:
        data = b""
        while len(data) <= MAX_START_BYTES and (more := pipe.read(MAX_START_BYTES)):
            data += more
    return parse_worker_start(data)


def serve(connection: socket.socket, answer: Answering) -> int:
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
