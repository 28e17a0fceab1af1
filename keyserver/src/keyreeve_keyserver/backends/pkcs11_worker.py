"""A PKCS#11 worker process: it loads the module, knows the PIN, has one session. How it is started: `worker_main`.

Single-threaded: python-pkcs11 is never called from two threads. It answers questions in their order, and ends when the signer closes the socket.
"""

from __future__ import annotations

import sys

from keyreeve_common.errors import KeyreeveError, MalformedFrame, TokenUnavailable

from keyreeve_keyserver.backends import worker_frames as frames
from keyreeve_keyserver.backends.launch import WorkerStart
from keyreeve_keyserver.backends.pkcs11_token import Token, TokenSettings
from keyreeve_keyserver.backends.worker_main import run_worker


class Worker:
    def __init__(self, start: WorkerStart) -> None:
        self._start = start
        self._token: Token | None = None

    def answer(self, question: frames.Question) -> frames.Answer:
        """Raises: KeyreeveError."""
        if isinstance(question, frames.Open):
            if self._token is not None:
                raise MalformedFrame("the worker is open already")
            self._token = Token(_settings(self._start), self._start.secret("pin_file"))
            return frames.Done(self._token.describe())
        token = self._token
        if token is None:
            raise TokenUnavailable("the worker has no open token")
        if isinstance(question, frames.TokenSign):
            return frames.TokenSigned(tuple([_sign(token, item) for item in question.items]))
        if isinstance(question, frames.Box):
            return frames.Boxed(token.box(question))
        if isinstance(question, frames.Create):
            return frames.Done(token.create(question.ref, question.label, question.key_type))
        if isinstance(question, frames.Inspect):
            return frames.Done(token.inspect(question.ref, question.wrapped))
        if isinstance(question, frames.Ping):
            token.ping()
        elif isinstance(question, frames.Find):
            token.find(question.ref, question.wrapped)
        else:
            token.destroy(question.ref)
        return frames.Done({})


def _settings(start: WorkerStart) -> TokenSettings:
    """Raises: MalformedFrame."""
    try:
        return TokenSettings(**start.settings)
    except TypeError:
        raise MalformedFrame("the settings are not those of a PKCS#11 worker") from None


def _sign(token: Token, item: frames.TokenSignItem) -> bytes | KeyreeveError:
    try:
        return token.sign(item)
    except KeyreeveError as error:
        return error


def main() -> int:
    return run_worker(lambda start: Worker(start).answer)


if __name__ == "__main__":
    sys.exit(main())
