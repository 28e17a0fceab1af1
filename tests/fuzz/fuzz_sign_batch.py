"""Packed batches of an agent and packed results: nothing but MalformedFrame comes out, and an accepted one has one encoding."""

from __future__ import annotations

import sys

from harness import main
from keyreeve_common.errors import MalformedFrame
from keyreeve_common.sign_batch import (
    ids_of,
    open_items,
    pack_items,
    pack_results,
    read_results,
    scan_results,
    split_count,
    uses_of,
    with_count,
)


def target(data: bytes) -> str:
    words = []
    try:
        items = open_items(data)
    except MalformedFrame as error:
        words.append(error.detail[:40])
    else:
        words.append("accepted items")
        if with_count(len(items), pack_items(items)) != data:
            raise AssertionError("items have two encodings")
        if ids_of(items) != ids_of(list(items)) or uses_of(items) != uses_of(list(items)):
            raise AssertionError("a scan sees other items than a reading")
    try:
        count, rest = split_count(data)
        results = scan_results(rest, count)
    except MalformedFrame as error:
        words.append(error.detail[:40])
    else:
        words.append("accepted results")
        again = pack_results(results)
        if ids_of(results) != ids_of(list(results)) or pack_results(read_results(again, count)) != again:
            raise AssertionError("results do not come back")
    return " / ".join(words)


if __name__ == "__main__":
    sys.exit(main(target, "sign_batch"))
