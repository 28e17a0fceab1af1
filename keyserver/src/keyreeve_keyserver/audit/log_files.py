"""The log on disk, as the one thread that writes it sees it: opens it, adds records, hands out what is to be published.

Rules that always hold: a record counts only when its whole group is in the journal; nothing is published that is not in the journal, on disk; a
log that does not reach its last signed checkpoint, or leads to another root, is not gone on with.
Spec: docs/protocol/audit-log.md.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from keyreeve_common.errors import FailedPrecondition, InvalidRequest, KeyreeveError
from keyreeve_common.files import make_private_directory
from keyreeve_common.transparency.checkpoint import Checkpoint, verify_checkpoint
from keyreeve_common.transparency.journal import JournalContent
from keyreeve_common.transparency.merkle import EMPTY_ROOT
from keyreeve_common.transparency.tiles import TILE_HEIGHT, TILE_WIDTH, Tile, levels_of, split_hashes

from keyreeve_keyserver.audit.checkpoint_key import CheckpointKey
from keyreeve_keyserver.audit.hashes import leaf_hashes
from keyreeve_keyserver.audit.journal_file import JournalFile, create_journal, journal_paths, open_journal
from keyreeve_keyserver.audit.publication import CHECKPOINT, DIRECTORY_MODE, Snapshot, publish, replace_file
from keyreeve_keyserver.audit.tree import GrowingTree, HashTile

MAX_JOURNAL_BYTES = 4 * 1024 * 1024
_NEW_LOG = "move the directory away as evidence, then a start begins a new log"


@dataclass(frozen=True, slots=True)
class Opened:
    """What opening found. `torn` counts bytes that a crash left half-written, `unsigned` the records after the last checkpoint."""

    size: int
    torn: int
    unsigned: int


class LogFiles:
    """`sync_always`: a record is on disk before `commit` returns."""

    def __init__(self, directory: Path, key: CheckpointKey, *, sync_always: bool) -> None:
        self.directory = directory
        self._key = key
        self._sync_always = sync_always
        self._journal: JournalFile | None = None
        self._tree = GrowingTree()
        self._entries: list[bytes] = []  # from _base on: not in full published bundles yet
        self._base = 0
        self._full: list[HashTile] = []
        self._unsynced = False
        self._rewrite = False  # a sync failed, so the journal's file is not to be trusted
        self.waiting_bytes = 0

    @property
    def size(self) -> int:
        return self._tree.size

    def open(self) -> Opened:
        """Raises: FailedPrecondition, and then nothing was changed; OSError."""
        journals = self.directory / "journal"
        journals.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
        if not (self.directory / CHECKPOINT).exists():
            self._begin(journals)
        checkpoint = self._read_checkpoint()
        journal, content, torn = open_journal(journals, self._key.seal_group)
        try:
            self._load(content, checkpoint)
            journal.mend(torn)
        except (KeyreeveError, OSError):
            journal.close()
            raise
        self._journal = journal
        return Opened(self.size, len(torn), self.size - checkpoint.size)

    def _load(self, content: JournalContent, checkpoint: Checkpoint) -> None:
        """Builds the tree and holds it against the checkpoint. Raises: FailedPrecondition, OSError."""
        end = content.first + len(content.entries)
        if content.first % TILE_WIDTH or content.first > checkpoint.size or end < checkpoint.size:
            raise FailedPrecondition(
                f"{self.directory}: the audit log has {end} records, its last signed checkpoint has {checkpoint.size}: records are"
                f" missing; restore them, or {_NEW_LOG}"
            )
        self._tree = GrowingTree(content.first, self._edges(content.first, checkpoint.size))
        self._base, self._entries, self._full, self.waiting_bytes = content.first, [], [], 0
        before = checkpoint.size - content.first
        self._take(content.entries[:before])
        if self._tree.root() != checkpoint.root:
            raise FailedPrecondition(
                f"{self.directory}: the audit log does not match its last signed checkpoint: records were changed; keyreeve audit verify"
                f" says which; {_NEW_LOG}"
            )
        self._take(content.entries[before:])

    def commit(self, entries: Sequence[bytes]) -> None:
        """Adds records, all of them or none. Raises: OSError."""
        if self._rewrite:
            self._start_journal()
        journal = self._open_journal
        length = journal.length
        journal.append(entries)
        self._unsynced = True
        if self._sync_always:
            try:
                self.sync()
            except OSError:
                journal.take_back(len(entries), length)
                raise
        self._take(entries)

    def sync(self) -> None:
        """What was added is on disk when this returns. Raises: OSError."""
        if not self._unsynced:
            return
        try:
            self._open_journal.sync()
        except OSError:
            self._rewrite = True
            raise
        self._unsynced = False

    def snapshot(self) -> Snapshot:
        """What there is to publish, safe on disk. Raises: OSError."""
        if self._rewrite:
            self._start_journal()
        self.sync()
        return Snapshot(
            self.size,
            self._tree.root(),
            self._base,
            tuple(self._entries),
            tuple(self._full),
            tuple(self._tree.partial_tiles()),
        )

    def publish(self, snapshot: Snapshot) -> None:
        """In any thread. Raises: OSError, FailedPrecondition."""
        publish(self.directory, snapshot, self._key.sign(snapshot.size, snapshot.root))

    def published(self, snapshot: Snapshot) -> None:
        """Lets go of what stands in full bundles now, and starts a new journal when the old one is long. Raises: OSError."""
        done = snapshot.whole_bundles - self._base
        del self._entries[:done], self._full[: len(snapshot.full)]
        self._base += done
        self.waiting_bytes = sum(map(len, self._entries))
        if self._open_journal.length > MAX_JOURNAL_BYTES and self._base > self._open_journal.first:
            self._start_journal()

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    @property
    def _open_journal(self) -> JournalFile:
        assert self._journal is not None  # noqa: S101 - `open` comes first
        return self._journal

    def _begin(self, journals: Path) -> None:
        """A new log, if there is no trace of an old one."""
        if (self.directory / "tile").exists() or any(path.stat().st_size for path in journal_paths(journals)):
            raise FailedPrecondition(
                f"{self.directory / CHECKPOINT}: is gone, and there are records; restore it, or {_NEW_LOG}"
            )
        create_journal(journals, 0, (), self._key.seal_group).close()
        replace_file(self.directory / CHECKPOINT, self._key.sign(0, EMPTY_ROOT))

    def _read_checkpoint(self) -> Checkpoint:
        path = self.directory / CHECKPOINT
        try:
            return verify_checkpoint(path.read_bytes(), self._key.vkey)[0]
        except InvalidRequest as error:
            raise FailedPrecondition(f"{path}: {error.detail}; restore it, or {_NEW_LOG}") from None

    def _edges(self, size: int, published: int) -> list[list[bytes]]:
        """The hashes of the last tile of each level in a tree of `size`, from the tiles of one of `published` records."""
        edges: list[list[bytes]] = []
        for level in levels_of(size):
            index, width = divmod(size >> (TILE_HEIGHT * level), TILE_WIDTH)
            edges.append(self._hashes(level, index, published)[:width] if width else [])
            if len(edges[-1]) != width:
                raise FailedPrecondition(f"{self.directory}: tile {Tile(level, index).path} is too short; {_NEW_LOG}")
        return edges or [[]]

    def _hashes(self, level: int, index: int, published: int) -> list[bytes]:
        width = min((published >> (TILE_HEIGHT * level)) - index * TILE_WIDTH, TILE_WIDTH)
        tile = Tile(level, index, width)
        for candidate in (tile, tile.whole):
            path = self.directory / candidate.path
            if path.exists():
                try:
                    return split_hashes(path.read_bytes(), candidate.width)
                except InvalidRequest as error:
                    raise FailedPrecondition(f"{path}: {error.detail}; restore it, or {_NEW_LOG}") from None
        raise FailedPrecondition(f"{self.directory / tile.path}: is missing; restore it, or {_NEW_LOG}")

    def _take(self, entries: Sequence[bytes]) -> None:
        self._full += self._tree.extend(leaf_hashes(entries))
        self._entries += entries
        self.waiting_bytes += sum(map(len, entries))

    def _start_journal(self) -> None:
        """A new file with the records that are in no full bundle; the old one goes."""
        old, directory = self._open_journal, self.directory / "journal"
        try:
            new = create_journal(directory, self._base, self._entries, self._key.seal_group)
        except OSError:
            # A start reads the newest: where that stands there already, nothing may be added to the old one beside it.
            self._rewrite = self._rewrite or journal_paths(directory)[-1:] != [old.path]
            raise
        self._journal, self._rewrite, self._unsynced = new, False, False
        old.close()
        if old.path != new.path:
            old.path.unlink(missing_ok=True)


def lock_directory(directory: Path) -> int:
    """Makes the directory and takes its lock, which the descriptor holds: one signer writes a log.

    Raises: ConfigInvalid, FailedPrecondition, OSError.
    """
    make_private_directory(directory, mode=DIRECTORY_MODE)
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise FailedPrecondition(f"{directory}: another signer writes this audit log; each needs its own") from None
    return lock
