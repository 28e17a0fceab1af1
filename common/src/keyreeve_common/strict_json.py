"""JSON in one strict reading and one spelling, for what is signed, sealed or crosses a boundary.

Read: one value, no name twice, whole numbers only, no lone surrogates. Written: names sorted, no spaces, ASCII. Pure.
Spec: RFC 8259; the spelling is that of RFC 8785 as far as whole numbers and ASCII go.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def parse_strict_json(data: str | bytes) -> Any:
    """Raises: ValueError, whose text is not for showing."""
    try:
        text = data.decode() if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=_distinct, parse_float=_refuse, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def canonical_json(value: Mapping[str, Any]) -> bytes:
    """Names sorted, no spaces, ASCII. Raises: ValueError for a number that is none."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name stands twice")
    return value


def _refuse(text: str) -> Any:
    raise ValueError(f"not a whole number: {text[:32]}")
