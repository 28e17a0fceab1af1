"""`keyreeve bench` through the real command: its JSON, what it leaves behind, and how it fails. No figure is asserted."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KEYREEVE = Path(sys.executable).with_name("keyreeve")
TIMEOUT_S = 180


def run_bench(
    *arguments: str | Path, temporary: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [KEYREEVE, "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**os.environ, "TMPDIR": str(temporary), **(environment or {})},
    )


def left_behind(temporary: Path) -> list[str]:
    """Files of the benchmark, and processes that know its folder."""
    found = [str(path) for path in temporary.iterdir()]
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                command = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            if str(temporary).encode() in command:
                found.append(command.decode(errors="replace"))
    return found


def test_smoke_prints_one_json_object_and_leaves_nothing(tmp_path: Path) -> None:
    temporary, saved = tmp_path / "t", tmp_path / "result.json"
    temporary.mkdir()
    done = run_bench("--profile", "smoke", "--output", "json", "--save", saved, temporary=temporary)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert set(result["ratios"]) == {f"{name}_vs_openssl" for name in ("p256", "rsa2048", "ed25519", "p384")}
    assert all(ratio > 0 for ratio in result["ratios"].values())
    assert {"p50", "p99"} <= set(result["latency_ms"])
    assert result["engine"] in {"multibuffer", "openssl"}
    assert all(found["signatures"] > 0 and found["refused"] == 0 for found in result["schemes"].values())
    assert json.loads(saved.read_text()) == result
    assert "starting a key server" in done.stderr
    assert left_behind(temporary) == []


def test_an_interrupt_ends_all_that_was_started(tmp_path: Path) -> None:
    temporary = tmp_path / "t"
    temporary.mkdir()
    process = subprocess.Popen(
        [KEYREEVE, "bench", "--profile", "full", "--part", "ratios", "--output", "json"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "by turns" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0
    assert left_behind(temporary) == []


@pytest.mark.parametrize("module", ["keyreeve_keyserver", "keyreeve_keyserver.signer", "keyreeve_keyserver.frontend"])
def test_a_key_server_that_dies_ends_the_run_without_figures(module: str, tmp_path: Path) -> None:
    temporary, saved = tmp_path / "t", tmp_path / "result.json"
    temporary.mkdir()
    process = subprocess.Popen(
        [KEYREEVE, "bench", "--profile", "full", "--part", "ratios", "--output", "json", "--save", saved],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "by turns" in line:
            break
    os.kill(pid_of(module, temporary), signal.SIGKILL)
    printed, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 3, said
    assert said.splitlines()[-1].startswith("error: unavailable: ")
    assert "key server" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert printed == ""
    assert saved.read_text() == ""
    assert left_behind(temporary) == []


def pid_of(module: str, temporary: Path) -> int:
    """The process that runs `module` of the key server whose configuration stands in this folder."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if module in words and any(word.startswith(str(temporary)) for word in words):
            return int(name)
    raise AssertionError(f"no process runs {module}")


def test_a_file_that_cannot_be_written_costs_no_run(tmp_path: Path) -> None:
    done = run_bench("--profile", "smoke", "--save", tmp_path / "missing" / "result.json", temporary=tmp_path)
    assert done.returncode == 1
    assert "result.json: No such file or directory" in done.stderr
    assert "starting a key server" not in done.stderr


def test_an_unknown_fsync_is_an_error_of_usage(tmp_path: Path) -> None:
    done = run_bench("--profile", "smoke", "--fsync", 'off"\n[listen]', temporary=tmp_path)
    assert done.returncode == 2
    assert "starting a key server" not in done.stderr


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_bench("--profile", "smoke", "--port", port, temporary=tmp_path)
    assert done.returncode == 1
    assert f"port {port} of 127.0.0.1 cannot be used" in done.stderr
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--server-python", "/bin/false"), "ended with 1"),
        (("--profile", "full", "--part", "nothing"), "no part 'nothing'"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_exit_code(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    profile = () if "--profile" in arguments else ("--profile", "smoke")
    done = run_bench(*profile, *arguments, temporary=tmp_path)
    assert done.returncode in {1, 3}
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert left_behind(tmp_path) == []


def test_without_openssl_it_says_what_to_install(tmp_path: Path) -> None:
    done = run_bench("--profile", "smoke", temporary=tmp_path, environment={"PATH": "/nowhere"})
    assert done.returncode == 1
    assert "apt-get install openssl" in done.stderr
