"""An agent for tests: answers the sign socket from keys in memory, and misbehaves on request."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from keyreeve_common.errors import KeyNotFound, KeyreeveError, SchemeNotSupported
from keyreeve_common.key_id import KeyId
from keyreeve_common.schemes import HASHES, Padding, parse_scheme
from keyreeve_common.sign_socket import (
    PingFrame,
    PongFrame,
    RefusedFrame,
    SignedFrame,
    SignFrame,
    parse_client_frame,
    splitter,
)

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
Reply = Callable[[SignFrame], bytes | None]


def sign(key: PrivateKey, scheme_code: int, message: bytes) -> bytes:
    """Raises: SchemeNotSupported."""
    facts = parse_scheme(scheme_code).facts
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(message)
    digest = HASHES[facts.hash_name]()
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(message, ec.ECDSA(digest))
    if facts.padding is Padding.PSS:
        return key.sign(message, padding.PSS(padding.MGF1(digest), padding.PSS.DIGEST_LENGTH), digest)
    if facts.padding is Padding.PKCS1_V15:
        return key.sign(message, padding.PKCS1v15(), digest)
    raise SchemeNotSupported(f"scheme 0x{scheme_code:04x} does not fit the key")


@dataclass
class FakeAgent:
    """Listens while it is entered. `reply` replaces the answer: bytes go out as they are, None closes the connection."""

    path: Path
    keys: dict[KeyId, PrivateKey]
    delay: float = 0.0
    reply: Reply | None = None
    requests: list[SignFrame] = field(default_factory=list)
    connections: int = 0
    most_at_once: int = 0
    _in_progress: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _open: set[socket.socket] = field(default_factory=set)
    _threads: list[threading.Thread] = field(default_factory=list)
    _listener: socket.socket | None = None

    def __enter__(self) -> FakeAgent:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._stopped.clear()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.path.unlink(missing_ok=True)
        self._listener.bind(str(self.path))
        self.path.chmod(0o777)
        self._listener.listen(128)
        self._spawn(self._accept, self._listener)

    def stop(self) -> None:
        """Closes the listener and every connection, as an agent that is killed does."""
        self._stopped.set()
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        self.path.unlink(missing_ok=True)
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=10)
        self._threads.clear()

    def _spawn(self, target: Callable[[socket.socket], None], argument: socket.socket) -> None:
        thread = threading.Thread(target=target, args=(argument,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopped.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                self._open.add(connection)
            self._spawn(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        frames = splitter()
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65_536):
                for frame in frames.feed(data):
                    answer = self._answer(frame)
                    if answer is None:
                        return
                    connection.sendall(answer)
        with self._lock:
            self._open.discard(connection)

    def _answer(self, frame: bytes) -> bytes | None:
        request = parse_client_frame(frame)
        if isinstance(request, PingFrame):
            return PongFrame(request.payload).to_bytes()
        with self._lock:
            self.requests.append(request)
            self._in_progress += 1
            self.most_at_once = max(self.most_at_once, self._in_progress)
        if self.delay:
            self._stopped.wait(self.delay)
        with self._lock:
            self._in_progress -= 1
        return self.reply(request) if self.reply is not None else self.signed(request)

    def signed(self, request: SignFrame) -> bytes:
        """The honest answer."""
        try:
            if request.key_id not in self.keys:
                raise KeyNotFound
            signature = sign(self.keys[request.key_id], request.scheme, request.message)
        except KeyreeveError as error:
            return RefusedFrame(request.request_id, error).to_bytes()
        return SignedFrame(request.request_id, signature).to_bytes()
