"""The Merkle tree of RFC 6962 over SHA-256: hashes, inclusion and consistency proofs, and their verification.

Proofs are built from a `Subtree`, which gives the hash of any range that the tree's definition meets; so the same code proves from a list of
leaves and from tiles.
Spec: RFC 6962 2.1; RFC 9162 2.1.3.2, 2.1.4.2 (verification).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256

from keyreeve_common.errors import InvalidRequest

HASH_BYTES = 32
EMPTY_ROOT = sha256(b"").digest()
Subtree = Callable[[int, int], bytes]
"""The Merkle tree hash of the leaves from `start` up to, not including, `end`; `end` is above `start`."""


def leaf_hash(data: bytes) -> bytes:
    return sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()


def node_hashes(level: list[bytes]) -> list[bytes]:
    """Of each two neighbours among an even number of hashes."""
    return [node_hash(level[at], level[at + 1]) for at in range(0, len(level), 2)]


def perfect_root(hashes: Sequence[bytes], above: Callable[[list[bytes]], list[bytes]] = node_hashes) -> bytes:
    """The root over 2^n hashes of equal height; `above` is for who has a faster `node_hashes`."""
    level = list(hashes)
    while len(level) > 1:
        level = above(level)
    return level[0]


def fold_right(hashes: Sequence[bytes], rest: bytes | None) -> bytes | None:
    """The root over hashes of equal height with a smaller tree, or none, to their right; None where both are empty."""
    end = len(hashes)
    while end:
        width = end & -end  # the smallest perfect tree stands rightmost
        peak = perfect_root(hashes[end - width : end])
        rest = peak if rest is None else node_hash(peak, rest)
        end -= width
    return rest


def tree_root(leaves: Sequence[bytes]) -> bytes:
    """The root over these leaf hashes."""
    return fold_right(leaves, None) or EMPTY_ROOT


def subtree_of(leaves: Sequence[bytes]) -> Subtree:
    """Subtrees of a tree whose leaf hashes are at hand."""
    return lambda start, end: tree_root(leaves[start:end])


def split_point(count: int) -> int:
    """The largest power of two below `count` (2 or more): where the tree's definition cuts."""
    return 1 << (count - 1).bit_length() - 1


def inclusion_proof(subtree: Subtree, index: int, size: int) -> list[bytes]:
    """The audit path of one leaf, from the leaf up. Raises: InvalidRequest."""
    if not 0 <= index < size:
        raise InvalidRequest(f"index {index} is not in a tree of {size}")
    proof: list[bytes] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + split_point(end - start)
        if index < middle:
            proof.append(subtree(middle, end))
            end = middle
        else:
            proof.append(subtree(start, middle))
            start = middle
    return proof[::-1]


def consistency_proof(subtree: Subtree, old: int, new: int) -> list[bytes]:
    """That the tree of size `old` is the beginning of that of size `new`; empty where `old` is 0 or equal. Raises: InvalidRequest."""
    if not 0 <= old <= new:
        raise InvalidRequest(f"a tree of {new} does not hold one of {old}")
    if old in {0, new}:
        return []
    proof: list[bytes] = []
    start, end, whole = 0, new, True
    while old != end:
        middle = start + split_point(end - start)
        if old <= middle:
            proof.append(subtree(middle, end))
            end = middle
        else:
            proof.append(subtree(start, middle))
            start, whole = middle, False
    if not whole:
        proof.append(subtree(start, end))
    return proof[::-1]


def root_from_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes]) -> bytes:
    """The root that this audit path leads to; compare it with a signed one. Spec: RFC 9162 2.1.3.2. Raises: InvalidRequest."""
    if not 0 <= index < size:
        raise InvalidRequest(f"index {index} is not in a tree of {size}")
    node, last, root = index, size - 1, leaf
    for step in proof:
        if last == 0:
            raise InvalidRequest("inclusion proof is too long")
        if node & 1 or node == last:
            root = node_hash(step, root)
            while node and not node & 1:
                node, last = node >> 1, last >> 1
        else:
            root = node_hash(root, step)
        node, last = node >> 1, last >> 1
    if last:
        raise InvalidRequest("inclusion proof is too short")
    return root


def verify_consistency(old: int, new: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]) -> None:
    """Spec: RFC 9162 2.1.4.2. Raises: InvalidRequest."""
    if not 0 <= old <= new:
        raise InvalidRequest(f"a tree of {new} does not hold one of {old}")
    if old in {0, new}:
        if proof or (old == new and old_root != new_root) or (old == 0 and old_root != EMPTY_ROOT):
            raise InvalidRequest("the two trees are not the same, or the proof is not empty")
        return
    path = [old_root, *proof] if old & (old - 1) == 0 else list(proof)
    if not path:
        raise InvalidRequest("consistency proof is empty")
    node, last = old - 1, new - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    first = second = path[0]
    for step in path[1:]:
        if last == 0:
            raise InvalidRequest("consistency proof is too long")
        if node & 1 or node == last:
            first, second = node_hash(step, first), node_hash(step, second)
            while node and not node & 1:
                node, last = node >> 1, last >> 1
        else:
            second = node_hash(second, step)
        node, last = node >> 1, last >> 1
    if last or first != old_root or second != new_root:
        raise InvalidRequest("consistency proof does not join the two trees")
