"""A PKCS#11 worker process: `python -m keyreeve_keyserver.backends.pkcs11_worker FD`. It loads the module, knows the PIN, has one session.

Single-threaded: python-pkcs11 is never called from two threads. It answers one question at a time on the socketpair whose descriptor is its
only argument, and ends when the signer closes it.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import time

from keyreeve_common.errors import Internal, KeyreeveError, MalformedFrame, TokenUnavailable

from keyreeve_keyserver.backends import pkcs11_frames as frames
from keyreeve_keyserver.backends.pkcs11_token import Token

EXIT_MALFORMED = 65


class Worker:
    def __init__(self) -> None:
        self._token: Token | None = None

    def answer(self, question: frames.Question) -> frames.Answer:
        try:
            return self._answer(question)
        except KeyreeveError as error:
            return frames.Failed(error)
        except Exception as error:
            return frames.Failed(Internal(f"PKCS#11 worker: {type(error).__name__}"))

    def _answer(self, question: frames.Question) -> frames.Answer:
        if isinstance(question, frames.Open):
            if self._token is not None:
                raise MalformedFrame("the worker is open already")
            self._token = Token(question)
            return frames.Done(self._token.describe())
        token = self._token
        if token is None:
            raise TokenUnavailable("the worker has no open token")
        if isinstance(question, frames.TokenSign):
            received = time.monotonic()
            return frames.TokenSigned(tuple(_sign(token, item, received=received) for item in question.items))
        if isinstance(question, frames.Box):
            return frames.Boxed(token.box(question))
        if isinstance(question, frames.Create):
            return frames.Done(token.create(question.ref, question.label, question.key_type))
        if isinstance(question, frames.Find):
            token.find(question.ref)
        else:
            token.destroy(question.ref)
        return frames.Done({})


def _sign(token: Token, item: frames.TokenSignItem, *, received: float) -> bytes | KeyreeveError:
    try:
        return token.sign(item, received=received)
    except KeyreeveError as error:
        return error


def serve(connection: socket.socket) -> int:
    """Answers questions until the peer closes. The exit code is EXIT_MALFORMED where a question broke a rule."""
    worker, splitter = Worker(), frames.splitter()
    while data := connection.recv(262_144):
        try:
            for frame in splitter.feed(data):
                connection.sendall(worker.answer(frames.parse_question(frame)).to_bytes())
        except MalformedFrame:
            return EXIT_MALFORMED
        except BrokenPipeError:
            return 0
    return 0


def main() -> int:
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        return serve(connection)


if __name__ == "__main__":
    sys.exit(main())
