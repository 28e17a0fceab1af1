"""Frames of a backend worker: nothing but MalformedFrame comes out, and an accepted question has one encoding."""

from __future__ import annotations

import sys

from harness import main
from keyreeve_common.errors import MalformedFrame
from keyreeve_keyserver.backends import worker_frames as frames


def target(data: bytes) -> str:
    words = []
    try:
        question = frames.parse_question(data)
    except MalformedFrame as error:
        words.append(error.detail[:40])
    else:
        words.append(f"accepted {type(question).__name__}")
        if question.to_bytes()[4:] != data:
            raise AssertionError("a question has two encodings")
    try:
        answer = frames.parse_answer(data)
    except MalformedFrame as error:
        words.append(error.detail[:40])
    else:
        words.append(f"accepted {type(answer).__name__}")
        again = answer.to_bytes()[4:]
        if frames.parse_answer(again).to_bytes()[4:] != again:
            raise AssertionError("an answer does not come back")
    return " / ".join(words)


if __name__ == "__main__":
    sys.exit(main(target, "worker_frames"))
