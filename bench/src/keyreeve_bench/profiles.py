"""The profiles: which parts run, for how long, and what their result looks like."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

from keyreeve_bench.checkout_parts import PARTS, run_part
from keyreeve_bench.generators import Generators
from keyreeve_bench.key_server import BenchKey, KeyServer, KeyServerSettings
from keyreeve_bench.openssl_speed import find_openssl, openssl_version
from keyreeve_bench.ratios import measure_scheme
from keyreeve_bench.schemes import FULL, P256, QUICK, BenchScheme
from keyreeve_bench.targets import judge

OWN_PARTS = ("ratios", "latency")
FULL_PARTS = (*OWN_PARTS, *(part.name for part in PARTS))
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    profile: str
    part: str
    port: int
    fsync: str
    python: str


@dataclass(frozen=True, slots=True)
class Plan:
    """`budget_s` bounds the slices of load, not what the machine makes of starting: they get shorter when time runs out."""

    schemes: tuple[BenchScheme, ...]
    keys: int
    slices: int
    slice_s: float
    lone_s: float
    budget_s: float
    outstanding: int
    rates: tuple[float, ...] = ()  # of the open loop, as shares of what the closed loop reached


PLANS = {
    "smoke": Plan(QUICK, keys=1, slices=1, slice_s=0.2, lone_s=0.2, budget_s=20, outstanding=64),
    "quick": Plan(QUICK, keys=4, slices=2, slice_s=2.0, lone_s=2.0, budget_s=37, outstanding=512),
    "full": Plan(
        FULL, keys=16, slices=5, slice_s=4.0, lone_s=10.0, budget_s=600, outstanding=512, rates=(0.1, 0.3, 0.5, 0.7)
    ),
}
_MIN_SLICE_S, _SPEED_S = 0.5, 1.1
_OPEN_LOOP_S, _RATE_WITHOUT_RATIOS = 5.0, 4_000.0


def run_profile(options: Options, say: Say) -> dict[str, Any]:
    """The whole result. Raises: KeyreeveError; whatever it raises, nothing that it started runs on."""
    began = monotonic()
    plan = PLANS[options.profile]
    result: dict[str, Any] = {"conditions": _conditions(options, plan, openssl := find_openssl())}
    if options.part in {"", *OWN_PARTS}:
        result |= _of_own_server(plan, options, openssl=openssl, say=say, began=began)
    if options.profile == "full":
        _add_checkout_parts(result, options, say)
    result["seconds"] = round(monotonic() - began, 1)
    result["targets"] = judge(result)
    return result


def _of_own_server(plan: Plan, options: Options, *, openssl: str, say: Say, began: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="keyreeve-bench-") as name:
        settings = KeyServerSettings(options.python, port=options.port, fsync=options.fsync)
        say("starting a key server")
        with KeyServer.running(Path(name) / "ks", settings) as server:
            return _measure(server, plan, options, openssl=openssl, say=say, began=began)


def _add_checkout_parts(result: dict[str, Any], options: Options, say: Say) -> None:
    result["parts"] = {}
    for part in PARTS:
        if options.part in {"", part.name}:
            say(f"bench/{part.name}.py")
            result["parts"][part.name], figures = run_part(part)
            for section, numbers in figures.items():
                result.setdefault(section, {}).update(numbers)


def _measure(
    server: KeyServer, plan: Plan, options: Options, *, openssl: str, say: Say, began: float
) -> dict[str, Any]:
    with Generators.running(server, max(os.cpu_count() or 1, 2)) as generators:
        keys = {
            scheme.name: server.make_keys(scheme.key_type, plan.keys, holders=generators.holders)
            for scheme in plan.schemes
        }
        result: dict[str, Any] = {"engine": server.engine()}
        if options.part != "latency":
            result |= _ratios(generators, plan, keys, openssl=openssl, say=say, began=began)
        if options.part != "ratios":
            say("latency of lone requests")
            generators.warm(P256, keys[P256.name])
            lone = generators.lone(P256, keys[P256.name], seconds=plan.lone_s)
            result["latency_ms"] = lone.latencies.summary()
            if plan.rates:
                result["open_loop"] = _open_loop(generators, plan, keys[P256.name], result, say)
    return result


def _open_loop(
    generators: Generators, plan: Plan, keys: list[BenchKey], result: dict[str, Any], say: Say
) -> list[dict[str, Any]]:
    """Latency of P-256 at several offered rates, counted from when each request was to leave."""
    reached = result.get("schemes", {}).get(P256.name, {}).get("signatures_per_second", _RATE_WITHOUT_RATIOS)
    rows = []
    for share in plan.rates:
        rate = round(reached * share)
        say(f"open loop, {rate} requests a second")
        found = generators.open_loop(P256, keys, seconds=_OPEN_LOOP_S, rate=rate)
        rows.append({"rate": rate, "share": share, "codes": dict(found.codes), **found.latencies.summary()})
    return rows


def _ratios(
    generators: Generators,
    plan: Plan,
    keys: dict[str, list[BenchKey]],
    *,
    openssl: str,
    say: Say,
    began: float,
) -> dict[str, Any]:
    measured = []
    for done, scheme in enumerate(plan.schemes):
        say(f"{scheme.name}: load and openssl speed by turns")
        left = len(plan.schemes) - done

        def slice_seconds(left: int = left) -> float:
            """An even share of what is left of the budget, once OpenSSL's slices are taken from it."""
            spare = plan.budget_s - plan.lone_s - (monotonic() - began) - left * (plan.slices + 1) * _SPEED_S
            return min(plan.slice_s, max(spare / (left * plan.slices), min(_MIN_SLICE_S, plan.slice_s)))

        measured.append(
            measure_scheme(
                generators,
                scheme,
                keys[scheme.name],
                openssl=openssl,
                slices=plan.slices,
                slice_seconds=slice_seconds,
                outstanding=plan.outstanding,
            )
        )
    return {
        "ratios": {
            scheme.ratio_name: round(found.ratio, 3) for scheme, found in zip(plan.schemes, measured, strict=True)
        },
        "schemes": {found.name: found.to_json() for found in measured},
    }


def _conditions(options: Options, plan: Plan, openssl: str) -> dict[str, Any]:
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "profile": options.profile,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "openssl": openssl_version(openssl),
        "python": platform.python_version(),
        "audit_fsync": options.fsync,
        "mutual_tls": True,
        "policy": True,
        "purpose_checks": True,
        "keys_per_type": plan.keys,
        "in_flight": plan.outstanding,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
