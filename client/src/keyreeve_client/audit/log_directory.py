"""A log's directory as a reader sees it: published files, and the journal's records that no checkpoint covers yet.

Nothing read here is trusted: `verification` holds it against a signed checkpoint. A log that is being written may be read; what changes
meanwhile is what lies beyond the checkpoint that was read first.
Spec: docs/protocol/audit-log.md; C2SP tlog-tiles.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from keyreeve_common.errors import InvalidRequest, NotFound
from keyreeve_common.transparency.journal import JournalContent, read_groups
from keyreeve_common.transparency.merkle import Subtree
from keyreeve_common.transparency.note import VerifierKey, parse_vkey
from keyreeve_common.transparency.tiles import (
    ENTRIES,
    MAX_ENTRY_BYTES,
    TILE_HEIGHT,
    TILE_WIDTH,
    Tile,
    split_entries,
    split_hashes,
    tiled_subtree,
)

_JOURNAL = re.compile(r"\d{20}", re.ASCII)
_MAX_FILE_BYTES = TILE_WIDTH * (2 + MAX_ENTRY_BYTES)  # of the largest, a bundle of records
_MAX_JOURNAL_BYTES = 256 * 1024 * 1024  # the signer begins a new one at 4 MiB, where it can publish


class LogDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._cached_hashes = lru_cache(maxsize=64)(self.hashes)

    def read(self, name: str) -> bytes:
        """Raises: NotFound; InvalidRequest for what is no file of a log's size."""
        try:
            return _read_file(self.path / name)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"{self.path / name}: is missing") from None

    def vkey(self) -> VerifierKey:
        """The key that the directory itself names: whoever could write there could put another. Raises: NotFound, InvalidRequest."""
        return read_vkey(self.path / "log.vkey")

    def entries(self, tile: Tile) -> list[bytes]:
        """The records of a bundle; of one that is full by now, the first `width`. Raises: NotFound, InvalidRequest."""
        return split_entries(self._tile(tile))[: tile.width]

    def hashes(self, tile: Tile) -> list[bytes]:
        """The hashes of a tile, as many as its width. Raises: NotFound, InvalidRequest."""
        data = self._tile(tile)
        return split_hashes(data, len(data) // 32)[: tile.width]

    def partials(self, tile: Tile) -> Iterator[tuple[int, bytes]]:
        """Widths and contents of the partial tiles, no wider than `tile`, that stand in its place."""
        directory = self.path / f"{tile.whole.path}.p"
        with suppress(FileNotFoundError, NotADirectoryError):  # they go when the tile is full
            for path in sorted(directory.iterdir()):
                if path.name.isdecimal() and 0 < int(path.name) <= min(tile.width, TILE_WIDTH - 1):
                    yield int(path.name), _read_or_nothing(path)

    def subtree(self, size: int) -> Subtree:
        """Subtrees of the tree of `size`, from its tiles. Raises, when called: NotFound, InvalidRequest."""

        def hashes_of(level: int, index: int) -> list[bytes]:
            width = min((size >> (TILE_HEIGHT * level)) - index * TILE_WIDTH, TILE_WIDTH)
            return self._cached_hashes(Tile(level, index, width))

        return tiled_subtree(hashes_of)

    def entry(self, index: int, size: int) -> bytes:
        """One record of a tree of `size`. Raises: NotFound, InvalidRequest."""
        bundle = index // TILE_WIDTH
        entries = self.entries(Tile(ENTRIES, bundle, min(size - bundle * TILE_WIDTH, TILE_WIDTH)))
        if index % TILE_WIDTH >= len(entries):
            raise InvalidRequest(f"the bundle of record {index} is cut short")
        return entries[index % TILE_WIDTH]

    def journal(self) -> tuple[JournalContent, int] | None:
        """The journal's records, and how many bytes behind them are no whole group; None in a copy without a journal.

        Raises: InvalidRequest for what is no file of a journal's size.
        """
        for _ in range(3):  # a running signer may put a new one in its place
            try:
                path = max(found for found in (self.path / "journal").iterdir() if _JOURNAL.fullmatch(found.name))
                data = _read_file(path, _MAX_JOURNAL_BYTES)
            except (FileNotFoundError, NotADirectoryError, ValueError):
                continue
            content = read_groups(data, int(path.name))
            return content, len(data) - content.good
        return None

    def _tile(self, tile: Tile) -> bytes:
        with suppress(NotFound):
            return self.read(tile.path)
        if tile.width == TILE_WIDTH:
            raise NotFound(f"{self.path / tile.path}: is missing")
        with suppress(NotFound):  # a partial tile goes when the full one is there
            return self.read(tile.whole.path)
        raise NotFound(f"{self.path / tile.path}: is missing")


def _read_file(path: Path, limit: int = _MAX_FILE_BYTES) -> bytes:
    """Whoever wrote the directory may have laid a pipe, a device or a link to either in a file's place: none is waited for or read without end.

    Raises: OSError; InvalidRequest.
    """
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InvalidRequest(f"{path}: is no regular file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InvalidRequest(f"{path}: is longer than the {limit} bytes that it can have")
    return data


def _read_or_nothing(path: Path) -> bytes:
    try:
        return _read_file(path)
    except InvalidRequest:
        return b""


def read_vkey(path: Path) -> VerifierKey:
    """Raises: NotFound, InvalidRequest."""
    try:
        return parse_vkey(_read_file(path).decode("ascii"))
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise InvalidRequest(f"{path}: is no verifier key") from None
