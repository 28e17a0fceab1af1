"""docs/performance.md and its picture, from a saved result: figures in the page are never typed by hand.

`python -m keyreeve_bench.page RESULT.json docs/performance.md` replaces what stands between the markers and writes performance.svg beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from keyreeve_bench.report import targets_table

BEGIN, END = "<!-- bench: begin -->\n", "<!-- bench: end -->\n"
_WIDTH, _ROW, _LABEL, _SCALE_END = 640, 26, 150, 90


def page_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Markdown."""
    conditions = result["conditions"]
    yield (
        f"{conditions['at'][:10]}, {conditions['processor']}, {conditions['cores']} cores, {conditions['openssl'].split(' (')[0]}, "
        f"Python {conditions['python']}, engine `{result['engine']}`, `audit.fsync = {conditions['audit_fsync']}`, "
        f"load average before {conditions['load_average_before']}."
    )
    yield ""
    yield "| scheme | signatures per busy core and second | `openssl speed` per core | ratio | CPU per signature |"
    yield "|---|---|---|---|---|"
    for name, found in result["schemes"].items():
        yield (
            f"| {name} | {found['signatures_per_core_second']:,.0f} | {found['openssl_per_core_second']:,.0f} "
            f"| {found['ratio']:.2f} | {found['server_cpu_us_per_signature']:.1f} µs |"
        )
    yield ""
    latency = result["latency_ms"]
    yield f"Lone requests, agent's client to key server: p50 {latency['p50']} ms, p99 {latency['p99']} ms, p99.9 {latency['p99.9']} ms."
    if result.get("open_loop"):
        yield ""
        yield "| offered, open loop | p50 | p99 | p99.9 |"
        yield "|---|---|---|---|"
        for row in result["open_loop"]:
            yield f"| {row['rate']:,}/s | {row['p50']} ms | {row['p99']} ms | {row['p99.9']} ms |"
    for name, part in result.get("parts", {}).items():
        if "not_run" in part:
            yield ""
            yield f"`{name}` was not run: {part['not_run']}"
    yield ""
    yield from targets_table(result["targets"])


def replaced(page: str, result: Mapping[str, Any]) -> str:
    """The page with these figures. Raises: ValueError when it has not the two markers."""
    before, found, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError("the page lacks the markers between which the figures stand")
    return before + BEGIN + "".join(f"{line}\n" for line in page_lines(result)) + END + after


def ratio_svg(ratios: Mapping[str, float]) -> str:
    """A bar for each ratio, and a line at 1: what OpenSSL does on the same core."""
    largest = max([*ratios.values(), 1.0])
    room = _WIDTH - _LABEL - _SCALE_END
    at_one = _LABEL + room / largest
    height = _ROW * len(ratios) + 30
    rows = []
    for number, (name, ratio) in enumerate(ratios.items()):
        top, width = _ROW * number + 8, room * ratio / largest
        rows.append(f'<text x="8" y="{top + 13}">{name.removesuffix("_vs_openssl")}</text>')
        rows.append(f'<rect x="{_LABEL}" y="{top}" width="{width:.1f}" height="16" fill="#3b6ea5"/>')
        rows.append(f'<text x="{_LABEL + width + 6:.1f}" y="{top + 13}">{ratio:.2f}</text>')
    foot = f'<text x="{at_one:.1f}" y="{height - 6}" text-anchor="middle">1 = openssl speed</text>'
    line = f'<line x1="{at_one:.1f}" y1="2" x2="{at_one:.1f}" y2="{height - 20}" stroke="#a33" stroke-dasharray="4 3"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="13">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *rows, line, foot, "</svg>", ""])


def main() -> int:
    saved, page = Path(sys.argv[1]), Path(sys.argv[2])
    result = json.loads(saved.read_text())
    page.write_text(replaced(page.read_text(), result))
    page.with_suffix(".svg").write_text(ratio_svg(result["ratios"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
