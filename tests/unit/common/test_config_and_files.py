"""Configuration files and files on disk: what is accepted, and the one clear line for everything else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
from keyreeve_common.config import load_config, parse_duration
from keyreeve_common.errors import ConfigInvalid, Internal, StorageFull
from keyreeve_common.files import check_secret_file, make_private_directory, read_secret, write_atomic
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.schemes import KeyType


@dataclass(frozen=True)
class Proxy:
    name: str
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    trust_domain: TrustDomain
    ttl: timedelta = timedelta(hours=1)
    admins: tuple[SpiffeId, ...] = ()
    socket: Path = Path("/run/x.sock")
    workers: int = 2
    strict: bool = True
    key_type: KeyType = KeyType.EC_P256
    note: str | None = None
    proxy: tuple[Proxy, ...] = field(default=())


def load(tmp_path: Path, text: str) -> Sample:
    path = tmp_path / "sample.toml"
    path.write_text(text)
    return load_config(Sample, path)


def test_whole_file(tmp_path: Path) -> None:
    sample = load(
        tmp_path,
        """
        trust_domain = "demo.test"
        ttl = "90s"
        admins = ["spiffe://demo.test/admin"]
        socket = "run/sign.sock"
        workers = 4
        strict = false
        key_type = "rsa-2048"
        note = "hello"
        [[proxy]]
        name = "nginx"
        command = ["nginx", "-s", "reload"]
        """,
    )
    assert sample == Sample(
        TrustDomain("demo.test"),
        timedelta(seconds=90),
        (SpiffeId.parse("spiffe://demo.test/admin"),),
        tmp_path.resolve() / "run/sign.sock",
        4,
        strict=False,
        key_type=KeyType.RSA_2048,
        note="hello",
        proxy=(Proxy("nginx", ("nginx", "-s", "reload")),),
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "trust_domain: missing"),
        ('trust_domain = "demo.test"\nsockt = "x"', "sockt: unknown key; known keys here: admins, key_type"),
        ('trust_domain = "Demo"', "trust_domain: ID-08"),
        ('trust_domain = "demo.test"\nttl = "90"', "ttl: '90' is not a duration"),
        ('trust_domain = "demo.test"\nttl = 90', "ttl: a string is expected"),
        ('trust_domain = "demo.test"\nworkers = true', "workers: a whole number is expected"),
        ('trust_domain = "demo.test"\nstrict = 1', "strict: true or false is expected"),
        ('trust_domain = "demo.test"\nkey_type = "dsa"', "key_type: 'dsa' is not one of: ec-p256"),
        ('trust_domain = "demo.test"\nadmins = ["http://x"]', "admins[0]: ID-01"),
        ('trust_domain = "demo.test"\nadmins = "x"', "admins: a list is expected"),
        ('trust_domain = "demo.test"\n[[proxy]]\nnam = "x"', "proxy[0].nam: unknown key"),
        ('trust_domain = "demo.test"\nproxy = ["x"]', "proxy[0]: a table is expected"),
        ("trust_domain = ", "not TOML"),
    ],
)
def test_wrong_file_says_which_key_is_wrong(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        load(tmp_path, text)
    assert problem in caught.value.detail
    assert caught.value.detail.startswith(str(tmp_path / "sample.toml"))


def test_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="no such file"):
        load_config(Sample, tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "value"), [("250ms", 0.25), ("90s", 90), ("10m", 600), ("24h", 86400), ("7d", 604800)]
)
def test_durations(text: str, value: float) -> None:
    assert parse_duration(text) == timedelta(seconds=value)


@pytest.mark.parametrize("text", ["", "5", "-5s", "5 s", "1.5h", "5w", "٣s", "9999999999d", "9" * 5000 + "s"])
def test_not_durations(text: str) -> None:
    with pytest.raises(ConfigInvalid):
        parse_duration(text)


@pytest.mark.parametrize("mode", [0o604, 0o666, 0o620])
def test_secret_open_to_others_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "pin"
    path.write_text("1234\n")
    path.chmod(0o600)
    assert read_secret(path) == b"1234"
    path.chmod(mode)
    with pytest.raises(ConfigInvalid, match="chmod 600") as caught:
        read_secret(path)
    assert "1234" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n", b"x" * 4097])
def test_empty_or_huge_secret_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pin"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigInvalid):
        read_secret(path)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o440])
def test_secret_may_be_for_its_group_to_read(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "pin"
    path.write_text("1234\n")
    path.chmod(mode)
    assert read_secret(path) == b"1234"
    check_secret_file(path)


def test_secret_is_checked_without_being_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pin"
    path.write_text("1234\n")
    path.chmod(0o600)

    def looked_into(*_: object, **__: object) -> None:
        raise AssertionError("the secret was opened")

    monkeypatch.setattr(os, "open", looked_into)
    check_secret_file(path)
    path.chmod(0o604)
    for wrong in (path, tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigInvalid):
            check_secret_file(wrong)


def test_secret_that_is_not_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid):
        read_secret(tmp_path)


def test_secret_that_is_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pin", 0o600)
    with pytest.raises(ConfigInvalid, match="not a regular file"):
        read_secret(tmp_path / "pin")


def test_write_atomic_replaces_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "chain.pem"
    write_atomic(path, b"old")
    write_atomic(path, b"new", mode=0o640)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomic_below_what_is_no_directory_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Internal, match="Not a directory"):
        write_atomic(tmp_path / "file" / "chain.pem", b"new")


def test_write_atomic_writes_into_no_file_that_somebody_laid_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid: list[Path] = []
    real = os.open

    def racing(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            laid.append(path)
            path.write_bytes(b"laid")
            os.link(path, tmp_path / "kept")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", racing)
    with pytest.raises(Internal, match="File exists"):
        write_atomic(tmp_path / "svid.pem", b"private key")
    assert laid
    assert (tmp_path / "kept").read_bytes() == b"laid"


def test_write_atomic_in_two_threads_at_once(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    contents = [letter * 50_000 for letter in (b"a", b"b")]

    def write_often(data: bytes) -> None:
        for _ in range(100):
            write_atomic(path, data)
            assert path.read_bytes() in contents

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write_often, contents))
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    where = tmp_path / "disk"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(where)], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def test_full_disk_is_named_and_the_old_file_stays(small_disk: Path) -> None:
    path = small_disk / "state"
    write_atomic(path, b"old")
    with pytest.raises(StorageFull, match="no space left"):
        write_atomic(path, b"x" * 200_000)
    assert path.read_bytes() == b"old"
    assert list(small_disk.iterdir()) == [path]


def test_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    make_private_directory(tmp_path / "fine")
    assert (tmp_path / "fine").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigInvalid, match="chmod o-w"):
        make_private_directory(tmp_path / "open")
