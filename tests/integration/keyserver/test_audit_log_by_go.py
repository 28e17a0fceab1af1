"""An independent verifier reads what the signer publishes: Go's golang.org/x/mod/sumdb, which knows nothing of Keyreeve."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest
from keyreeve_testing.audit import audit_record, write_audit_log

PROGRAM = Path(__file__).parent / "audit_go"
pytestmark = pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed; script/bootstrap brings it")


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("go") / "audit-go"
    subprocess.run(["go", "build", "-o", str(built), "."], cwd=PROGRAM, check=True, timeout=170)
    return built


def verify(verifier: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([verifier, *paths], capture_output=True, text=True, check=False, timeout=60)


def test_go_verifies_the_log_and_its_growth(verifier: Path, tmp_path: Path) -> None:
    log, kept = tmp_path / "log", []
    for number, (first, count) in enumerate([(0, 30), (30, 500), (530, 60)]):
        asyncio.run(write_audit_log(log, count, first=first))
        kept.append(Path(shutil.copy(log / "checkpoint", tmp_path / f"kept{number}")))
    ended = verify(verifier, log, *kept)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "verified 593\n", "")


def test_go_refuses_a_changed_log(verifier: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    asyncio.run(write_audit_log(log, 300))
    bundle = log / "tile/entries/000"
    data = bundle.read_bytes()
    bundle.write_bytes(data.replace(audit_record(7).request_id, audit_record(8).request_id, 1))
    assert data != bundle.read_bytes()
    ended = verify(verifier, log)
    assert ended.returncode == 1
    assert "invalid" in ended.stderr
