"""Whatever a worker meets, the signer hears of it as an answer, and never in the words of a library."""

from __future__ import annotations

from keyreeve_common.errors import ErrorCode, KeyNotFound
from keyreeve_keyserver.backends import worker_frames as frames
from keyreeve_keyserver.backends.worker_main import guarded


def raising(error: Exception) -> frames.Answer:
    def answer(question: frames.Question) -> frames.Answer:
        raise error

    return guarded(answer)(frames.Ping())


def test_answers_pass() -> None:
    assert guarded(lambda question: frames.Done({}))(frames.Ping()) == frames.Done({})


def test_a_refusal_is_told_as_it_is() -> None:
    error = KeyNotFound("no such key in the token")
    assert raising(error) == frames.Failed(error)


def test_of_a_fault_of_ours_only_its_kind_is_told() -> None:
    answer = raising(RuntimeError("the PIN is 1234"))
    assert isinstance(answer, frames.Failed)
    assert (answer.error.code, answer.error.detail) == (ErrorCode.INTERNAL, "worker: RuntimeError")
    assert answer.error.__cause__ is None
    assert b"1234" not in answer.to_bytes()
