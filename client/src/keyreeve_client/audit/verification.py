"""Verification: whether the records that stand in a log are those that its signed checkpoints commit to, all of them and in this order.

It recomputes everything from the records up, and names each record and file that is not as it must be. What it cannot see is a log that was put
back to an older checkpoint of its own, records and all: for that it needs a newer checkpoint that somebody kept, or a witness's cosignature.
Spec: docs/protocol/audit-log.md "Verification"; RFC 6962 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from keyreeve_common.errors import KeyreeveError, NotFound
from keyreeve_common.transparency.checkpoint import Checkpoint, verify_checkpoint, verify_cosignature
from keyreeve_common.transparency.merkle import EMPTY_ROOT, leaf_hash, perfect_root
from keyreeve_common.transparency.note import Note, VerifierKey
from keyreeve_common.transparency.records import parse_record
from keyreeve_common.transparency.tiles import (
    ENTRIES,
    TILE_WIDTH,
    Tile,
    join_entries,
    join_hashes,
    levels_of,
    tiled_subtree,
    tiles_of_level,
)

from keyreeve_client.audit.log_directory import LogDirectory

MAX_FINDINGS = 1_000  # whoever signs a checkpoint can sign one over more records than there are


class Fault(StrEnum):
    CHECKPOINT = "checkpoint"
    CHANGED = "changed"
    MISSING = "missing"
    MALFORMED = "malformed"
    TREE = "tree"
    SHORTER = "shorter"
    WITNESS = "witness"
    JOURNAL = "journal"


@dataclass(frozen=True, slots=True)
class Finding:
    fault: Fault
    detail: str


@dataclass(slots=True)
class Report:
    """`size` records are covered by the checkpoint; `unsigned` stand behind it in the journal; `pruned` were not there to be read."""

    origin: str
    size: int = 0
    root: bytes = EMPTY_ROOT
    checked: int = 0
    unsigned: int = 0
    pruned: int = 0
    cosigned: dict[str, tuple[int, int]] = field(default_factory=dict)  # witness: size, POSIX time
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, fault: Fault, detail: str) -> None:
        self.findings.append(Finding(fault, detail))


def verify_log(
    log: LogDirectory,
    key: VerifierKey,
    *,
    kept: Sequence[tuple[str, bytes]] = (),
    witnesses: Sequence[VerifierKey] = (),
    pruned_before: int = 0,
) -> Report:
    """What there is to say of a log.

    `kept` are checkpoints that were kept elsewhere, with a name to call them by; bundles of records below `pruned_before` may be missing.
    """
    report = Report(key.name)
    notes: list[tuple[Checkpoint, Note]] = []
    try:
        head, note = verify_checkpoint(log.read("checkpoint"), key)
    except KeyreeveError as error:
        report.add(Fault.CHECKPOINT, error.detail)
        return report
    notes.append((head, note))
    report.size, report.root = head.size, head.root
    levels = _Levels(log, head.size, report)
    for bundle in tiles_of_level(ENTRIES, head.size):
        hashes = levels.leaves(Tile(0, bundle.index, bundle.width))
        _check_bundle(log, bundle, hashes, report, pruned_before)
        if len(report.findings) >= MAX_FINDINGS:
            seen = min((bundle.index + 1) * TILE_WIDTH, head.size)
            report.notes.append(
                f"given up after {seen} of {head.size} records: so much is wrong that the rest says no more"
            )
            return report
    levels.check_upper()
    if levels.whole and levels.root() != head.root:
        report.add(Fault.TREE, f"the hashes of {head.size} records do not lead to the root that the checkpoint signs")
    if levels.whole:
        _check_partials(log, levels, report)
    for name, data in kept:
        if (older := _check_kept(name, data, key, levels)) is not None:
            notes.append(older)
    _check_witnesses(witnesses, notes, report)
    _check_journal(log, levels, report)
    return report


class _Levels:
    """The tree as it follows from the tiles of level 0; the stored tiles above are only compared with it."""

    def __init__(self, log: LogDirectory, size: int, report: Report) -> None:
        self._log = log
        self._size = size
        self.report = report
        self._roots: list[list[bytes]] = [[]]  # of level 1 and up
        self._last: list[bytes] = []
        self.whole = True

    def leaves(self, tile: Tile) -> list[bytes] | None:
        """The leaf hashes of one tile; the tiles come in order."""
        try:
            hashes = self._log.hashes(tile)
        except KeyreeveError as error:
            self.report.add(Fault.MISSING if isinstance(error, NotFound) else Fault.TREE, error.detail)
            self.whole = False
            return None
        if len(hashes) != tile.width:
            self.report.add(Fault.TREE, f"{tile.path} has {len(hashes)} hashes, {tile.width} are expected")
            self.whole = False
            return None
        if tile.width == TILE_WIDTH:
            self._roots[0].append(perfect_root(hashes))
        else:
            self._last = hashes
        return hashes

    def check_upper(self) -> None:
        """Computes the levels above and compares the stored tiles with them."""
        if not self.whole:
            return
        for level in levels_of(self._size)[1:]:
            computed = self._roots[level - 1]
            for tile in tiles_of_level(level, self._size):
                self._compare(tile, computed[tile.index * TILE_WIDTH : tile.index * TILE_WIDTH + tile.width])
            whole = range(0, len(computed) - TILE_WIDTH + 1, TILE_WIDTH)
            self._roots.append([perfect_root(computed[at : at + TILE_WIDTH]) for at in whole])

    def _compare(self, tile: Tile, computed: list[bytes]) -> None:
        try:
            stored = self._log.hashes(tile)
        except KeyreeveError as error:
            self.report.add(Fault.MISSING if isinstance(error, NotFound) else Fault.TREE, error.detail)
            return
        if len(stored) != len(computed):
            self.report.add(Fault.TREE, f"{tile.path} has {len(stored)} hashes, {len(computed)} are expected")
        for offset, (one, other) in enumerate(zip(stored, computed, strict=False)):
            if one != other:
                below = Tile(tile.level - 1, tile.index * TILE_WIDTH + offset)
                self.report.add(Fault.TREE, f"{tile.path} and {below.path} do not agree: one of them was changed")

    def root(self) -> bytes:
        return self.root_of(self._size)

    def root_of(self, size: int) -> bytes:
        """The root that the first `size` records had. Raises: NotFound, InvalidRequest."""
        return tiled_subtree(self._hashes)(0, size) if size else EMPTY_ROOT

    def tile(self, tile: Tile) -> list[bytes]:
        """The hashes that this tile must have. Raises: NotFound, InvalidRequest."""
        return self._hashes(tile.level, tile.index)[: tile.width]

    def leaf(self, index: int) -> bytes:
        return self._hashes(0, index // TILE_WIDTH)[index % TILE_WIDTH]

    def _hashes(self, level: int, index: int) -> list[bytes]:
        if level:
            return self._roots[level - 1][index * TILE_WIDTH : (index + 1) * TILE_WIDTH]
        if index == self._size // TILE_WIDTH:
            return self._last
        return self._log.hashes(Tile(0, index))


def _check_bundle(
    log: LogDirectory, bundle: Tile, hashes: list[bytes] | None, report: Report, pruned_before: int
) -> None:
    first = bundle.index * TILE_WIDTH
    try:
        entries = log.entries(bundle)
    except KeyreeveError as error:
        if isinstance(error, NotFound) and first + bundle.width <= pruned_before:
            report.pruned += bundle.width
        else:
            where = f"records {first} to {first + bundle.width - 1}: {error.detail}"
            report.add(Fault.MISSING if isinstance(error, NotFound) else Fault.MALFORMED, where)
        return
    if len(entries) != bundle.width:
        report.add(Fault.MISSING, f"{bundle.path} has {len(entries)} records, {bundle.width} are expected")
    for offset, entry in enumerate(entries):
        report.checked += 1
        if hashes is not None and leaf_hash(entry) != hashes[offset]:
            report.add(Fault.CHANGED, f"record {first + offset} is not the one whose hash is in the tree")
        for fault in _record_faults(entry):
            report.add(Fault.MALFORMED, f"record {first + offset}: {fault}")


def _check_partials(log: LogDirectory, levels: _Levels, report: Report) -> None:
    """The partial tiles of earlier checkpoints, which stay until their tile is full: each is the beginning of what stands there now."""
    for level in (ENTRIES, *levels_of(report.size)):
        for tile in tiles_of_level(level, report.size):
            for width, data in log.partials(tile):
                try:
                    now = (
                        join_entries(log.entries(tile)[:width])
                        if level == ENTRIES
                        else join_hashes(levels.tile(tile)[:width])
                    )
                except KeyreeveError:
                    break  # that is found already
                if data != now:
                    older = Tile(tile.level, tile.index, width)
                    report.add(Fault.TREE, f"{older.path} is not the beginning of what stands there now")


def _record_faults(entry: bytes) -> Iterator[str]:
    try:
        parse_record(entry)
    except KeyreeveError as error:
        yield error.detail


def _check_kept(name: str, data: bytes, key: VerifierKey, levels: _Levels) -> tuple[Checkpoint, Note] | None:
    """A checkpoint that was kept elsewhere, where it is one of this log; whatever is wrong with it is found."""
    report = levels.report
    try:
        older, note = verify_checkpoint(data, key)
    except KeyreeveError as error:
        report.add(Fault.CHECKPOINT, f"{name}: {error.detail}")
        return None
    if older.size > report.size:
        report.add(
            Fault.SHORTER,
            f"{name} is signed over {older.size} records, the log has {report.size}: records were cut off, or an old state put back",
        )
    elif not levels.whole:
        report.notes.append(f"{name} could not be compared: tiles are missing")
    elif levels.root_of(older.size) != older.root:
        report.add(Fault.TREE, f"{name} is signed over {older.size} other records than those that the log begins with")
    return older, note


def _check_witnesses(
    witnesses: Sequence[VerifierKey], notes: Sequence[tuple[Checkpoint, Note]], report: Report
) -> None:
    for witness in witnesses:
        newest: tuple[int, int] | None = None
        for checkpoint, note in notes:
            if not note.signatures_of(witness):
                continue
            try:
                when = verify_cosignature(note, witness)
            except KeyreeveError as error:
                report.add(Fault.WITNESS, error.detail)
                continue
            newest = max(newest or (-1, 0), (checkpoint.size, when))
        if newest is None:
            report.add(Fault.WITNESS, f"no checkpoint has a cosignature of {witness.name}")
        else:
            report.cosigned[witness.name] = newest


def _check_journal(log: LogDirectory, levels: _Levels, report: Report) -> None:
    """The journal repeats the last published records, and holds those that no checkpoint covers yet."""
    try:
        found = log.journal()
    except KeyreeveError as error:
        report.add(Fault.JOURNAL, error.detail)
        return
    if found is None:
        report.notes.append("there is no journal here: records after the checkpoint are not in this copy")
        return
    content, torn = found
    end = content.first + len(content.entries)
    if torn:
        report.notes.append(f"the journal ends in {torn} bytes of a group that is being written, or that a crash tore")
    if end < report.size:
        report.add(Fault.JOURNAL, f"the journal ends at record {end}, before the checkpoint's {report.size}")
    report.unsigned = max(end - report.size, 0)
    for index in range(content.first, end):
        entry = content.entries[index - content.first]
        if index < report.size:
            if levels.whole and leaf_hash(entry) != levels.leaf(index):
                report.add(Fault.JOURNAL, f"record {index} in the journal is not the one that was published")
        else:
            for fault in _record_faults(entry):
                report.add(Fault.MALFORMED, f"record {index} in the journal: {fault}")
