"""Frames between front end and signer: nothing but MalformedFrame comes out, and what is accepted is written the same way again."""

from __future__ import annotations

import sys

from harness import main
from keyreeve_common.errors import MalformedFrame
from keyreeve_keyserver import frames


def target(data: bytes) -> str:
    words = []
    for parse in (frames.parse_request_frame, frames.parse_answer_frame):
        try:
            parsed = parse(data)
        except MalformedFrame as error:
            words.append(error.detail.rstrip("0123456789 ")[:40])
            continue
        again = parsed.to_bytes()[4:]
        words.append(f"accepted {type(parsed).__name__}")
        if isinstance(parsed, frames.SignBatch) and again != data:
            raise AssertionError("a batch has two encodings")
        if not isinstance(parsed, frames.SignBatch) and parse(again).to_bytes()[4:] != again:
            raise AssertionError("a frame does not come back")
    try:
        frames.splitter().feed(data)
    except MalformedFrame:
        words.append("stream refused")
    return " / ".join(words)


if __name__ == "__main__":
    sys.exit(main(target, "frames"))
