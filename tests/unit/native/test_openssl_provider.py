"""The C unit tests of the OpenSSL provider under ASan and UBSan, and what its shared object shows to others."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[3] / "client/openssl-provider"
PROVIDER = Path(os.environ.get("KEYREEVE_PROVIDER_DIR", SOURCE / "build")) / "keyreeve.so"
pytestmark = pytest.mark.native


def output_of(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, timeout=170).stdout


@pytest.fixture
def provider() -> Path:
    if not PROVIDER.is_file():
        pytest.fail(f"{PROVIDER} is missing: run make -C client/openssl-provider", pytrace=False)
    return PROVIDER


def test_c_unit_tests() -> None:
    result = subprocess.run(
        ["make", "-C", str(SOURCE), "test"], capture_output=True, text=True, timeout=170, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_only_the_entry_point_is_exported(provider: Path) -> None:
    defined = output_of("nm", "--dynamic", "--defined-only", provider).split()[2::3]
    assert defined == ["OSSL_provider_init"]


def test_the_shared_object_is_hardened(provider: Path) -> None:
    dynamic = output_of("readelf", "--dynamic", "--program-headers", "--wide", provider)
    assert "BIND_NOW" in dynamic or "NOW" in dynamic
    assert "GNU_RELRO" in dynamic
    assert "RWE" not in dynamic
    assert "__stack_chk_fail" in output_of("nm", "--dynamic", "--undefined-only", provider)
