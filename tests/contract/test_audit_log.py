"""The signer writes the audit log, the client reads it: what one publishes the other verifies, and no change goes unseen.

An independent verifier (Go's golang.org/x/mod/sumdb) reads the same files: tests/integration/keyserver/test_audit_log_by_go.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from keyreeve_client.audit.log_directory import LogDirectory
from keyreeve_client.audit.search import FoundRecord, Query, Unreadable, search_log
from keyreeve_client.audit.verification import Fault, Report, verify_log
from keyreeve_client.cli.__main__ import run
from keyreeve_common.errors import AuditUnavailable
from keyreeve_common.transparency.checkpoint import Checkpoint, verify_checkpoint
from keyreeve_common.transparency.journal import build_group, read_groups
from keyreeve_common.transparency.merkle import leaf_hash
from keyreeve_common.transparency.note import ED25519, VerifierKey, parse_vkey
from keyreeve_common.transparency.records import Mark, Source
from keyreeve_common.transparency.tiles import (
    ENTRIES,
    join_entries,
    join_hashes,
    split_entries,
    split_hashes,
    tiles_of_level,
)
from keyreeve_testing.audit import audit_entry, audit_record, journal_path, open_audit_log, write_audit_log
from keyreeve_testing.disk import small_disk

RECORDS = 700
# What the last checkpoint stands on; other partial tiles are of earlier ones.
CURRENT = {tile.path for level in (ENTRIES, 0, 1) for tile in tiles_of_level(level, RECORDS + 3)}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of 703 records over three starts, with a checkpoint kept from each."""
    directory = tmp_path_factory.mktemp("audit") / "log"
    for number, (first, count) in enumerate([(0, 100), (100, 412), (512, 188)]):
        asyncio.run(write_audit_log(directory, count, first=first))
        shutil.copy(directory / "checkpoint", directory.parent / f"kept-{number}")
    return directory


def verify(directory: Path, **options: Any) -> Report:
    log = LogDirectory(directory)
    return verify_log(log, log.vkey(), **options)


def faults(report: Report) -> set[Fault]:
    return {finding.fault for finding in report.findings}


@pytest.fixture
def log(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "log"))


def test_true_log_verifies(original: Path) -> None:
    kept = [(f"kept-{number}", (original.parent / f"kept-{number}").read_bytes()) for number in range(3)]
    report = verify(original, kept=kept)
    assert report.findings == []
    assert (report.size, report.checked, report.unsigned, report.pruned) == (RECORDS + 3, RECORDS + 3, 0, 0)


def published_files(directory: Path) -> list[Path]:
    """What a log publishes, but not what its own key file and its locks are."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and (path.parent.parts[-1] != "journal") and path.name not in {"lock", "checkpoint.key"}
    )


@settings(max_examples=150, deadline=None, phases=[Phase.generate])
@given(data=st.data())
def test_no_changed_byte_goes_unseen(original: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(published_files(original)))
    content = bytearray(path.read_bytes())
    needed = path.parent == original or str(path.relative_to(original)) in CURRENT
    change = data.draw(st.sampled_from(["flip", "cut", "grow", *["remove"] * needed]))
    if change == "flip":
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    elif change == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif change == "grow":
        content += data.draw(st.binary(min_size=1, max_size=40))
    with changed_file(path, None if change == "remove" else bytes(content)):
        assert _is_refused(original)


@contextmanager
def changed_file(path: Path, content: bytes | None) -> Iterator[None]:
    before = path.read_bytes()
    try:
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        yield
    finally:
        path.write_bytes(before)


def _is_refused(directory: Path, **options: Any) -> bool:
    """As an auditor sees it: a finding, or no verification at all."""
    from keyreeve_common.errors import KeyreeveError

    try:
        return bool(verify(directory, **options).findings)
    except KeyreeveError:
        return True


@settings(max_examples=60, deadline=None, phases=[Phase.generate])
@given(data=st.data())
def test_records_changed_dropped_or_reordered_are_found_though_their_tile_was_changed_too(
    original: Path, data: st.DataObject
) -> None:
    """An attacker who rewrites the bundle and its leaf hashes, and all tiles above as far as they follow."""
    bundle = original / data.draw(st.sampled_from(sorted(path for path in CURRENT if "entries" in path)))
    tile = original / "tile/0" / bundle.relative_to(original / "tile/entries")
    entries = split_entries(bundle.read_bytes())
    change = data.draw(st.sampled_from(["change", "drop", "swap", "double"]))
    at = data.draw(st.integers(0, len(entries) - 2))
    if change == "change":
        entries[at] = audit_record(99_999).to_bytes()
    elif change == "drop":
        del entries[at]
        entries.append(audit_record(99_999).to_bytes())
    elif change == "swap":
        entries[at], entries[at + 1] = entries[at + 1], entries[at]
    else:
        entries[at] = entries[at + 1]
    with changed_file(bundle, join_entries(entries)):
        found = verify(original)
        assert Fault.CHANGED in faults(found)
        with changed_file(tile, join_hashes([leaf_hash(entry) for entry in entries])):
            assert Fault.TREE in faults(verify(original))


def test_the_changed_record_is_named(log: Path) -> None:
    bundle = log / "tile/entries/001"
    entries = split_entries(bundle.read_bytes())
    entries[44] = audit_record(1).to_bytes()
    bundle.write_bytes(join_entries(entries))
    details = [finding.detail for finding in verify(log).findings]
    assert details == ["record 300 is not the one whose hash is in the tree"]


def test_tile_that_does_not_agree_is_named(log: Path) -> None:
    path = log / "tile/0/001"
    hashes = split_hashes(path.read_bytes(), 256)
    hashes[0] = bytes(32)
    path.write_bytes(join_hashes(hashes))
    details = " ".join(finding.detail for finding in verify(log).findings)
    assert "tile/1/000.p/2 and tile/0/001 do not agree" in details
    assert "do not lead to the root" in details


def test_log_cut_off_with_an_older_checkpoint_is_found_by_a_kept_one(original: Path, log: Path) -> None:
    """All files as they were at the second checkpoint: only what somebody kept tells."""
    kept = original.parent / "kept-2"
    shutil.rmtree(log)
    asyncio.run(write_audit_log(log, 0))
    for name in ("log.vkey", "checkpoint"):
        shutil.copy(original.parent / "kept-0" if name == "checkpoint" else original / name, log / name)
    for path in ("tile/0/000", "tile/entries/000"):
        (log / f"{path}.p").mkdir(parents=True, exist_ok=True)
    (log / "tile/0/000.p/101").write_bytes((original / "tile/0/000").read_bytes()[: 101 * 32])
    entries = split_entries((original / "tile/entries/000").read_bytes())[:101]
    (log / "tile/entries/000.p/101").write_bytes(join_entries(entries))
    shutil.rmtree(log / "journal")
    assert verify(log).findings == []
    assert faults(verify(log, kept=[("kept", kept.read_bytes())])) == {Fault.SHORTER}


def test_checkpoint_of_another_history_is_found(tmp_path: Path, original: Path) -> None:
    """The same key signed a fork: whoever kept a checkpoint of one sees it at the other."""
    shutil.copytree(original, tmp_path / "fork")
    asyncio.run(write_audit_log(tmp_path / "fork", 5, first=5_000))
    shutil.copytree(original, tmp_path / "true")
    asyncio.run(write_audit_log(tmp_path / "true", 9, first=RECORDS))
    kept = (tmp_path / "fork/checkpoint").read_bytes()
    report = verify(tmp_path / "true", kept=[("kept", kept)])
    assert faults(report) == {Fault.TREE}
    assert "other records than those that the log begins with" in report.findings[0].detail


def test_pruned_bundles_are_said_and_only_where_allowed(log: Path) -> None:
    (log / "tile/entries/000").unlink()
    report = verify(log)
    assert faults(report) == {Fault.MISSING}
    assert "records 0 to 255" in report.findings[0].detail
    pruned = verify(log, pruned_before=256)
    assert pruned.findings == []
    assert (pruned.pruned, pruned.checked) == (256, RECORDS + 3 - 256)
    (log / "tile/entries/001").unlink()
    assert faults(verify(log, pruned_before=300)) == {Fault.MISSING}


async def test_records_after_the_checkpoint_are_counted_and_found(tmp_path: Path) -> None:
    async with open_audit_log(tmp_path) as opened:
        await opened.append([audit_entry(0), audit_record(1, key_id="other").to_bytes()])
        report = verify(tmp_path)
        assert report.findings == []
        assert (report.size, report.unsigned) == (0, 3)
        found = list(search_log(LogDirectory(tmp_path), Query(key_id="other")))
        assert [(each.index, each.published) for each in found if isinstance(each, FoundRecord)] == [(2, False)]


def unsealed(covered: bytes) -> bytes:
    """What somebody writes who has the directory and not the key."""
    return bytes(32)


def test_changed_journal_is_found(log: Path) -> None:
    path = journal_path(log)
    content = read_groups(path.read_bytes(), int(path.name))
    content.entries[-1] = audit_record(77_777).to_bytes()
    path.write_bytes(build_group(content.first, content.entries, unsealed))
    assert faults(verify(log)) == {Fault.JOURNAL}
    path.write_bytes(build_group(content.first, content.entries[:-1], unsealed))
    assert faults(verify(log)) == {Fault.JOURNAL}


@pytest.mark.parametrize(
    "name", ["checkpoint", "log.vkey", "journal", "tile/0/000", "tile/entries/001", "tile/0/000.p/100"]
)
@pytest.mark.parametrize("put", ["pipe", "device", "directory", "loop", "huge"])
def test_what_is_no_file_of_a_log_is_neither_waited_for_nor_read_without_end(
    log: Path, name: str, put: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = journal_path(log) if name == "journal" else log / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if put == "pipe":
        os.mkfifo(path)
    elif put == "device":
        path.symlink_to("/dev/zero")
    elif put == "directory":
        path.mkdir()
    elif put == "loop":
        path.symlink_to(path.name)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)  # all holes
    code, out, err = keyreeve(capsys, "audit", "verify", log)
    assert code == 1
    assert "FAILED" in out or err.startswith("error: ")
    code, _, _ = keyreeve(capsys, "audit", "search", log, "--event", "none")
    assert code in {0, 1}


def test_checkpoint_over_more_records_than_there_can_be_is_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The owner of the log's key can sign that."""
    key = Ed25519PrivateKey.generate()
    vkey = VerifierKey("example.org/log", key.public_key().public_bytes_raw(), ED25519)
    log = tmp_path / "log"
    log.mkdir()
    (log / "log.vkey").write_text(str(vkey))
    (log / "checkpoint").write_bytes(Checkpoint(vkey.name, 2**62, bytes(32)).sign(vkey, key.sign))
    for command in ("verify", "search"):
        code, out, err = keyreeve(capsys, "audit", command, log)
        assert code == 1
        assert "given up after" in out or "not looked for" in err


def test_search_finds_what_is_asked_for_and_nothing_else(tmp_path: Path) -> None:
    records = [
        audit_record(0),
        audit_record(1, event="refusal", code=16),
        audit_record(2, caller="spiffe://example.org/agent/b", purpose=3, marks=Mark.AUTHORITY),
        audit_record(
            3, source=Source.FRONT_END, event="grant_revoked", details=(("holder", "spiffe://example.org/x"),)
        ),
    ]

    async def write() -> None:
        async with open_audit_log(tmp_path) as opened:
            await opened.append([record.to_bytes() for record in records])

    asyncio.run(write())

    def indices(**criteria: Any) -> list[int]:
        found = search_log(LogDirectory(tmp_path), Query(**criteria))
        return [each.index for each in found if isinstance(each, FoundRecord)]

    assert indices() == [0, 1, 2, 3, 4]
    assert indices(event="refusal") == [2]
    assert indices(result="purpose_mismatch") == [2]
    assert indices(caller="spiffe://example.org/agent/*") == [1, 2, 3, 4]
    assert indices(caller="spiffe://example.org/agent/b") == [3]
    assert indices(purpose="x509_certificate") == [3]
    assert indices(mark=Mark.AUTHORITY) == [3]
    assert indices(mark=Mark.DIGEST) == []
    assert indices(source=Source.FRONT_END) == [4]
    assert indices(request_id=(2).to_bytes(16, "big")) == [3]
    assert indices(key_id="key-1") == [2]
    assert indices(since=records[1].time, until=records[3].time) == [2, 3]


def test_search_says_what_it_could_not_read(log: Path) -> None:
    (log / "tile/entries/001").unlink()
    found = list(search_log(LogDirectory(log), Query()))
    assert [each.detail.split(":")[0] for each in found if isinstance(each, Unreadable)] == ["records 256 to 511"]
    assert len(found) == RECORDS + 3 - 256 + 1


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    path = tmp_path / "witness.pem"
    path.touch(mode=0o600)
    path.write_bytes(Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


def keyreeve(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_witness_keeps_to_the_key_that_it_saw_first(
    log: Path, witness: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever has the directory puts a key of his own there, and signs the tree with it, for the witness's line below it."""
    state = tmp_path / "state"
    cosign = ("audit", "cosign", log, "--key", witness, "--name", "example.org/witness", "--state", state)
    assert keyreeve(capsys, *cosign)[0] == 0
    own = Ed25519PrivateKey.generate()
    true = parse_vkey((log / "log.vkey").read_text())
    head, _ = verify_checkpoint((log / "checkpoint").read_bytes(), true)
    forged = VerifierKey(true.name, own.public_key().public_bytes_raw())
    kept = [(path, path.read_bytes()) for path in (log / "log.vkey", log / "checkpoint")]
    (log / "log.vkey").write_text(f"{forged}\n")
    (log / "checkpoint").write_bytes(head.sign(forged, own.sign))
    code, out, err = keyreeve(capsys, *cosign)
    assert (code != 0, out) == (True, "")
    assert "somebody put another log or key there" in err
    for path, data in kept:
        path.write_bytes(data)
    assert keyreeve(capsys, *cosign)[0] == 0


def test_witness_cosigns_growth_and_nothing_else(
    log: Path, witness: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, name = tmp_path / "state", "example.org/witness"
    cosign = ("audit", "cosign", log, "--key", witness, "--name", name, "--state", state)
    code, first, _ = keyreeve(capsys, *cosign)
    assert code == 0
    kept = tmp_path / "cosigned"
    kept.write_text(first)
    vkey = keyreeve(capsys, "audit", "witness-key", "--key", witness, "--name", name)[1].strip()
    assert parse_vkey(vkey).name == name
    earlier = tmp_path / "earlier"
    shutil.copytree(log, earlier)
    asyncio.run(write_audit_log(log, 300, first=RECORDS))
    assert keyreeve(capsys, *cosign)[0] == 0
    code, out, _ = keyreeve(capsys, "audit", "verify", log, "--checkpoint", kept, "--witness", vkey)
    assert code == 0
    assert f"cosigned  {name}: {RECORDS + 3} records" in out
    code, out, _ = keyreeve(capsys, "audit", "verify", log, "--witness", vkey)
    assert code == 1
    assert "no checkpoint has a cosignature of example.org/witness" in out
    # The log is put back to what it was: this witness saw more.
    code, out, err = keyreeve(capsys, "audit", "cosign", earlier, *cosign[3:])
    assert (code, out) == (1, "")
    assert "an old state put back" in err
    # And a fork of the same size as what it saw.
    asyncio.run(write_audit_log(earlier, 300, first=9_000))
    code, out, err = keyreeve(capsys, "audit", "cosign", earlier, *cosign[3:])
    assert (code, out) == (1, "")
    assert "did not grow" in err


def test_forged_cosignature_is_found(
    log: Path, witness: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--key", witness, "--name", "example.org/w", "--state", tmp_path / "state")
    text = keyreeve(capsys, "audit", "cosign", log, *arguments)[1]
    vkey = keyreeve(capsys, "audit", "witness-key", *arguments[:4])[1].strip()
    head, line = text.rsplit(" ", 1)
    forged = line.replace("A", "B", 3) if "A" in line[8:] else "B" + line[1:]
    (tmp_path / "forged").write_text(f"{head} {forged}")
    code, _, _ = keyreeve(capsys, "audit", "verify", log, "--checkpoint", tmp_path / "forged", "--witness", vkey)
    assert code == 1


def test_commands_show_the_log(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = keyreeve(capsys, "audit", "verify", log, "-o", "json")
    report = json.loads(out)
    assert (code, report["result"], report["records"], report["findings"]) == (0, "ok", RECORDS + 3, [])
    code, out, _ = keyreeve(capsys, "audit", "search", log, "--event", "signature", "--key-id", "key-3", "-o", "json")
    found = json.loads(out)
    assert code == 0
    assert {record["key_id"] for record in found} == {"key-3"}
    assert len(found) == RECORDS // 7
    assert keyreeve(capsys, "audit", "search", log, "--mark", "digest", "-o", "json")[1] == "[]\n"
    lines = keyreeve(capsys, "audit", "search", log, "--event", "log_started")[1].splitlines()
    assert len(lines) == 3
    assert "fsync=always" in lines[0]
    (log / "tile/entries/001").write_bytes(b"")
    code, out, _ = keyreeve(capsys, "audit", "verify", log)
    assert code == 1
    assert "FAILED    missing" in out


def test_key_that_was_kept_elsewhere_is_held_against_a_replaced_log(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole other log in its place, with its own key, is true to itself."""
    shutil.copy(log / "log.vkey", tmp_path / "vkey")
    asyncio.run(write_audit_log(tmp_path / "other", 5))
    assert keyreeve(capsys, "audit", "verify", tmp_path / "other")[0] == 0
    code, out, _ = keyreeve(capsys, "audit", "verify", tmp_path / "other", "--vkey", tmp_path / "vkey")
    assert code == 1
    assert "no signature of example.org/audit" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "--mark", "none"),
        ("search", "--source", "nobody"),
        ("search", "--request-id", "abc"),
        ("verify", "--vkey", "/no/such"),
        ("verify", "--witness", "a+b"),
        ("prove", "100000"),
    ],
)
def test_wrong_arguments_are_named(log: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    command, *rest = arguments
    code, out, err = keyreeve(capsys, "audit", command, log, *rest)
    assert code == 1
    assert err.startswith("error: ")
    assert out == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
async def test_full_disk_refuses_and_serves_again_with_nothing_lost(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        accepted: list[int] = []
        async with open_audit_log(disk / "log", checkpoint_records=50) as opened:
            filler = disk / "filler"
            filler.write_bytes(bytes(500_000))
            number, refused = 0, 0
            while refused < 3 and number < 10_000:
                try:
                    await opened.append([audit_entry(number)] * 20)
                    accepted.append(number)
                except AuditUnavailable as error:
                    refused += "no space left" in error.detail
                number += 1
            assert refused == 3, "the disk was never full"
            assert opened.status().state == "unavailable"
            filler.unlink()
            await opened.append([audit_entry(number)])
            accepted += [number]
        report = verify(disk / "log")
        assert report.findings == []
        found = search_log(LogDirectory(disk / "log"), Query(event="signature"))
        seen = [int.from_bytes(each.record.request_id, "big") for each in found if isinstance(each, FoundRecord)]
        assert seen == [each for each in accepted[:-1] for _ in range(20)] + accepted[-1:]


async def test_log_may_be_read_while_it_is_written(tmp_path: Path) -> None:
    source = random.Random(3)  # noqa: S311 - to be repeatable, not secret
    async with open_audit_log(tmp_path, checkpoint_records=37) as opened:
        written = 0
        for _ in range(60):
            count = source.randrange(1, 40)
            await opened.append([audit_entry(written + number) for number in range(count)])
            written += count
            if source.random() < 0.3:
                report = await asyncio.to_thread(verify, tmp_path)
                assert report.findings == []
                found = list(search_log(LogDirectory(tmp_path), Query(event="signature")))
                assert len(found) == written
