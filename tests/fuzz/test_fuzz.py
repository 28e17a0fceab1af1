"""Every fuzz target runs for two seconds with the suite, from a fixed seed; longer runs: `python tests/fuzz/fuzz_X.py --seconds 60`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("path", sorted(HERE.glob("fuzz_*.py")), ids=lambda path: path.stem)
def test_target_finds_nothing(path: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [
            sys.executable,
            str(path),
            "--engine",
            "mutation",
            "--seconds",
            "2",
            "--seed",
            "1",
            "--findings",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    accepted = re.search(r"(\d+) of them accepted", ended.stdout)
    assert accepted is not None
    assert int(accepted[1]) > 0, "the target never got past the first check"
