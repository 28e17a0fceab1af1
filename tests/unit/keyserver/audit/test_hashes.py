"""Hashes in bulk are the tree's hashes, in C and without it."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.transparency.merkle import leaf_hash, node_hash, perfect_root
from keyreeve_keyserver.audit import hashes

Hash = Callable[[bytes, list[bytes]], list[bytes]]
NODES = [bytes([number]) * 32 for number in range(64)]


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_each_message_has_its_own_hash(messages: list[bytes]) -> None:
    assert hashes.sha256_each(messages) == [sha256(message).digest() for message in messages]
    assert hashes.leaf_hashes(messages) == [leaf_hash(message) for message in messages]
    assert hashes._each(b"\x00", messages) == hashes.leaf_hashes(messages)


@pytest.mark.parametrize("pairs", [hashes.hash_pairs, hashes._pairs])
def test_pairs_are_nodes(pairs: Hash) -> None:
    assert pairs(hashes.NODE, NODES) == [node_hash(NODES[at], NODES[at + 1]) for at in range(0, 64, 2)]
    assert pairs(hashes.NODE, []) == []


def test_the_root_of_a_full_tile() -> None:
    assert hashes.root_of_full_tile(NODES) == perfect_root(NODES)
    assert hashes.root_of_full_tile(NODES[:1]) == NODES[0]


@pytest.mark.parametrize("wrong", [("", []), (b"", ["text"]), (b"", (b"a",)), (b"", [bytearray(b"a")])])
def test_what_is_no_list_of_bytes_is_refused(wrong: tuple[object, object]) -> None:
    engine = pytest.importorskip("keyreeve_engine._hashes", reason="the extra `engine` is not installed")
    with pytest.raises(TypeError):
        engine.sha256_each(*wrong)
    with pytest.raises(ValueError, match="odd"):
        engine.sha256_pairs(b"", [b"a"])
