"""The log on disk: what was appended is there after any end, what was not is nowhere, and a log that was changed is not gone on with."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from keyreeve_common.errors import AuditUnavailable, ConfigInvalid, FailedPrecondition, TokenUnavailable
from keyreeve_common.files import sync_directory
from keyreeve_common.transparency.checkpoint import Checkpoint, verify_checkpoint
from keyreeve_common.transparency.journal import build_group, read_groups
from keyreeve_common.transparency.merkle import leaf_hash, tree_root
from keyreeve_common.transparency.note import parse_vkey
from keyreeve_common.transparency.records import AuditRecord, parse_record
from keyreeve_common.transparency.tiles import ENTRIES, Tile, split_entries, split_hashes, tiles_of_level
from keyreeve_keyserver.audit import file_log, journal_file, log_files
from keyreeve_keyserver.audit.config import AuditConfig, FsyncPolicy
from keyreeve_keyserver.audit.file_log import FileAuditLog
from keyreeve_keyserver.audit.tree import GrowingTree
from keyreeve_testing.audit import audit_entry, audit_record, journal_path, open_audit_log, write_audit_log


def published(directory: Path) -> tuple[Checkpoint, list[AuditRecord]]:
    """The checkpoint and all records that it covers, which lead to its root."""
    vkey = parse_vkey((directory / "log.vkey").read_text())
    head, _ = verify_checkpoint((directory / "checkpoint").read_bytes(), vkey)
    entries: list[bytes] = []
    for bundle in tiles_of_level(ENTRIES, head.size):
        found = split_entries((directory / bundle.path).read_bytes())
        assert len(found) == bundle.width
        entries += found
    hashes: list[bytes] = []
    for tile in tiles_of_level(0, head.size):
        hashes += split_hashes((directory / tile.path).read_bytes(), tile.width)
    assert hashes == [leaf_hash(entry) for entry in entries]
    assert tree_root(hashes) == head.root
    return head, [parse_record(entry) for entry in entries]


def journaled(directory: Path) -> list[AuditRecord]:
    path = journal_path(directory)
    return [parse_record(entry) for entry in read_groups(path.read_bytes(), int(path.name)).entries]


def numbers(records: list[AuditRecord]) -> list[int]:
    return [int.from_bytes(record.request_id, "big") for record in records if record.event == "signature"]


@pytest.mark.parametrize("sizes", [[0], [1], [254], [255], [256], [700], [3, 5, 300, 1, 600], [255, 255, 255]])
async def test_every_record_is_published_and_a_restart_goes_on(tmp_path: Path, sizes: list[int]) -> None:
    total = 0
    for size in sizes:
        await write_audit_log(tmp_path / "log", size, first=total)
        total += size
        head, records = published(tmp_path / "log")
        assert numbers(records) == list(range(total))
        assert head.size == len(records)
    assert [record.event for record in records if record.event != "signature"] == ["log_started"] * len(sizes)


async def test_partial_tiles_go_when_the_full_one_is_there(tmp_path: Path) -> None:
    await write_audit_log(tmp_path, 100)
    assert (tmp_path / "tile/0/000.p/101").exists()
    await write_audit_log(tmp_path, 200)
    assert (tmp_path / "tile/0/000").exists()
    assert not (tmp_path / "tile/0/000.p").exists()
    assert not (tmp_path / "tile/entries/000.p").exists()
    assert (tmp_path / "tile/1/000.p/1").exists()


def test_growing_tree_is_the_tree() -> None:
    tree, leaves, full = GrowingTree(), [], []
    sizes = itertools.cycle((1, 3, 255, 256, 257, 700, 4_000))
    while len(leaves) < 140_000:
        new = [number.to_bytes(32, "big") for number in range(len(leaves), len(leaves) + next(sizes))]
        leaves += new
        full += tree.extend(new)
        assert tree.size == len(leaves)
    assert tree.root() == tree_root(leaves)
    tiles = [found.tile for found in full]
    assert [tile.index for tile in tiles if tile.level == 0] == list(range(len(leaves) // 256))
    assert [tile.index for tile in tiles if tile.level == 1] == list(range(len(leaves) // 65_536))
    assert tuple(leaves[256:512]) == next(found.hashes for found in full if found.tile == Tile(0, 1))


@pytest.mark.parametrize("size", [1, 255, 256, 257, 65_535, 65_536, 65_537])
def test_growing_tree_is_the_tree_at_its_edges(size: int) -> None:
    tree, leaves = GrowingTree(), [number.to_bytes(32, "big") for number in range(size)]
    tree.extend(leaves[:-1])
    tree.extend(leaves[-1:])
    assert tree.root() == tree_root(leaves)


async def test_appends_that_come_together_share_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    commit = log_files.LogFiles.commit

    def counted(self: log_files.LogFiles, entries: list[bytes]) -> None:
        groups.append(len(entries))
        commit(self, entries)

    monkeypatch.setattr(log_files.LogFiles, "commit", counted)
    async with open_audit_log(tmp_path) as log:
        await asyncio.gather(*(log.append([audit_entry(number)]) for number in range(100)))
    assert sum(groups) == 101
    assert len(groups) < 10
    assert sorted(numbers(published(tmp_path)[1])) == list(range(100))


@pytest.mark.parametrize("policy", FsyncPolicy)
async def test_each_policy_syncs_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: FsyncPolicy
) -> None:
    synced, real = asyncio.Event(), os.fdatasync
    loop, count = asyncio.get_running_loop(), [0]

    def fdatasync(descriptor: int) -> None:
        count[0] += 1
        real(descriptor)
        loop.call_soon_threadsafe(synced.set)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    async with open_audit_log(tmp_path, fsync=policy) as log:
        await log.append([audit_entry(0)])
        if policy is FsyncPolicy.ALWAYS:
            assert count[0] >= 1
        elif policy is FsyncPolicy.INTERVAL:
            await asyncio.wait_for(synced.wait(), 10)
        else:
            assert count[0] == 0
    assert count[0] >= 1, "a checkpoint is never signed over what is not on disk"


async def test_what_was_torn_off_is_cut_kept_and_reported(tmp_path: Path) -> None:
    log = tmp_path / "log"
    await write_audit_log(log, 300)
    torn = journal_path(log).read_bytes()[:30]
    with journal_path(log).open("ab") as file:
        file.write(torn)
    await write_audit_log(log, 1, first=300)
    _, records = published(log)
    assert numbers(records) == list(range(301))
    (repaired,) = [record for record in records if record.event == "log_repaired"]
    assert dict(repaired.details) == {"records": "301", "torn_bytes": "30"}
    assert (log / "journal" / f"torn-{301:020d}-30").read_bytes() == torn


async def test_any_cut_after_the_checkpoint_leaves_whole_groups(tmp_path: Path) -> None:
    """The journal as a crash may leave it: cut anywhere, or with another end."""
    await write_audit_log(tmp_path / "log", 20)
    shutil.copytree(tmp_path / "log", tmp_path / "before")
    signed = journal_path(tmp_path / "log").stat().st_size
    async with open_audit_log(tmp_path / "log") as log:
        for number in range(20, 40):
            await log.append([audit_entry(number)])
        whole = journal_path(tmp_path / "log").read_bytes()
    source = random.Random(1)  # noqa: S311 - to be repeatable, not secret
    for round_ in range(40):
        cut = source.randrange(signed, len(whole))
        copy = tmp_path / f"copy{round_}"
        shutil.copytree(tmp_path / "before", copy)
        end = source.choice([b"", bytes(64), source.randbytes(40)])
        journal_path(copy).write_bytes(whole[:cut] + end)
        await write_audit_log(copy, 0)
        found = numbers(published(copy)[1])
        assert found == list(range(len(found)))
        assert 20 <= len(found) < 40


async def test_records_after_the_checkpoint_are_published_at_the_next_start(tmp_path: Path) -> None:
    async with open_audit_log(tmp_path / "log") as log:
        await log.append([audit_entry(number) for number in range(600)])
        shutil.copytree(tmp_path / "log", tmp_path / "killed")
    assert published(tmp_path / "killed")[0].size == 0
    await write_audit_log(tmp_path / "killed", 0)
    assert numbers(published(tmp_path / "killed")[1]) == list(range(600))


async def test_crash_between_tiles_and_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keyreeve_keyserver.audit import publication

    def broken(path: Path, data: bytes, **_: Any) -> None:
        raise OSError(errno.EIO, "cut off here")

    log = tmp_path / "log"
    await write_audit_log(log, 100)
    async with open_audit_log(log) as opened:
        await opened.append([audit_entry(number) for number in range(100, 700)])
        monkeypatch.setattr(publication, "replace_file", broken)
    monkeypatch.undo()
    assert published(log)[0].size == 101
    assert (log / "tile/0/001").exists()
    await write_audit_log(log, 0)
    assert numbers(published(log)[1]) == list(range(700))


@pytest.mark.parametrize("cut", ["group", "everything", "file"])
async def test_log_shorter_than_its_checkpoint_is_not_gone_on_with(tmp_path: Path, cut: str) -> None:
    await write_audit_log(tmp_path, 10)
    await write_audit_log(tmp_path, 10, first=10)
    path = journal_path(tmp_path)
    if cut == "file":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if cut == "group" else b"")
    with pytest.raises(FailedPrecondition, match=r"records are missing|journal is gone"):
        await write_audit_log(tmp_path, 1)
    if cut == "group":
        assert len(list((tmp_path / "journal").iterdir())) == 1, "evidence is left as it was found"


async def test_log_of_other_records_than_its_checkpoint_is_not_gone_on_with(tmp_path: Path) -> None:
    await write_audit_log(tmp_path / "one", 300)
    await write_audit_log(tmp_path / "other", 300, first=1_000)
    shutil.copy(journal_path(tmp_path / "other"), journal_path(tmp_path / "one"))
    with pytest.raises(FailedPrecondition, match="did not write what stands there from record 0 on"):
        await write_audit_log(tmp_path / "one", 1)


async def test_log_that_forked_from_its_checkpoint_is_not_gone_on_with(tmp_path: Path) -> None:
    """Its own journal, of a copy that went another way: each group is the signer's, and the checkpoint is of others."""
    await write_audit_log(tmp_path / "one", 3)
    shutil.copytree(tmp_path / "one", tmp_path / "fork")
    await write_audit_log(tmp_path / "one", 300, first=100)
    await write_audit_log(tmp_path / "fork", 300, first=1_000)
    shutil.copy(journal_path(tmp_path / "fork"), journal_path(tmp_path / "one"))
    with pytest.raises(FailedPrecondition, match="does not match its last signed checkpoint"):
        await write_audit_log(tmp_path / "one", 1)


@pytest.mark.parametrize("seal", [bytes(32), None], ids=["none", "of another group"])
async def test_record_that_somebody_wrote_into_the_journal_is_never_signed(tmp_path: Path, seal: bytes | None) -> None:
    """Whoever has the directory adds a record behind the last checkpoint while no signer runs: with a good checksum, and no key for the seal."""
    await write_audit_log(tmp_path, 5)
    path = journal_path(tmp_path)
    whole = path.read_bytes()
    content = read_groups(whole, int(path.name))
    seal = whole[20:52] if seal is None else seal
    forged = audit_record(666, caller="spiffe://example.org/innocent").to_bytes()
    path.write_bytes(whole + build_group(content.first + len(content.entries), [forged], lambda _: seal))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(FailedPrecondition, match="did not write what stands there from record 6 on"):
        await write_audit_log(tmp_path, 1)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    path.write_bytes(whole)
    await write_audit_log(tmp_path, 1, first=5)
    assert numbers(published(tmp_path)[1]) == list(range(6))


async def test_checkpoint_that_is_gone_or_forged_stops_the_start(tmp_path: Path) -> None:
    await write_audit_log(tmp_path / "log", 3)
    for name in ("log", "other"):
        if name == "other":
            await write_audit_log(tmp_path / "other", 5)
            shutil.copy(tmp_path / "other/checkpoint", tmp_path / "log/checkpoint")
            expected = "no signature of"
        else:
            (tmp_path / "log/checkpoint").unlink()
            expected = "is gone"
        with pytest.raises(FailedPrecondition, match=expected):
            await write_audit_log(tmp_path / "log", 1)


async def test_tile_that_says_otherwise_is_never_overwritten(tmp_path: Path) -> None:
    await write_audit_log(tmp_path, 10)
    forged = tmp_path / "tile/entries/000.p/22"
    forged.write_bytes(b"something else")
    async with open_audit_log(tmp_path) as log:
        await log.append([audit_entry(number) for number in range(10, 20)])
    assert forged.read_bytes() == b"something else"
    assert published(tmp_path)[0].size == 11


async def test_long_journal_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_files, "MAX_JOURNAL_BYTES", 1_000)
    await write_audit_log(tmp_path, 1_000)
    assert journal_path(tmp_path).name == f"{768:020d}"
    assert len(list((tmp_path / "journal").iterdir())) == 1
    await write_audit_log(tmp_path, 300, first=1_000)
    assert numbers(published(tmp_path)[1]) == list(range(1_300))


async def test_new_journal_that_may_not_be_on_disk_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sync of its directory fails after the rename. A start would read the new one, so that nothing may go into the old one any more."""
    monkeypatch.setattr(log_files, "MAX_JOURNAL_BYTES", 1_000)
    broken = [True]

    def failing(path: Path) -> None:
        if broken[0] and path.name == "journal" and len(journal_file.journal_paths(path)) > 1:
            raise OSError(errno.EIO, "no")
        sync_directory(path)

    monkeypatch.setattr(journal_file, "sync_directory", failing)
    async with open_audit_log(tmp_path / "log", checkpoint_records=600) as log:
        await log.append([audit_entry(number) for number in range(700)])
        async with asyncio.timeout(20):
            while len(journal_file.journal_paths(tmp_path / "log/journal")) < 2:
                await asyncio.sleep(0.01)
        broken[0] = False
        await until_appended(log, 700)
        shutil.copytree(tmp_path / "log", tmp_path / "killed")
    await write_audit_log(tmp_path / "killed", 0)
    assert numbers(published(tmp_path / "killed")[1]) == list(range(701))


async def test_two_signers_never_share_a_log(tmp_path: Path) -> None:
    async with open_audit_log(tmp_path):
        with pytest.raises(FailedPrecondition, match="another signer"):
            await write_audit_log(tmp_path, 1)
    await write_audit_log(tmp_path, 1)


async def test_key_is_sealed_and_of_this_log_only(tmp_path: Path) -> None:
    await write_audit_log(tmp_path, 1)
    assert (tmp_path / "checkpoint.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FailedPrecondition, match="another key-encryption key"):
        await write_audit_log(tmp_path, 1, kek=b"\x01" * 32)
    with pytest.raises(FailedPrecondition, match="another log"):
        await write_audit_log(tmp_path, 1, origin="example.org/renamed")
    await write_audit_log(tmp_path, 1, origin="")  # the name that it has is kept
    (tmp_path / "checkpoint.key").unlink()
    with pytest.raises(FailedPrecondition, match=r"checkpoint\.key: the key of this log's checkpoints is gone"):
        await write_audit_log(tmp_path, 1)


async def test_key_encryption_key_that_is_away_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import UTC, datetime

    from keyreeve_keyserver.domain.secret import Secret
    from keyreeve_keyserver.signer.sealing import PassphraseKey

    class Away(PassphraseKey):
        away = True

        async def encrypt(self, nonce: bytes, associated: bytes, data: bytes) -> bytes:
            if self.away:
                raise TokenUnavailable("the token is away")
            return await super().encrypt(nonce, associated, data)

    monkeypatch.setattr(file_log, "_OPEN_AGAIN_S", 0.02)
    kek = Away(Secret(bytes(32)))
    log = FileAuditLog(AuditConfig(tmp_path), kek, now=lambda: datetime(2026, 1, 1, tzinfo=UTC))
    await log.start()
    with pytest.raises(AuditUnavailable, match="the token is away"):
        await log.append([audit_entry(0)])
    assert log.status().state == "unavailable"
    kek.away = False
    await until_appended(log, 0)
    await log.close()
    assert numbers(published(tmp_path)[1]) == [0]


async def until_appended(log: FileAuditLog, number: int) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                return await log.append([audit_entry(number)])
            except AuditUnavailable:
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
async def test_disk_that_fails_refuses_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    real = getattr(os, call)

    def failing(*arguments: Any) -> Any:
        if call == "pwrite":  # half of it is written before the disk is full
            real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], arguments[2])
        raise OSError(code, os.strerror(code))

    async with open_audit_log(tmp_path) as log:
        await log.append([audit_entry(0)])
        monkeypatch.setattr(os, call, failing)
        for number in (1, 2):
            with pytest.raises(AuditUnavailable, match="nothing is signed that cannot be recorded") as caught:
                await log.append([audit_entry(number)] * 3)
            assert caught.value.retry_after
        assert log.status().state == "unavailable"
        assert numbers(journaled(tmp_path)) == [0]
        monkeypatch.undo()
        await log.append([audit_entry(3)])
        assert log.status().state == "ok"
    assert numbers(published(tmp_path)[1]) == [0, 3]
    assert numbers(journaled(tmp_path)) == [0, 3]


async def test_checkpoints_that_cannot_be_published_are_caught_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(log_files, "publish", full)
    await write_audit_log(tmp_path, 10)
    assert published(tmp_path)[0].size == 0
    monkeypatch.setattr(file_log, "MAX_WAITING_BYTES", 100)
    async with open_audit_log(tmp_path) as log:
        with pytest.raises(AuditUnavailable, match="too many records wait"):
            await log.append([audit_entry(11)])
    monkeypatch.undo()
    await write_audit_log(tmp_path, 1, first=10)
    assert numbers(published(tmp_path)[1]) == list(range(11))


async def test_who_gives_up_waiting_takes_nobody_along(tmp_path: Path) -> None:
    async with open_audit_log(tmp_path) as log:
        waiting = [asyncio.create_task(log.append([audit_entry(number)])) for number in range(10)]
        await asyncio.sleep(0)
        waiting[3].cancel()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in ended if result is not None] == [asyncio.CancelledError]
        await log.append([audit_entry(10)])
    found = numbers(published(tmp_path)[1])
    assert set(found) - {3} == set(range(11)) - {3}


async def test_closed_log_takes_nothing(tmp_path: Path) -> None:
    async with open_audit_log(tmp_path) as log:
        pass
    with pytest.raises(AuditUnavailable, match="closed"):
        await log.append([audit_entry(0)])


@pytest.mark.parametrize("wrong", [{"origin": "a b"}, {"checkpoint_records": 0}])
def test_config_is_checked(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigInvalid):
        AuditConfig(tmp_path, **wrong)
