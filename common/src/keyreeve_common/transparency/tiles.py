"""Tiles: where the hashes and records of a log stand, as files that never change once they are full.

A full tile has 256 hashes; those of level 0 are leaf hashes, each one above is the root of a full tile below. Entry bundles hold the records
themselves, 256 each, every record behind its length in two bytes.
Spec: C2SP tlog-tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from keyreeve_common.errors import InvalidRequest
from keyreeve_common.transparency.merkle import HASH_BYTES, Subtree, node_hash, perfect_root, split_point
from keyreeve_common.wire import u16

TILE_WIDTH = 256
TILE_HEIGHT = 8
TILE_BYTES = TILE_WIDTH * HASH_BYTES
MAX_ENTRY_BYTES = 65_535
ENTRIES = -1  # stands for a level in `Tile`


@dataclass(frozen=True, slots=True)
class Tile:
    """The `index`-th tile of a level, or with `level` ENTRIES the bundle of records under that tile of level 0; `width` 1 to 256."""

    level: int
    index: int
    width: int = TILE_WIDTH

    @property
    def path(self) -> str:
        """Relative to the log's directory."""
        level = "entries" if self.level == ENTRIES else str(self.level)
        partial = "" if self.width == TILE_WIDTH else f".p/{self.width}"
        return f"tile/{level}/{index_path(self.index)}{partial}"

    @property
    def whole(self) -> Tile:
        return Tile(self.level, self.index)


def index_path(index: int) -> str:
    """1234067 is `x001/x234/067`."""
    path = f"{index % 1000:03d}"
    while index := index // 1000:
        path = f"x{index % 1000:03d}/{path}"
    return path


def tiles_of_level(level: int, size: int) -> Iterator[Tile]:
    """The tiles of one level (ENTRIES too) in a tree of `size`, from the left; the last may be partial."""
    count = size >> (TILE_HEIGHT * max(level, 0))
    for index in range(count // TILE_WIDTH):
        yield Tile(level, index)
    if count % TILE_WIDTH:
        yield Tile(level, count // TILE_WIDTH, count % TILE_WIDTH)


def levels_of(size: int) -> range:
    """The levels that a tree of `size` has tiles in."""
    levels = 0
    while size >> (TILE_HEIGHT * levels):
        levels += 1
    return range(levels)


def join_hashes(hashes: Sequence[bytes]) -> bytes:
    return b"".join(hashes)


def split_hashes(data: bytes, width: int) -> list[bytes]:
    """The hashes of a tile. Raises: InvalidRequest."""
    if len(data) != width * HASH_BYTES:
        raise InvalidRequest(f"tile has {len(data)} bytes, {width * HASH_BYTES} are expected")
    return [data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES)]


def join_entries(entries: Sequence[bytes]) -> bytes:
    parts: list[bytes] = [b""] * (2 * len(entries))
    parts[0::2], parts[1::2] = map(u16, map(len, entries)), entries
    return b"".join(parts)


def split_entries(data: bytes) -> list[bytes]:
    """The records of an entry bundle. Raises: InvalidRequest."""
    entries: list[bytes] = []
    at = 0
    while at < len(data):
        start = at + 2
        end = start + int.from_bytes(data[at:start], "big")
        if start > len(data) or end > len(data):
            raise InvalidRequest("entry bundle is cut short")
        entries.append(data[start:end])
        at = end
    return entries


def tiled_subtree(hashes_of: Callable[[int, int], Sequence[bytes]]) -> Subtree:
    """Subtrees of a tree that stands in tiles. `hashes_of(level, index)` gives the hashes of that tile that there are."""

    def subtree(start: int, end: int) -> bytes:
        count = end - start
        if count & (count - 1) == 0 and start % count == 0:
            level, rest = divmod(count.bit_length() - 1, TILE_HEIGHT)
            first = start >> (TILE_HEIGHT * level)
            index, offset = divmod(first, TILE_WIDTH)
            hashes = hashes_of(level, index)[offset : offset + (1 << rest)]
            if len(hashes) == 1 << rest:
                return perfect_root(hashes)
            raise InvalidRequest(f"tile {Tile(level, index).path} has too few hashes")
        middle = start + split_point(count)
        return node_hash(subtree(start, middle), subtree(middle, end))

    return subtree
