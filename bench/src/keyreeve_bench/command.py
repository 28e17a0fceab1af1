"""`keyreeve bench`: its options, and what it prints. Data goes to stdout, progress to stderr."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from keyreeve_client.cli.output import Output, show_text, wants_json
from keyreeve_common.errors import FailedPrecondition

from keyreeve_bench.profiles import FULL_PARTS, Options, run_profile
from keyreeve_bench.report import text_lines


class Fsync(StrEnum):
    """The values of audit.fsync in signer.toml."""

    ALWAYS = "always"
    INTERVAL = "interval"
    OFF = "off"


class Profile(StrEnum):
    SMOKE = "smoke"
    QUICK = "quick"
    FULL = "full"


def bench(  # noqa: PLR0917 - options of a command
    profile: Annotated[
        Profile, typer.Option(help="smoke: does it run; quick: under 45 s; full: minutes.")
    ] = Profile.QUICK,
    part: Annotated[str, typer.Option(help=f"One part of the full profile: {', '.join(FULL_PARTS)}.")] = "",
    save: Annotated[Path | None, typer.Option(help="Write the JSON to this file too.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where the key server listens; 0: a free port.")] = 0,
    fsync: Annotated[Fsync, typer.Option(help="audit.fsync of its signer.")] = Fsync.ALWAYS,
    python: Annotated[
        str, typer.Option("--server-python", help="Interpreter that has the key server to measure; else this one.")
    ] = sys.executable,
    output: Output = None,
) -> None:
    """Measures a key server of its own on this machine against `openssl speed`; nothing is left behind but --save's file."""
    if part and part not in FULL_PARTS:
        raise FailedPrecondition(f"no part {part[:64]!r}: known are {', '.join(FULL_PARTS)}")
    if save is not None:
        save.open("a").close()  # a file that cannot be written must not cost a whole run
    with _ended_by_sigterm():
        result = run_profile(Options(profile.value, part, port, fsync.value, python), _say)
    _print(result, save, as_json=wants_json(output))


def _print(result: dict[str, Any], save: Path | None, *, as_json: bool) -> None:
    if save is not None:
        save.write_text(json.dumps(result, indent=2) + "\n")
    if as_json:
        show_text(json.dumps(result, indent=2))
        return
    for line in text_lines(result):
        show_text(line)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - progress of a command


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the benchmark as Ctrl-C does: everything that it started is ended first."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
