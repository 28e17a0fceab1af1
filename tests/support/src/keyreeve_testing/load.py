"""Steady load on a stack: TLS handshakes with nginx, and signatures over the agent's sign socket whose messages are remembered."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from types import TracebackType

from keyreeve_client.agent.sign_socket_client import SignSocketClient
from keyreeve_common.errors import KeyreeveError
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.schemes import SignatureScheme

PAUSE_S = 0.01


@dataclass(frozen=True, slots=True)
class Attempt:
    """`began` and `ended` are of the monotonic clock; `error` is "" for a success."""

    began: float
    ended: float
    error: str = ""


@dataclass
class Load:
    """Calls `once` again and again in a thread until the block ends; what it raises is a failed attempt."""

    name: str
    once: Callable[[], None]
    failures: tuple[type[Exception], ...] = (OSError, KeyreeveError)
    attempts: list[Attempt] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._stop = Event()
        self._thread = Thread(target=self._run, name=f"load-{self.name}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(PAUSE_S):
            began, error = monotonic(), ""
            try:
                self.once()
            except self.failures as failure:
                error = f"{type(failure).__name__}: {failure}"
            self.attempts.append(Attempt(began, monotonic(), error))

    def since(self, time: float) -> list[Attempt]:
        """What ended after `time`."""
        return [attempt for attempt in list(self.attempts) if attempt.ended >= time]

    def wait_successes(self, count: int, *, within: float) -> None:
        """Until `count` attempts in a row, all begun from now on, succeeded. Raises: AssertionError."""
        now = monotonic()
        tick = Event()
        while monotonic() < now + within:
            fresh = [attempt for attempt in list(self.attempts) if attempt.began >= now]
            if len(fresh) >= count and not any(attempt.error for attempt in fresh[-count:]):
                return
            tick.wait(0.02)
        raise AssertionError(
            f"{self.name}: not {count} successes in a row within {within:g} s; last: {self.attempts[-1:]}"
        )


@dataclass
class Signatures:
    """One signature after another over the sign socket, each of a message of its own; `given` holds the hashes of those that were signed."""

    socket: Path
    key_id: str
    given: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._client = SignSocketClient(self.socket)

    def close(self) -> None:
        self._client.close()

    def once(self) -> None:
        message = build_tls13_content(Purpose.TLS13_CLIENT_VERIFY, secrets.token_bytes(32))
        self._client.sign(
            self.key_id,
            SignatureScheme.ECDSA_SECP256R1_SHA256,
            Purpose.TLS13_CLIENT_VERIFY,
            message=message,
            deadline=timedelta(seconds=5),
        )
        self.given.append(sha256(message).digest())
