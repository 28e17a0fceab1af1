"""The sign socket's bulk reading: nothing comes out of it but frames and refusals, and they are those of the strict reading, frame by frame."""

from __future__ import annotations

import sys

from harness import main
from keyreeve_common.client_frames import BadFrame, ClientFrames
from keyreeve_common.errors import InvalidRequest
from keyreeve_common.sign_socket import parse_client_frame


def target(data: bytes) -> str:
    whole, cut = ClientFrames().feed(data), ClientFrames()
    middle = len(data) // 2
    parts = cut.feed(data[:middle]) + cut.feed(data[middle:])
    words, at = [], 0
    if len(parts) != len(whole):
        raise AssertionError("a cut changes the number of frames")
    for frame, again in zip(whole, parts, strict=True):
        if isinstance(frame, BadFrame):
            words.append(frame.error.detail.rstrip("0123456789 ")[:40])
            if not isinstance(again, BadFrame) or again.error.detail != frame.error.detail:
                raise AssertionError("a cut changes a refusal")
            at += 4 + int.from_bytes(data[at : at + 4], "big")
            continue
        size = len(frame.to_bytes())
        try:
            strict = parse_client_frame(data[at + 4 : at + size])
        except InvalidRequest as error:
            raise AssertionError("what the strict reading refuses was taken") from error
        if frame != again or frame != strict or frame.to_bytes() != data[at : at + size]:
            raise AssertionError("two readings differ")
        at += size
        words.append(f"accepted {type(frame).__name__}")
    return " / ".join(dict.fromkeys(words)) or "nothing whole"


if __name__ == "__main__":
    sys.exit(main(target, "client_frames"))
