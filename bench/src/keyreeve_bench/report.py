"""A result as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def text_lines(result: Mapping[str, Any]) -> Iterator[str]:
    conditions = result["conditions"]
    yield f"{conditions['processor']}, {conditions['cores']} cores, {conditions['openssl']}, Python {conditions['python']}"
    yield f"engine {result.get('engine', 'not asked')}; mutual TLS, policy, purpose checks, audit log; audit.fsync {conditions['audit_fsync']}"
    for name, scheme in result.get("schemes", {}).items():
        yield (
            f"{name:8} {scheme['signatures_per_core_second']:>10.0f} signatures per busy core and second, "
            f"openssl {scheme['openssl_per_core_second']:>8.0f}, ratio {scheme['ratio']:.2f}"
        )
    if "latency_ms" in result:
        latency = result["latency_ms"]
        yield f"lone request, agent's client to key server: p50 {latency['p50']} ms, p99 {latency['p99']} ms"
    for row in result.get("open_loop", ()):
        yield f"open loop {row['rate']:>6}/s: p50 {row['p50']} ms, p99 {row['p99']} ms, p99.9 {row['p99.9']} ms"
    for name, part in result.get("parts", {}).items():
        if "not_run" in part:
            yield f"{name}: not run: {part['not_run']}"
    yield ""
    yield from targets_table(result["targets"])


def targets_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown, which reads well in a terminal too."""
    yield "| target | wanted | measured | verdict |"
    yield "|---|---|---|---|"
    for row in rows:
        measured = "" if row["measured"] is None else f"{row['measured']:g}"
        share = "" if row["share"] is None else f" ({row['share']:.0%} of what is wanted)"
        yield f"| {row['target']} | {row['wanted']} | {measured} | {row['verdict']}{share} |"
