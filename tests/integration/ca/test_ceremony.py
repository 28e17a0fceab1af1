"""`keyreeve init` against a real key server: makes everything once, resumes, repairs, and changes nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography import x509
from keyreeve_testing.keyserver import KeyServerRig


def states(report: list[dict[str, str]]) -> dict[str, str]:
    return {step["step"]: step["state"] for step in report}


def test_init_makes_everything_once_and_then_keeps_it(tmp_path: Path, key_server: KeyServerRig, new_ca: Any) -> None:
    rig = new_ca(tmp_path / "ca", key_server)
    _, first, _ = rig.init()
    assert set(states(first).values()) == {"made", "kept"}
    before = {path.name: path.read_bytes() for path in (rig.directory / "state").iterdir() if path.suffix == ".pem"}
    _, second, _ = rig.init()
    assert set(states(second).values()) == {"kept"}
    assert before == {
        path.name: path.read_bytes() for path in (rig.directory / "state").iterdir() if path.suffix == ".pem"
    }
    assert x509.load_pem_x509_certificates(rig.bundle_pem)
