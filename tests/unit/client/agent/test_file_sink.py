"""Files for proxies: whole at every moment, untouched when nothing changed, kept when anything fails."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from keyreeve_client.agent.file_sink import FileSink, Ownership, SvidFiles
from keyreeve_common.errors import ConfigInvalid, KeyreeveError, StorageFull

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system or gives files away: needs root")
OLD = SvidFiles(b"old chain", b"old key", b"old bundle")
NEW = SvidFiles(b"new chain", b"new key", b"new bundle")


@pytest.fixture
def sink(tmp_path: Path) -> FileSink:
    return FileSink(tmp_path / "web", Ownership())


def read(sink: FileSink) -> SvidFiles:
    """What a proxy sees: it opens the directory once, as a reload does when it resolves `current`."""
    version = (sink.directory / "current").resolve(strict=True)
    return SvidFiles(*((version / name).read_bytes() for name in ("chain.pem", "key.pem", "bundle.pem")))


def test_writes_then_writes_nothing_when_nothing_changed(sink: FileSink) -> None:
    assert sink.publish(OLD)
    before = {path: path.lstat() for path in sink.directory.rglob("*")}
    assert not sink.publish(OLD)
    assert {path: path.lstat().st_mtime_ns for path in sink.directory.rglob("*")} == {
        path: status.st_mtime_ns for path, status in before.items()
    }
    assert read(sink) == OLD
    assert stat.S_IMODE((sink.directory / "current" / "key.pem").stat().st_mode) == 0o644


def test_keeps_the_version_before_for_running_reloads(sink: FileSink) -> None:
    sink.publish(OLD)
    with (sink.directory / "current" / "chain.pem").open("rb") as open_before:
        first = (sink.directory / "current").resolve()
        sink.publish(NEW)
        assert (first / "chain.pem").read_bytes() == b"old chain"
        sink.publish(SvidFiles(b"3", b"3", b"3"))
        assert not first.exists()
        assert open_before.read() == b"old chain"
    assert sorted(path.name for path in sink.directory.iterdir()) == ["current", "v2", "v3"]


def test_a_removed_or_damaged_file_is_written_anew(sink: FileSink) -> None:
    sink.publish(OLD)
    (sink.directory / "current" / "key.pem").unlink()
    assert sink.publish(OLD)
    (sink.directory / "current" / "chain.pem").write_bytes(b"x")
    assert sink.publish(OLD)
    assert read(sink) == OLD


STEPS = (
    "open",
    "write",
    "rename",
    "replace",
    "symlink",
    "mkdir",
    "chmod",
    "chown",
    "fchmod",
    "fsync",
    "unlink",
    "rmdir",
)


def _die_at(step: int) -> None:
    """Makes this process die, as by SIGKILL, instead of its step-th call that touches the file system."""
    left = [step]

    def wrap(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        setattr(os, name, wrap(getattr(os, name)))


def test_a_crash_at_any_step_leaves_the_old_or_the_new(sink: FileSink) -> None:
    sink.publish(SvidFiles(b"0", b"0", b"0"))
    seen: list[SvidFiles] = []
    for step in range(200):
        sink.publish(OLD)
        pid = os.fork()
        if pid == 0:
            _die_at(step)
            sink.publish(NEW)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        seen.append(read(sink))
        assert seen[-1] in (OLD, NEW)
        assert sink.publish(NEW) is (seen[-1] == OLD)
        assert read(sink) == NEW
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert os.waitstatus_to_exitcode(status) == 0
    assert step > 20
    assert seen[0] == OLD
    assert seen[-1] == NEW
    assert len([path for path in sink.directory.iterdir() if path.name.startswith("v")]) == 2


def _read_at(directory: int, name: str) -> bytes:
    with open(os.open(name, os.O_RDONLY, dir_fd=directory), "rb") as file:
        return file.read()


def test_a_reader_never_sees_a_mixture(sink: FileSink) -> None:
    versions = [SvidFiles(*(f"{part} {n}".encode() * 2000 for part in ("chain", "key", "bundle"))) for n in range(30)]
    sink.publish(versions[0])
    pid = os.fork()
    if pid == 0:
        for version in versions:
            sink.publish(version)
        os._exit(0)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        directory = os.open(sink.directory / "current", os.O_RDONLY)
        try:
            parts = [_read_at(directory, name) for name in ("chain.pem", "key.pem", "bundle.pem")]
        except FileNotFoundError:  # we were slower than two versions
            continue
        finally:
            os.close(directory)
        assert SvidFiles(*parts) in versions
    assert read(sink) == versions[-1]


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "tiny"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=755", "none", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=True)


@needs_root
def test_a_full_disk_leaves_the_old_files_and_heals(tiny: Path) -> None:
    sink = FileSink(tiny / "web", Ownership())
    sink.publish(OLD)
    ballast = tiny / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    with pytest.raises(StorageFull, match="nothing was changed"):
        sink.publish(NEW)
    assert read(sink) == OLD
    ballast.unlink()
    assert sink.publish(NEW)
    assert read(sink) == NEW
    assert sorted(path.name for path in sink.directory.iterdir()) == ["current", "v1", "v2"]


@needs_root
def test_ownership(tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "web", Ownership("nobody", "www-data"))
    sink.publish(OLD)
    assert not sink.publish(OLD)
    key = (sink.directory / "current" / "key.pem").stat()
    assert (key.st_uid, key.st_gid, stat.S_IMODE(key.st_mode)) == (65534, 33, 0o640)
    for directory in (sink.directory, (sink.directory / "current").resolve()):
        status = directory.stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, 33, 0o750)


def test_an_unknown_owner_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="no such user or group"):
        FileSink(tmp_path, Ownership("no-such-user-here")).publish(OLD)


def test_a_directory_that_others_may_write_is_refused(sink: FileSink) -> None:
    sink.directory.mkdir()
    sink.directory.chmod(0o777)
    with pytest.raises(ConfigInvalid, match="chmod go-w"):
        sink.publish(OLD)
    assert list(sink.directory.iterdir()) == []


@needs_root
def test_a_directory_of_another_user_is_refused(sink: FileSink) -> None:
    sink.directory.mkdir()
    os.chown(sink.directory, 65534, 65534)
    with pytest.raises(ConfigInvalid, match="chown 0"):
        sink.publish(OLD)


@needs_root
@pytest.mark.parametrize("below", ["web", "tls/web"])
def test_a_link_of_another_user_is_not_followed(tmp_path: Path, below: str) -> None:
    """The proxy's user owns the directory above and points the agent at a directory of root."""
    victim = tmp_path / "victim"
    (victim / "web" / "v1").mkdir(parents=True)
    home = tmp_path / "home"
    home.mkdir()
    link = home / Path(below).parts[0]
    link.symlink_to(victim / "web" if below == "web" else victim)
    for path in (home, link):
        os.chown(path, 65534, 65534, follow_symlinks=False)
    (victim / "web").chmod(0o700)
    sink = FileSink(home / below, Ownership(group="nogroup"))
    with pytest.raises(ConfigInvalid, match="symbolic link of user 65534"):
        sink.publish(OLD)
    with pytest.raises(ConfigInvalid, match="symbolic link of user 65534"):
        sink.withdraw("not assigned")
    assert stat.S_IMODE((victim / "web").stat().st_mode) == 0o700
    assert [path.name for path in (victim / "web").iterdir()] == ["v1"]


@needs_root
def test_a_link_of_the_agent_s_user_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert FileSink(tmp_path / "link" / "web", Ownership()).publish(OLD)


def test_a_file_in_the_way_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyreeveError):
        FileSink(tmp_path / "file" / "web", Ownership()).publish(OLD)


def test_withdrawing_marks_and_keeps(sink: FileSink) -> None:
    assert not sink.withdraw("never written")
    sink.publish(OLD)
    assert sink.withdraw("not assigned")
    assert not sink.withdraw("not assigned")
    assert read(sink) == OLD
    assert (sink.directory / "withdrawn").read_text() == "not assigned\n"
    assert not sink.publish(OLD)
    assert not (sink.directory / "withdrawn").exists()


def test_a_reload_is_due_until_it_was_noted(sink: FileSink) -> None:
    assert not sink.reload_is_due
    sink.publish(OLD)
    sink.note_reload("v1")
    assert not sink.reload_is_due
    sink.publish(NEW)
    assert FileSink(sink.directory, Ownership()).reload_is_due
