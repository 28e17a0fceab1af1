"""The demo is a test too: everything starts, a page comes over mutual TLS, four promises are kept, nothing is left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from keyreeve_testing.softhsm import softhsm_is_installed
from keyreeve_testing.stack import NGINX, PROVIDER, REPOSITORY, Stack, StackConfig, StackFailed

pytestmark = [
    pytest.mark.native,
    pytest.mark.softhsm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not softhsm_is_installed() or not Path(NGINX).exists(), reason="needs softhsm2 and nginx"),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.CompletedProcess[str]]:
    assert PROVIDER.is_file(), "run make -C client/openssl-provider"
    directory = tmp_path_factory.mktemp("demo") / "files"
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "deploy/demo/demo.py"), "--dir", str(directory)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    yield done
    shutil.rmtree(directory.parent)


def test_every_promise_is_kept(demo: subprocess.CompletedProcess[str]) -> None:
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert demo.stdout.count(" KEPT ") == 4
    assert "4 of 4 promises kept" in demo.stdout


def test_the_page_and_the_table_say_where_the_keys_are(demo: subprocess.CompletedProcess[str]) -> None:
    assert "served by nginx, which holds no private key" in demo.stdout
    assert "token keyreeve-demo" in demo.stdout
    assert "KEYREEVE KEY REFERENCE" in demo.stdout


def test_refusals_name_their_rule(demo: subprocess.CompletedProcess[str]) -> None:
    assert "a certificate request, declared as one: refused, purpose_not_permitted" in demo.stdout
    assert "a certificate request, declared as a handshake: refused, purpose_mismatch" in demo.stdout


def test_no_process_and_no_socket_is_left(demo: subprocess.CompletedProcess[str]) -> None:
    marks = [line.split("/log", 1)[0] for line in demo.stdout.splitlines() if "key.pem" in line]
    directory = marks[0].split(": ", 1)[1].split("/proxies", 1)[0].encode()
    left = [
        path.name
        for path in Path("/proc").iterdir()
        if path.name.isdigit() and int(path.name) != os.getpid() and directory in _command_line(path)
    ]
    assert not left


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_a_directory_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    with pytest.raises(StackFailed, match="was not made by this program"):
        Stack(StackConfig(directory=tmp_path)).prepare()
    assert precious.read_text() == "mine"


def test_a_directory_of_an_earlier_run_is_made_anew(tmp_path: Path) -> None:
    directory = tmp_path / "stack"
    for _ in range(2):
        stack = Stack(StackConfig(directory=directory))
        stack.prepare()
        stack.close()
        assert (directory / "etc" / "agent.toml").is_file()
        assert not stack.run_dir.exists()
