"""Audit records: nothing but InvalidRequest comes out, and what is accepted has this one encoding."""

from __future__ import annotations

import sys

from harness import main
from keyreeve_common.errors import InvalidRequest
from keyreeve_common.transparency.records import parse_record


def target(data: bytes) -> str:
    try:
        record = parse_record(data)
    except InvalidRequest as error:
        return error.detail[:60]
    if record.to_bytes() != data:
        raise AssertionError("a record has two encodings")
    _ = (record.time, record.result, record.purpose_label, record.scheme_label)
    return "accepted"


if __name__ == "__main__":
    sys.exit(main(target, "audit_record"))
