"""The growing right edge of the log's tree: what must be in memory to add records, to know the root, and to write tiles. Pure.

At each level stand the hashes of that level's last tile, 0 to 255 of them; a tile that becomes full moves up as one hash.
"""

from __future__ import annotations

from dataclasses import dataclass

from keyreeve_common.transparency.merkle import EMPTY_ROOT, fold_right, perfect_root
from keyreeve_common.transparency.tiles import TILE_HEIGHT, TILE_WIDTH, Tile


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

    def add(self, leaf: bytes) -> list[HashTile]:
        """Adds one leaf hash; the tiles that became full by it, lowest first."""
        full: list[HashTile] = []
        self.size += 1
        level, value = 0, leaf
        while True:
            if level == len(self._edges):
                self._edges.append([])
            edge = self._edges[level]
            edge.append(value)
            if len(edge) < TILE_WIDTH:
                return full
            index = (self.size >> (TILE_HEIGHT * (level + 1))) - 1
            full.append(HashTile(Tile(level, index), tuple(edge)))
            value = perfect_root(edge)
            edge.clear()
            level += 1

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
