"""The Grafana dashboard asks for metrics that there are, with labels that they have, and leaves none out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from keyreeve_common.metrics import METRICS

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana"
NAME = re.compile(r"keyreeve_[a-z_]+")
GROUPED = re.compile(r"sum by \(([a-z_, ]+)\) \(rate\((keyreeve_[a-z_]+)")
LEGEND = re.compile(r"\{\{(\w+)\}\}")


def queries() -> list[tuple[str, str]]:
    dashboard = json.loads((FOLDER / "keyreeve.json").read_text())
    return [
        (target["expr"], target["legendFormat"]) for panel in dashboard["panels"] for target in panel.get("targets", [])
    ]


def base(name: str) -> str:
    return name if name in METRICS else name.removesuffix("_bucket")


def test_every_metric_is_shown_and_no_other() -> None:
    assert {base(name) for expression, _ in queries() for name in NAME.findall(expression)} == set(METRICS)


def test_labels_are_those_of_the_metric() -> None:
    for expression, legend in queries():
        for labels, name in GROUPED.findall(expression):
            assert set(labels.split(", ")) - {"le"} <= set(METRICS[base(name)].labels)
        known = {label for name in NAME.findall(expression) for label in METRICS[base(name)].labels} | {"instance"}
        assert set(LEGEND.findall(legend)) <= known


def test_file_is_what_its_generator_writes(tmp_path: Path) -> None:
    copy = tmp_path / "generate.py"
    copy.write_text((FOLDER / "generate.py").read_text())
    subprocess.run([sys.executable, copy], check=True)
    assert (tmp_path / "keyreeve.json").read_text() == (FOLDER / "keyreeve.json").read_text()
