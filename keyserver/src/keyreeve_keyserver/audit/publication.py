"""Publishing: writes what the log has become as tiles, entry bundles and a signed checkpoint. A file is whole or absent, and never changes.

Order: what the checkpoint stands on first, all of it on disk; then the checkpoint; then the partial tiles go that full ones replaced.
Spec: C2SP tlog-tiles.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from keyreeve_common.errors import FailedPrecondition
from keyreeve_common.files import sync_directory
from keyreeve_common.transparency.tiles import ENTRIES, TILE_WIDTH, Tile, join_entries, join_hashes

from keyreeve_keyserver.audit.tree import HashTile

DIRECTORY_MODE = 0o750
FILE_MODE = 0o640
CHECKPOINT = "checkpoint"
_FILES_AT_ONCE = 64  # open at the same time


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A tree of `size` records: `entries` are those from `base` on (a multiple of 256), `full` the tiles that became full since `base`."""

    size: int
    root: bytes
    base: int
    entries: tuple[bytes, ...]
    full: tuple[HashTile, ...]
    partial: tuple[HashTile, ...]

    @property
    def whole_bundles(self) -> int:
        """Up to which index the records stand in bundles that never change."""
        return self.size - self.size % TILE_WIDTH

    def files(self) -> Iterator[tuple[Tile, bytes]]:
        for at in range(0, len(self.entries), TILE_WIDTH):
            entries = self.entries[at : at + TILE_WIDTH]
            yield Tile(ENTRIES, (self.base + at) // TILE_WIDTH, len(entries)), join_entries(entries)
        for found in (*self.full, *self.partial):
            yield found.tile, join_hashes(found.hashes)


def publish(directory: Path, snapshot: Snapshot, checkpoint: bytes) -> None:
    """Raises: OSError; FailedPrecondition when a file stands there that says otherwise."""
    touched: set[Path] = set()
    drafts: list[_Draft] = []
    try:
        for tile, data in snapshot.files():
            _write(directory, tile, data, touched, drafts)
            if len(drafts) >= _FILES_AT_ONCE:
                _finish(drafts)
        _finish(drafts)
    finally:
        _discard(drafts)
    for parent in sorted(touched):
        sync_directory(parent)
    replace_file(directory / CHECKPOINT, checkpoint)
    for tile, _ in snapshot.files():
        if tile.width == TILE_WIDTH:
            partials = directory / f"{tile.path}.p"
            if partials.exists():
                shutil.rmtree(partials)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A file that is written, but not yet on disk, and has not its name yet."""

    path: Path
    draft: Path
    descriptor: int


def _finish(drafts: list[_Draft]) -> None:
    """Syncs all of them, so that one commit of the file system's journal serves many, then gives them their names and takes them off the list.

    Raises: OSError, and then those that have no name yet are on the list still.
    """
    for found in drafts:
        os.fsync(found.descriptor)
    while drafts:
        drafts[-1].draft.rename(drafts[-1].path)
        os.close(drafts.pop().descriptor)


def _discard(drafts: list[_Draft]) -> None:
    """What has no name is nothing: on a disk that is full it would be in the way."""
    for found in drafts:
        os.close(found.descriptor)
        with suppress(OSError):
            found.draft.unlink()
    drafts.clear()


def _write(directory: Path, tile: Tile, data: bytes, touched: set[Path], drafts: list[_Draft]) -> None:
    path = directory / tile.path
    with suppress(FileNotFoundError):
        if path.read_bytes() != data:
            raise FailedPrecondition(
                f"{path}: holds other records than the journal: the log was changed from outside; move the directory away as"
                " evidence, then a start begins a new log"
            )
        return
    _make_directories(path.parent, touched)
    drafts.append(_draft(path, data))
    touched.add(path.parent)


def _make_directories(path: Path, touched: set[Path]) -> None:
    missing: list[Path] = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for new in reversed(missing):
        new.mkdir(mode=DIRECTORY_MODE)
        descriptor = os.open(new, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # the signer may not chmod by path
        try:
            os.fchmod(descriptor, DIRECTORY_MODE)
        finally:
            os.close(descriptor)
        touched.update((new, new.parent))


def replace_file(path: Path, data: bytes, *, mode: int = FILE_MODE) -> None:
    """The file with this content, on disk when this returns. Raises: OSError."""
    drafts = [_draft(path, data, mode=mode)]
    try:
        _finish(drafts)
    finally:
        _discard(drafts)
    sync_directory(path.parent)


def _draft(path: Path, data: bytes, *, mode: int = FILE_MODE) -> _Draft:
    """Raises: OSError, and then nothing is left of it."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fchmod(descriptor, mode)
    except OSError:
        os.close(descriptor)
        with suppress(OSError):
            draft.unlink()
        raise
    return _Draft(path, draft, descriptor)
