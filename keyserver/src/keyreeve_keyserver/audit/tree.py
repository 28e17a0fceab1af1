"""The growing right edge of the log's tree: what must be in memory to add records, to know the root, and to write tiles. Pure.

At each level stand the hashes of that level's last tile, 0 to 255 of them; a tile that becomes full moves up as one hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keyreeve_common.transparency.merkle import EMPTY_ROOT, fold_right, perfect_root
from keyreeve_common.transparency.tiles import TILE_HEIGHT, TILE_WIDTH, Tile

from keyreeve_keyserver.audit.hashes import node_hashes


@dataclass(frozen=True, slots=True)
class HashTile:
    """A tile and its hashes."""

    tile: Tile
    hashes: tuple[bytes, ...]


class GrowingTree:
    """`edges[level]` are the hashes of the last tile of that level, for a tree of `size` records."""

    def __init__(self, size: int = 0, edges: list[list[bytes]] | None = None) -> None:
        self.size = size
        self._edges: list[list[bytes]] = edges or [[]]

    def extend(self, leaves: Sequence[bytes]) -> list[HashTile]:
        """Adds leaf hashes; the tiles that became full by them, in the order in which they did."""
        full: list[HashTile] = []
        at = 0
        while at < len(leaves):
            edge = self._edges[0]
            taken = leaves[at : at + TILE_WIDTH - len(edge)]
            edge += taken
            at += len(taken)
            self.size += len(taken)
            if len(edge) == TILE_WIDTH:
                self._close(0, full)
        return full

    def _close(self, level: int, full: list[HashTile]) -> None:
        """The last tile of this level is full: its root goes one level up."""
        edge = self._edges[level]
        index = (self.size >> (TILE_HEIGHT * (level + 1))) - 1
        full.append(HashTile(Tile(level, index), tuple(edge)))
        value = perfect_root(edge, node_hashes)
        edge.clear()
        if level + 1 == len(self._edges):
            self._edges.append([])
        above = self._edges[level + 1]
        above.append(value)
        if len(above) == TILE_WIDTH:
            self._close(level + 1, full)

    def root(self) -> bytes:
        rest: bytes | None = None
        for edge in self._edges:
            rest = fold_right(edge, rest)
        return rest or EMPTY_ROOT

    def partial_tiles(self) -> list[HashTile]:
        """The last tile of each level that has one which is not full."""
        return [
            HashTile(Tile(level, self.size >> (TILE_HEIGHT * (level + 1)), len(edge)), tuple(edge))
            for level, edge in enumerate(self._edges)
            if edge
        ]
