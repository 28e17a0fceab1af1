"""The journal on disk: one file `journal/<index of its first record>`, to which groups are added, each by one write.

What a crash tore off is cut at the next start and kept beside the journal as `torn-<index>-<bytes>`. A group whose write failed does not
count, and the next one is written over it. All here blocks, and one thread at a time uses it.
Spec: docs/protocol/audit-log.md "Journal".
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from keyreeve_common.errors import FailedPrecondition
from keyreeve_common.files import sync_directory
from keyreeve_common.transparency.journal import JournalContent, build_group, read_groups

FILE_MODE = 0o640
_NAME = re.compile(r"\d{20}")
_MAX_GROUP = 65_536  # records
Seal = Callable[[bytes], bytes]  # of a group: see keyreeve_common.transparency.journal


class JournalFile:
    """`first` is the index of the first record, `count` how many there are, `length` their bytes on disk."""

    def __init__(self, path: Path, descriptor: int, seal: Seal, *, first: int, count: int, length: int) -> None:
        self.path = path
        self.first = first
        self.count = count
        self.length = length
        self._descriptor = descriptor
        self._seal = seal

    def append(self, entries: Sequence[bytes]) -> None:
        """Adds one group. Raises: OSError, and then nothing was added."""
        data = build_group(self.first + self.count, entries, self._seal)
        try:
            view, at = memoryview(data), self.length
            while view:
                written = os.pwrite(self._descriptor, view, at)
                view, at = view[written:], at + written
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self.length)
            raise
        self.length += len(data)
        self.count += len(entries)

    def sync(self) -> None:
        """Raises: OSError. Then nobody knows what of the file is on disk: write it anew with `create_journal`."""
        os.fdatasync(self._descriptor)

    def take_back(self, entries: int, length: int) -> None:
        """Forgets the last group, to what was there before it."""
        self.count -= entries
        self.length = length
        with suppress(OSError):
            os.ftruncate(self._descriptor, length)

    def mend(self, torn: bytes) -> None:
        """Cuts what a crash tore, and keeps it aside; removes older journals that this one replaced. Raises: OSError."""
        directory = self.path.parent
        if torn:
            _keep(directory / f"torn-{self.first + self.count:020d}-{len(torn)}", torn)
            os.ftruncate(self._descriptor, self.length)
        # What a killed signer wrote may not be on disk yet, and the tree that we build on it is to be.
        os.fsync(self._descriptor)
        for old in journal_paths(directory):
            if old < self.path:
                old.unlink()

    def close(self) -> None:
        os.close(self._descriptor)


def create_journal(directory: Path, first: int, entries: Sequence[bytes], seal: Seal) -> JournalFile:
    """A new journal that holds these records, whole and on disk; it takes the place of one of the same name. Raises: OSError."""
    path = directory / f"{first:020d}"
    draft = directory / f".{path.name}.new"
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    journal = JournalFile(path, descriptor, seal, first=first, count=0, length=0)
    try:
        os.fchmod(descriptor, FILE_MODE)
        for at in range(0, len(entries), _MAX_GROUP):
            journal.append(entries[at : at + _MAX_GROUP])
        os.fsync(descriptor)
        draft.rename(path)
        sync_directory(directory)
    except OSError:
        journal.close()
        with suppress(OSError):
            draft.unlink()
        raise
    return journal


def journal_paths(directory: Path) -> list[Path]:
    """The journals, oldest first: a crash may have left one that the next replaces."""
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))


def open_journal(directory: Path, seal: Seal) -> tuple[JournalFile, JournalContent, bytes]:
    """The newest journal, its records, and what was torn at its end. Nothing is changed yet: `mend` does that, once the records are proved.

    Raises: FailedPrecondition when there is none, or it holds a group that the signer did not write; OSError.
    """
    paths = journal_paths(directory)
    if not paths:
        raise FailedPrecondition(
            f"{directory}: the journal is gone; restore it, or move the log away to begin a new one"
        )
    path = paths[-1]
    data = path.read_bytes()
    content = read_groups(data, int(path.name), seal)
    if content.unsealed is not None:
        raise FailedPrecondition(
            f"{path}: this signer did not write what stands there from record {content.unsealed} on: the log was changed from outside; move the"
            " directory away as evidence, then a start begins a new log"
        )
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    journal = JournalFile(path, descriptor, seal, first=content.first, count=len(content.entries), length=content.good)
    return journal, content, data[content.good :]


def _keep(path: Path, torn: bytes) -> None:
    """For who wants to know what was lost. Where there is no room the start goes on without."""
    with suppress(OSError):
        path.write_bytes(torn)
