"""The blocking client against an agent's end that the test plays."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from keyreeve_client.agent.sign_socket_client import SignSocketClient
from keyreeve_common.errors import DeadlineExceeded, KeyNotFound, MalformedFrame, Unavailable
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.sign_socket import RefusedFrame, SignedFrame, SignFrame, parse_client_frame, splitter

Play = Callable[[socket.socket, SignFrame], None]


class Stage:
    """Accepts connections one after the other; each plays its part at the first frame."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.frames: list[SignFrame] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads: list[threading.Thread] = []

    def play(self, *parts: Play) -> None:
        thread = threading.Thread(target=self._run, args=(parts,))
        thread.start()
        self._threads.append(thread)

    def _run(self, parts: tuple[Play, ...]) -> None:
        for part in parts:
            connection, _ = self._listener.accept()
            with connection:
                frames = splitter()
                while not (found := frames.feed(connection.recv(65_536))):
                    pass
                frame = parse_client_frame(found[0])
                assert isinstance(frame, SignFrame)
                self.frames.append(frame)
                part(connection, frame)

    def close(self) -> None:
        for thread in self._threads:
            thread.join(10)
        self._listener.close()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path / "s")
    yield stage
    stage.close()


def answer(connection: socket.socket, frame: SignFrame) -> None:
    connection.sendall(SignedFrame(frame.request_id, b"signature").to_bytes())


def say_nothing(connection: socket.socket, frame: SignFrame) -> None:
    connection.recv(1)


def ask(client: SignSocketClient, seconds: float = 5) -> bytes:
    return client.sign(
        "key-web",
        SignatureScheme.ECDSA_SECP256R1_SHA256,
        Purpose.TLS13_SERVER_VERIFY,
        message=b"message",
        deadline=timedelta(seconds=seconds),
    )


def test_signs_and_says_its_deadline(stage: Stage) -> None:
    stage.play(answer)
    with SignSocketClient(stage.path) as client:
        assert ask(client) == b"signature"
    (frame,) = stage.frames
    assert (frame.key_id, frame.message, frame.scheme, frame.purpose) == ("key-web", b"message", 0x0403, 1)
    assert frame.deadline_ms == 5000


def test_a_refusal_is_raised(stage: Stage) -> None:
    stage.play(lambda connection, frame: connection.sendall(RefusedFrame(frame.request_id, KeyNotFound()).to_bytes()))
    with SignSocketClient(stage.path) as client, pytest.raises(KeyNotFound):
        ask(client)


def test_connects_anew_once_after_a_break(stage: Stage) -> None:
    stage.play(answer, answer)
    with SignSocketClient(stage.path) as client:
        assert ask(client) == b"signature"
        assert ask(client) == b"signature"
    assert len(stage.frames) == 2


def test_a_child_does_not_use_its_parent_s_connection(stage: Stage) -> None:
    stage.play(answer, answer)
    with SignSocketClient(stage.path) as client:
        ask(client)
        pid = os.fork()
        if pid == 0:
            os._exit(0 if ask(client) == b"signature" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_nobody_there_and_nobody_answering(stage: Stage, tmp_path: Path) -> None:
    with SignSocketClient(tmp_path / "none") as client, pytest.raises(Unavailable, match="cannot be reached"):
        ask(client)
    stage.play(say_nothing)
    with SignSocketClient(stage.path) as client, pytest.raises(DeadlineExceeded):
        ask(client, seconds=0.1)


def test_an_answer_to_something_else_closes(stage: Stage) -> None:
    stage.play(lambda connection, _: connection.sendall(SignedFrame(99, b"x").to_bytes()), answer)
    with SignSocketClient(stage.path) as client:
        with pytest.raises(MalformedFrame):
            ask(client)
        assert ask(client) == b"signature"
