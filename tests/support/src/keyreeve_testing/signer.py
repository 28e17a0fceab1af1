"""Starts a real signer process and speaks frames with it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keyreeve_keyserver import frames

from keyreeve_testing.softhsm import SoftHsmToken
from keyreeve_testing.users import command_as

REFUSED_START = (77, 78)
_FAST_KDF = {"kdf": "scrypt", "n": 16_384, "p": 1, "r": 8, "salt": "5a" * 32, "version": 1}


def write_signer_config(
    directory: Path, *, token: SoftHsmToken | None = None, extra: str = "", sealing: str = ""
) -> Path:
    """A signer.toml with a software backend, and a PKCS#11 one where a token is given. The KDF is made cheap for tests."""
    directory.mkdir(parents=True, exist_ok=True)
    passphrase = directory / "passphrase"
    passphrase.touch(mode=0o600)
    passphrase.write_text("a passphrase that is long enough\n")
    (directory / "passphrase.kdf").write_text(json.dumps(_FAST_KDF))
    lines = [
        'default_backend = "software"',
        extra,
        "[sealing]",
        sealing or 'passphrase_file = "passphrase"',
        "[[backend]]",
        'name = "software"',
        'kind = "software"',
        "workers = 2",
    ]
    if token is not None:
        lines += [
            "[[backend]]",
            'name = "hsm"',
            'kind = "pkcs11"',
            f'module = "{token.module}"',
            f'token_label = "{token.label}"',
            f'pin_file = "{token.pin_file}"',
            f'softhsm_conf = "{token.conf}"',
            "workers = 2",
        ]
    path = directory / "signer.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


class SignerClient:
    """The front end's side of the frames, blocking. `process` is the signer where we started it."""

    def __init__(self, connection: socket.socket, process: subprocess.Popen[bytes] | None = None) -> None:
        self.connection = connection
        self.process = process
        self._splitter = frames.splitter()
        self._answers: list[frames.AnswerFrame] = []
        self._next_id = 0

    def next_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def read_answer(self) -> frames.AnswerFrame:
        """Raises: EOFError when the signer closed."""
        while not self._answers:
            data = self.connection.recv(1_048_576)
            if not data:
                raise EOFError("the signer closed the connection")
            self._answers += [frames.parse_answer_frame(frame) for frame in self._splitter.feed(data)]
        return self._answers.pop(0)

    def control(self, op: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a control operation. Raises: the error that the signer refused with."""
        request_id = self.next_id()
        self.connection.sendall(frames.Control(request_id, op, arguments).to_bytes())
        answer = self.read_answer()
        if isinstance(answer, frames.ControlRefused):
            raise answer.error
        if not isinstance(answer, frames.ControlOk) or answer.request_id != request_id:
            raise AssertionError(f"not an answer to {op}: {answer}")
        return answer.answer

    def sign(self, *items: frames.SignItem, caller: str = "local") -> dict[int, frames.SignResult]:
        """The results of one batch by item id."""
        batch_id = self.next_id()
        self.connection.sendall(frames.SignBatch(batch_id, caller, items).to_bytes())
        results: dict[int, frames.SignResult] = {}
        while len(results) < len(items):
            answer = self.read_answer()
            if not isinstance(answer, frames.SignResults) or answer.batch_id != batch_id:
                raise AssertionError(f"not an answer to the batch: {answer}")
            results.update({result.id: result for result in answer.results})
        return results


def signer_command(config: Path, *how: str) -> list[str]:
    return [sys.executable, "-m", "keyreeve_keyserver.signer", "--config", str(config), *how]


@contextmanager
def running_signer(config: Path, *, log: Path, uid: int | None = None) -> Iterator[SignerClient]:
    """A signer at the other end of a socketpair; its log lines go to the file `log`. It is ended with the block. `uid`: as another user."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.settimeout(30)
    with theirs, log.open("ab") as stderr:
        command = signer_command(config, "--frames-fd", str(theirs.fileno()))
        process = subprocess.Popen(
            command if uid is None else command_as(uid, command),
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    try:
        yield SignerClient(ours, process)
    finally:
        ours.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        if (
            process.returncode > 0 and process.returncode not in REFUSED_START
        ):  # a test that kills it sees a negative one
            raise AssertionError(f"the signer ended with {process.returncode}, a fault of ours: see {log}")


def connect_signer(path: Path, process: subprocess.Popen[bytes], *, seconds: float = 20) -> SignerClient:
    """A connection to a signer that listens, as soon as it does. Raises: AssertionError when it ended or never listened."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(20)
        try:
            connection.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if process.poll() is not None:
                raise AssertionError(f"the signer ended with {process.returncode}") from None
            time.sleep(0.02)
            continue
        return SignerClient(connection, process)
    raise AssertionError("the signer does not listen")
