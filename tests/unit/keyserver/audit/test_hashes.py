"""Hashes in bulk are the tree's hashes, in C and without it."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.transparency import merkle
from keyreeve_common.transparency.merkle import leaf_hash, node_hash
from keyreeve_keyserver.audit import hashes

NODES = [bytes([number]) * 32 for number in range(64)]


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_each_message_has_its_own_hash(messages: list[bytes]) -> None:
    assert hashes.sha256_each(messages) == [sha256(message).digest() for message in messages]
    assert hashes.leaf_hashes(messages) == [leaf_hash(message) for message in messages]
    assert hashes._each(b"\x00", messages) == hashes.leaf_hashes(messages)


def test_nodes_are_those_of_neighbours() -> None:
    nodes = [node_hash(NODES[at], NODES[at + 1]) for at in range(0, 64, 2)]
    assert hashes.node_hashes(NODES) == merkle.node_hashes(NODES) == nodes
    assert hashes.node_hashes([]) == merkle.node_hashes([]) == []


@pytest.mark.parametrize("count", [1, 2, 64])
def test_the_root_is_the_trees(count: int) -> None:
    assert merkle.perfect_root(NODES[:count], hashes.node_hashes) == merkle.tree_root(NODES[:count])


@pytest.mark.parametrize("wrong", [("", []), (b"", ["text"]), (b"", (b"a",)), (b"", [bytearray(b"a")])])
def test_what_is_no_list_of_bytes_is_refused(wrong: tuple[object, object]) -> None:
    engine = pytest.importorskip("keyreeve_engine._hashes", reason="the extra `engine` is not installed")
    with pytest.raises(TypeError):
        engine.sha256_each(*wrong)
    with pytest.raises(ValueError, match="odd"):
        engine.sha256_pairs(b"", [b"a"])
