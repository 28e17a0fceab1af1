"""The pool against workers that the test plays."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from keyreeve_common.errors import TokenPinIncorrect, TokenUnavailable
from keyreeve_common.schemes import SignatureScheme
from keyreeve_keyserver.backends import worker_frames as frames
from keyreeve_keyserver.backends.worker_pool import WorkerPool
from keyreeve_keyserver.backends.worker_process import WorkerProcess

SECOND = timedelta(seconds=1)
SIGN = frames.TokenSign((frames.TokenSignItem("k", SignatureScheme.ED25519, 1000, b"m"),))


class PlayedWorker:
    """Opens; then its session is lost, and the PIN that it logs in with again is refused."""

    pid = 1

    def __init__(self, asked: list[frames.Question]) -> None:
        self._asked = asked

    async def ask(self, question: frames.Question, *, within: timedelta) -> frames.Answer:
        self._asked.append(question)
        if isinstance(question, frames.Open):
            return frames.Done({})
        refusal = TokenPinIncorrect("the token refused the PIN")
        return frames.TokenSigned((refusal,)) if isinstance(question, frames.TokenSign) else frames.Failed(refusal)

    def end(self) -> None:
        return


@pytest.mark.parametrize("question", [SIGN, frames.Find("k")])
async def test_pin_refused_at_work_stops_the_pool(monkeypatch: pytest.MonkeyPatch, question: frames.Question) -> None:
    asked: list[frames.Question] = []

    async def spawn(_launcher: Any, _backend: str) -> Any:
        return PlayedWorker(asked)

    monkeypatch.setattr(WorkerProcess, "spawn", spawn)
    launcher: Any = None
    pool = WorkerPool("hsm", launcher, workers=2)
    await pool.start()
    for _ in range(5):
        with suppress(TokenPinIncorrect, TokenUnavailable):
            await pool.ask(question, within=SECOND)
    assert isinstance(pool.fault, TokenPinIncorrect)
    assert asked.count(question) == 1
    await pool.close()
