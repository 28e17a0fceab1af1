"""Hashes of many messages at once, for what is hashed with every signature: in C where the extra `engine` is installed, else by hashlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from typing import Final

from keyreeve_common.transparency import merkle

_LEAF: Final = b"\x00"  # before what is hashed as a leaf, and as a node. Spec: RFC 6962 2.1
_NODE: Final = b"\x01"


def _each(prefix: bytes, messages: list[bytes]) -> list[bytes]:
    return [sha256(prefix + message).digest() for message in messages]


try:
    from keyreeve_engine import _hashes as engine
except ImportError:
    hash_each: Callable[[bytes, list[bytes]], list[bytes]] = _each
    node_hashes: Callable[[list[bytes]], list[bytes]] = merkle.node_hashes
else:
    hash_each, node_hashes = engine.sha256_each, partial(engine.sha256_pairs, _NODE)


def sha256_each(messages: list[bytes]) -> list[bytes]:
    return hash_each(b"", messages)


def leaf_hashes(entries: Sequence[bytes]) -> list[bytes]:
    """Of the records of a log. Spec: RFC 6962 2.1."""
    return hash_each(_LEAF, list(entries))
