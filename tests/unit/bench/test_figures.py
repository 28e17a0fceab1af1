"""What the benchmark reckons: OpenSSL's lines, processor time of process trees, histograms, open loop, targets, page. Clocks are stand-ins."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_bench import checkout_parts
from keyreeve_bench.checkout_parts import PARTS, CheckoutPart, run_part
from keyreeve_bench.cpu import ProcessTime, parse_stat, tree_of, tree_seconds
from keyreeve_bench.histogram import Histogram
from keyreeve_bench.open_loop import LoopClock, run_open_loop
from keyreeve_bench.openssl_speed import NOTHING, SpeedSlice, find_openssl, parse_result_line, run_speed
from keyreeve_bench.page import BEGIN, END, page_lines, ratio_svg, replaced
from keyreeve_bench.profiles import PLANS
from keyreeve_bench.ratios import SchemeResult
from keyreeve_bench.report import targets_table, text_lines
from keyreeve_bench.targets import NOT_MEASURED, NOT_REACHED, REACHED, TARGETS, judge
from keyreeve_common.errors import FailedPrecondition, Internal, Unavailable

SCHEME = SchemeResult("p256", 80_000, 0, 2.0, 4.0, SpeedSlice(100_000, 2.0))
RESULT: dict[str, Any] = {
    "conditions": {
        "at": "2026-11-25T07:00:00+00:00",
        "processor": "A processor",
        "cores": 2,
        "openssl": "OpenSSL 3.0.19 27 Jan 2026 (Library: OpenSSL 3.0.19)",
        "python": "3.11.7",
        "audit_fsync": "always",
        "load_average_before": 0.1,
    },
    "engine": "multibuffer",
    "ratios": {"p256_vs_openssl": 0.8, "rsa2048_vs_openssl": 2.6},
    "schemes": {"p256": SCHEME.to_json()},
    "latency_ms": {"p50": 0.5, "p99": 2.5, "p99.9": 3.0, "max": 9.0, "count": 10},
    "parts": {"node_delay": {"not_run": "not installed: haproxy"}},
}


@pytest.mark.parametrize(
    ("line", "slice_"),
    [
        ("+R5:42000:256:1.00\n", SpeedSlice(42_000, 1.0)),
        ("+R8:42000:253:Ed25519:0.99\n", SpeedSlice(42_000, 0.99)),
        ("+R1:4100:2048:1.01", SpeedSlice(4_100, 1.01)),
        ("+F5:10:256:0.000020:0.0001", None),
        ("+DTP:256:sign:ecdsa:1", None),
        ("", None),
    ],
)
def test_lines_of_openssl_speed(line: str, slice_: SpeedSlice | None) -> None:
    assert parse_result_line(line) == slice_


def test_slices_add_up_before_they_are_divided() -> None:
    assert (SpeedSlice(100, 1.0) + SpeedSlice(300, 1.0)).per_second == 200
    with pytest.raises(Internal):
        _ = NOTHING.per_second


def test_an_algorithm_that_openssl_does_not_know_is_said_so() -> None:
    with pytest.raises(FailedPrecondition, match="gave no result"):
        run_speed(find_openssl(), "no-such-algorithm")


def test_openssl_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FailedPrecondition, match="apt-get install openssl"):
        find_openssl()


def test_a_process_may_have_any_name() -> None:
    fields = ["S", "7", *["0"] * 9, "11", "12", "13", "14", *["0"] * 4, "99"]
    assert parse_stat(f"42 (a) b (c)) {' '.join(fields)}") == ProcessTime(42, 7, 50, 99)
    for wrong in ("", "42 (a", "42 (a) S 1 2"):
        with pytest.raises(ValueError, match="not a line"):
            parse_stat(wrong)


def test_a_tree_is_its_descendants_alone() -> None:
    processes = [ProcessTime(pid, parent, 1, 0) for pid, parent in ((1, 0), (2, 1), (3, 2), (4, 1), (5, 4))]
    assert {each.pid for each in tree_of(2, processes)} == {2, 3}
    with pytest.raises(Unavailable):
        tree_of(9, processes)


def test_the_time_of_a_child_counts() -> None:
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert tree_seconds(child.pid) >= 0.25
    finally:
        child.communicate(b"\n", timeout=20)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=50))
def test_a_histogram_is_never_too_low_and_hardly_too_high(microseconds: list[int]) -> None:
    histogram = Histogram()
    for value in microseconds:
        histogram.record(value / 1e6)
    assert histogram.total == len(microseconds)
    largest = max(microseconds) / 1000
    assert largest <= histogram.quantile_ms(1.0) <= largest * 1.008 + 0.001
    assert Histogram.from_json(json.loads(json.dumps(histogram.to_json()))).counts == histogram.counts
    both = Histogram()
    both.add(histogram)
    both.add(histogram)
    assert both.quantile_ms(0.5) == histogram.quantile_ms(0.5)


class StandInClock:
    """Time that passes only while somebody sleeps or a request is served."""

    def __init__(self) -> None:
        self.time = 0.0

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


async def test_a_stall_lengthens_every_latency_that_it_touches() -> None:
    """Ten requests, one each 10 ms; the third holds everything up for 50 ms. A loop that waited for answers would see one slow request."""
    clock = StandInClock()

    async def send(number: int) -> str:
        if number == 2:
            clock.time += 0.05
        return "ok"

    sleep: Callable[[float], Awaitable[None]] = _turning(clock)
    result = await run_open_loop(send, rate=100, seconds=0.1, clock=LoopClock(lambda: clock.time, sleep))
    assert result.codes == {"ok": 10}
    slow = sum(count for value, count in result.latencies.counts.items() if value >= 9_000)
    assert slow >= 4


def _turning(clock: StandInClock) -> Callable[[float], Awaitable[None]]:
    import asyncio

    async def sleep(seconds: float) -> None:
        await clock.sleep(seconds)
        for _ in range(3):
            await asyncio.sleep(0)

    return sleep


async def test_refusals_are_counted_and_are_no_latencies() -> None:
    clock = StandInClock()

    async def send(number: int) -> str:
        return "overloaded" if number % 2 else "ok"

    result = await run_open_loop(send, rate=10, seconds=1, clock=LoopClock(lambda: clock.time, clock.sleep))
    assert result.codes == {"ok": 5, "overloaded": 5}
    assert result.latencies.total == 5


def test_a_ratio_is_per_processor_second_of_the_server() -> None:
    assert SCHEME.per_core == 40_000
    assert SCHEME.ratio == 0.8
    with pytest.raises(Internal, match="too short"):
        _ = SchemeResult("p256", 1, 0, 0.0, 1.0, SpeedSlice(1, 1.0)).per_core


def test_targets_are_judged_both_ways() -> None:
    rows = {row["target"]: row for row in judge({**RESULT, "provider_latency_ms": {"p50": 0.5, "p99": 3.0}})}
    assert rows[TARGETS[0].name]["verdict"] == NOT_REACHED
    assert rows[TARGETS[0].name]["share"] == 0.533
    assert rows[TARGETS[1].name]["verdict"] == REACHED
    assert [rows[target.name]["verdict"] for target in TARGETS[4:6]] == [REACHED, NOT_REACHED]
    assert rows[TARGETS[7].name]["verdict"] == NOT_MEASURED
    assert len(list(targets_table(judge(RESULT)))) == len(TARGETS) + 2


def test_the_page_takes_its_figures_from_the_result() -> None:
    result = {**RESULT, "targets": judge(RESULT)}
    page = replaced(f"# Speed\n{BEGIN}old\n{END}rest\n", result)
    assert "old" not in page
    assert page.startswith("# Speed\n")
    assert page.endswith("rest\n")
    assert "| p256 | 40,000 | 50,000 | 0.80 | 25.0 µs |" in page
    assert "not installed: haproxy" in page
    assert replaced(page, result) == page
    with pytest.raises(ValueError, match="markers"):
        replaced("# Speed\n", result)
    assert list(page_lines(result))
    assert any("haproxy" in line for line in text_lines(result))


def test_the_picture_is_well_formed_and_has_a_bar_for_each_ratio() -> None:
    picture = ElementTree.fromstring(ratio_svg({"p256_vs_openssl": 0.8, "p384_vs_openssl": 15.0}))  # noqa: S314 - ours
    names = [each.text for each in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"p256", "p384", "0.80", "15.00", "1 = openssl speed"} <= set(names)


def test_every_part_of_the_full_profile_is_a_script_of_the_checkout() -> None:
    assert all((checkout_parts.SCRIPTS / f"{part.name}.py").exists() for part in PARTS)
    assert set(PLANS) == {"smoke", "quick", "full"}


def test_a_part_that_cannot_run_says_why(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout_parts, "SCRIPTS", tmp_path)
    part = CheckoutPart("part", (), lambda found: {"section": {"number": found["number"]}})
    assert "checkout" in run_part(part)[0]["not_run"]
    script = tmp_path / "part.py"
    script.write_text("print('{\"number\": 3}')")
    assert run_part(part) == ({"number": 3}, {"section": {"number": 3}})
    assert "no-such-program" in run_part(CheckoutPart("part", (), part.figures, ("no-such-program",)))[0]["not_run"]
    for wrong, reason in (("raise SystemExit('gone')", "gone"), ("print('{}')", "KeyError"), ("print('no')", "JSON")):
        script.write_text(wrong)
        assert reason in run_part(part)[0]["not_run"]
