"""What Keyreeve is to reach (docs/performance.md), and what a result says of it: reached, not reached by how much, or not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REACHED, NOT_REACHED, NOT_MEASURED = "reached", "not reached", "not measured"


@dataclass(frozen=True, slots=True)
class Target:
    """`path` leads to the figure in the result; it is to be at least `bound`, or at most."""

    name: str
    path: tuple[str, ...]
    bound: float
    unit: str = ""
    at_most: bool = False

    @property
    def wanted(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.bound:g}{self.unit}"


TARGETS = (
    Target("P-256 per server core against openssl speed", ("ratios", "p256_vs_openssl"), 1.5, " x"),
    Target("RSA-2048-PSS per server core against openssl speed", ("ratios", "rsa2048_vs_openssl"), 2.5, " x"),
    Target("Ed25519 per server core against openssl speed", ("ratios", "ed25519_vs_openssl"), 3, " x"),
    Target("P-384 per server core against openssl speed", ("ratios", "p384_vs_openssl"), 20, " x"),
    Target(
        "lone request, sign socket to signature and back, p50", ("provider_latency_ms", "p50"), 0.6, " ms", at_most=True
    ),
    Target(
        "lone request, sign socket to signature and back, p99", ("provider_latency_ms", "p99"), 2, " ms", at_most=True
    ),
    Target("SoftHSM against as many bare processes", ("pkcs11", "p256_vs_bare"), 0.9, " x"),
    Target(
        "X.509-SVIDs per second and core, full batches, PostgreSQL", ("issuance", "svids_per_core_second"), 1000, "/s"
    ),
    Target(
        "proxy CPU per handshake, RSA-2048, against a local key",
        ("proxies", "rsa2048_vs_local"),
        0.5,
        " x",
        at_most=True,
    ),
    Target(
        "proxy CPU per handshake, P-256, against a local key", ("proxies", "p256_vs_local"), 1.3, " x", at_most=True
    ),
    Target(
        "HAProxy async, signer delayed by 50 ms, against no delay", ("proxies", "haproxy_delayed_vs_not"), 0.8, " x"
    ),
    Target("P-256 CPU per signature, gokeyless against Keyreeve", ("gokeyless", "p256"), 5, " x"),
    Target("RSA-2048 CPU per signature, gokeyless against Keyreeve", ("gokeyless", "rsa2048"), 2.5, " x"),
)


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a target: what is wanted, what was measured, the verdict, and measured / wanted."""
    return [_judge(target, _figure(result, target.path)) for target in TARGETS]


def _figure(result: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = result
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _judge(target: Target, measured: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"target": target.name, "wanted": target.wanted, "measured": measured}
    if measured is None:
        return {**row, "verdict": NOT_MEASURED, "share": None}
    reached = measured <= target.bound if target.at_most else measured >= target.bound
    return {**row, "verdict": REACHED if reached else NOT_REACHED, "share": round(measured / target.bound, 3)}
