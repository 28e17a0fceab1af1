"""Hashes of many messages at once, for what is hashed with every signature: in C where the extra `engine` is installed, else by hashlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256

LEAF, NODE = b"\x00", b"\x01"  # Spec: RFC 6962 2.1


def _each(prefix: bytes, messages: list[bytes]) -> list[bytes]:
    return [sha256(prefix + message).digest() for message in messages]


def _pairs(prefix: bytes, nodes: list[bytes]) -> list[bytes]:
    return [sha256(prefix + nodes[at] + nodes[at + 1]).digest() for at in range(0, len(nodes), 2)]


try:
    from keyreeve_engine import _hashes as engine
except ImportError:
    hash_each: Callable[[bytes, list[bytes]], list[bytes]] = _each
    hash_pairs: Callable[[bytes, list[bytes]], list[bytes]] = _pairs
else:
    hash_each, hash_pairs = engine.sha256_each, engine.sha256_pairs


def sha256_each(messages: list[bytes]) -> list[bytes]:
    return hash_each(b"", messages)


def leaf_hashes(entries: Sequence[bytes]) -> list[bytes]:
    """Of the records of a log. Spec: RFC 6962 2.1."""
    return hash_each(LEAF, list(entries))


def root_of_full_tile(hashes: list[bytes]) -> bytes:
    """The root over 2^n hashes of equal height. Spec: RFC 6962 2.1."""
    level = hashes
    while len(level) > 1:
        level = hash_pairs(NODE, level)
    return level[0]
