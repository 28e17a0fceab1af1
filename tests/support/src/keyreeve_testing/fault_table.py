"""The table of docs/reliability.md: one row for each fault, written by the tests that measured it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from keyreeve_testing.load import Attempt

ROOT = Path(__file__).resolve().parents[4]
PAGE = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "build" / "results"
HEAD = (
    "| fault | handshakes | failed | other signatures | failed | to recover | longest success | records lost |\n"
    "|---|---|---|---|---|---|---|---|\n"
)
MARKS = ("<!-- table: tests/integration/faults -->\n", "<!-- end of table -->\n")


@dataclass(frozen=True, slots=True)
class Row:
    """In seconds: `recovered` from the fault to the last failure, `stalled` the longest attempt that succeeded."""

    fault: str
    handshakes: int
    failed: int
    signatures: int
    signatures_failed: int
    recovered: float
    stalled: float
    records_lost: int = -1

    def line(self) -> str:
        shown = (self.handshakes, self.failed) if self.handshakes else ("-", "-")
        return (
            f"| {self.fault} | {shown[0]} | {shown[1]} | {self.signatures} | {self.signatures_failed} "
            f"| {self.recovered} s | {self.stalled} s | {self.records_lost} |\n"
        )


def row_of(fault: str, began: float, *, handshakes: Iterable[Attempt], signatures: Iterable[Attempt]) -> Row:
    """What these attempts, all after the fault at `began`, say of it."""
    shaken, signed = list(handshakes), list(signatures)
    both = shaken + signed
    return Row(
        fault,
        len(shaken),
        failed(shaken),
        len(signed),
        failed(signed),
        round(max((attempt.ended - began for attempt in both if attempt.error), default=0.0), 2),
        round(max((attempt.ended - attempt.began for attempt in both if not attempt.error), default=0.0), 2),
    )


def failed(attempts: Iterable[Attempt]) -> int:
    return sum(1 for attempt in attempts if attempt.error)


def write_rows(name: str, rows: list[Row]) -> None:
    """To build/results/NAME.json; and into the page where KEYREEVE_WRITE_DOCS asks for it, else the page is held to name these faults."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    page = PAGE.read_text()
    before, rest = page.split(MARKS[0])
    old, after = rest.split(MARKS[1])
    lines = {line.split("|")[1].strip(): line for line in old.splitlines(keepends=True)[2:]}
    if not os.environ.get("KEYREEVE_WRITE_DOCS"):
        missing = [row.fault for row in rows if row.fault not in lines]
        assert not missing, f"docs/reliability.md lacks {missing}: see its head"
        return
    lines.update({row.fault: row.line() for row in rows})
    PAGE.write_text(before + MARKS[0] + HEAD + "".join(lines.values()) + MARKS[1] + after)
