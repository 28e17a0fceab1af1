"""Mutations that keep DER well formed: an element is changed somewhere inside, and every length around it is written anew."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from harness import mutate as mutate_bytes
from keyreeve_keyserver.domain.der import DerError, Element, encode, read_element

_TAGS = (
    0x01,
    0x02,
    0x03,
    0x04,
    0x05,
    0x06,
    0x0C,
    0x13,
    0x16,
    0x17,
    0x18,
    0x30,
    0x31,
    0x80,
    0x82,
    0x86,
    0x87,
    0xA0,
    0xA3,
)


@dataclass
class Node:
    tag: int
    value: bytes = b""
    children: list[Node] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        body = b"".join(child.to_bytes() for child in self.children) if self.children else self.value
        return encode(self.tag, body)

    def all(self) -> list[Node]:
        return [self, *(node for child in self.children for node in child.all())]


def read_tree(data: bytes) -> Node | None:
    try:
        return _node(read_element(data, 0x30, "seed"))
    except (DerError, IndexError):
        return None


def _node(element: Element) -> Node:
    if element.tag & 0x20:
        return Node(element.tag, children=[_node(child) for child in element.children()])
    if element.tag == 0x04:  # extensions hold DER inside an OCTET STRING
        for tag in (0x30, 0x03, 0x04):
            try:
                return Node(0x04, children=[_node(read_element(element.value, tag, "inner"))])
            except (DerError, IndexError):
                continue
    return Node(element.tag, element.value)


def mutate(data: bytes, pool: Sequence[bytes], source: random.Random) -> bytes:
    """Three in four times a change inside the tree, else one of the bytes."""
    tree = read_tree(data)
    if tree is None or source.random() < 0.25:
        return mutate_bytes(data, pool, source)
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        _change(tree, pool, source)
    return tree.to_bytes()


def _change(tree: Node, pool: Sequence[bytes], source: random.Random) -> None:
    nodes = tree.all()
    node = source.choice(nodes)
    kind = source.randrange(6)
    if kind == 0:
        node.tag = source.choice(_TAGS)
    elif kind == 1 and node.children:
        node.children.pop(source.randrange(len(node.children)))
    elif kind == 2 and node.children:
        node.children.insert(source.randrange(len(node.children)), source.choice(node.children))
    elif kind == 3 and len(node.children) > 1:
        source.shuffle(node.children)
    elif kind == 4:
        other = read_tree(source.choice(pool))
        if other is not None:
            graft = source.choice(other.all())
            node.tag, node.value, node.children = graft.tag, graft.value, list(graft.children)
    elif not node.children:
        node.value = mutate_bytes(node.value, pool, source)[:512]
