"""Parts of the full profile that need what only a checkout has: proxies, tokens, databases and the test support that starts them.

Each is a script of its own under bench/, which prints JSON and may be run alone. Where the script, a program or a package is missing the part is
reported as not run, with the reason; a part that fails fails alone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[2]
_PATIENCE_S = 600.0
_END_PATIENCE_S = 20.0
_REASON_CHARACTERS = 300
Figures = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class CheckoutPart:
    """`figures` picks from the script's JSON what targets are judged by, as section -> name -> number."""

    name: str
    arguments: tuple[str, ...]
    figures: Callable[[Mapping[str, Any]], Figures]
    programs: tuple[str, ...] = ()


def _latency(found: Mapping[str, Any]) -> Figures:
    return {"provider_latency_ms": {name: found["lone"][f"{name}_ms"] for name in ("p50", "p99")}}


def _proxies(found: Mapping[str, Any]) -> Figures:
    return {
        "proxies": {
            "p256_vs_local": max(found[f"{kind} ec-p256"]["ratio"] for kind in ("nginx", "haproxy")),
            "rsa2048_vs_local": max(found[f"{kind} rsa-2048"]["ratio"] for kind in ("nginx", "haproxy")),
        }
    }


def _delayed(found: Mapping[str, Any]) -> Figures:
    return {"proxies": {"haproxy_delayed_vs_not": found["ratio"]}}


def _pkcs11(found: Mapping[str, Any]) -> Figures:
    return {
        "pkcs11": {
            "p256_vs_bare": found["ratios"]["backend_throughput"],
            "signer_vs_bare": found["ratios"]["signer_throughput"],
        }
    }


def _vault(found: Mapping[str, Any]) -> Figures:
    return {"vault": {name: float(value) for name, value in found["ratios"].items()}}


def _issuance(found: Mapping[str, Any]) -> Figures:
    best = found["shapes"]["batch"]
    return {
        "issuance": {
            "svids_per_core_second": best["per_core"]["all"],
            "svids_per_ca_core_second": best["per_core"]["ca"],
        }
    }


PARTS = (
    CheckoutPart("node_agent", ("--seconds", "3", "--lone", "1000"), _latency),
    CheckoutPart("node_handshakes", ("--handshakes", "2000"), _proxies, ("nginx", "haproxy")),
    CheckoutPart("node_delay", ("--handshakes", "1500"), _delayed, ("haproxy",)),
    CheckoutPart("pkcs11_pool", ("--rounds", "5"), _pkcs11),
    CheckoutPart("vault_transit", ("--rounds", "3"), _vault),
    CheckoutPart("issuance", ("--count", "2000", "--output", "json"), _issuance),
)


def run_part(part: CheckoutPart) -> tuple[dict[str, Any], Figures]:
    """What the script printed, and its figures; `{"not_run": reason}` and none where it could not be."""
    script = SCRIPTS / f"{part.name}.py"
    if not script.exists():
        return {"not_run": "needs a checkout of Keyreeve: it starts what only the tests' support can"}, {}
    if missing := [
        program for program in part.programs if shutil.which(program, path=f"{os.defpath}:/usr/sbin:/sbin") is None
    ]:
        return {"not_run": f"not installed: {', '.join(missing)}"}, {}
    try:
        found = _output_of([sys.executable, str(script), *part.arguments])
        return found, part.figures(found)
    except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        return {"not_run": f"{type(error).__name__}: {error}"[:_REASON_CHARACTERS]}, {}


def _output_of(command: list[str]) -> dict[str, Any]:
    """The JSON that a script prints. It leads a session, which is ended as a whole. Raises: OSError, ValueError, SubprocessError."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=_PATIENCE_S)
    finally:
        if process.poll() is None:  # interrupted, or out of patience: what it started ends with it, in order
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_END_PATIENCE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode != 0:
        raise ValueError((errors.strip().splitlines() or ["it said nothing"])[-1])
    found: dict[str, Any] = json.loads(output)
    return found
