"""What a check found: a state, what it is about, what is so, and what to do."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

COMMAND_TIMEOUT_S = 60


class State(StrEnum):
    """Only `failed` makes the doctor's exit code 1."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """`remedy` is empty where nothing is to be done."""

    state: State
    check: str
    detail: str
    remedy: str = ""


def ok(check: str, detail: str) -> Finding:
    return Finding(State.OK, check, detail)


def warning(check: str, detail: str, remedy: str) -> Finding:
    return Finding(State.WARNING, check, detail, remedy)


def failed(check: str, detail: str, remedy: str) -> Finding:
    return Finding(State.FAILED, check, detail, remedy)


def skipped(check: str, detail: str) -> Finding:
    return Finding(State.SKIPPED, check, detail)


@dataclass(frozen=True, slots=True)
class Answer:
    """How a program ended; `text` is all that it wrote. 127: it is not there; 124: it did not end in time."""

    code: int
    text: str

    @property
    def last_line(self) -> str:
        """What it said last: the detail where that is one of our log lines."""
        line = next((line.strip() for line in reversed(self.text.splitlines()) if line.strip()), "said nothing")
        try:
            entry = json.loads(line)
        except ValueError:
            return line
        return str(entry.get("detail", line)) if isinstance(entry, dict) else line


def run(command: Sequence[str], env: dict[str, str] | None = None) -> Answer:
    """Runs a program that only looks. Never raises."""
    try:
        done = subprocess.run(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except OSError as error:
        return Answer(127, f"{command[0]}: {error.strerror}")
    except subprocess.TimeoutExpired:
        return Answer(124, f"{command[0]} did not end within {COMMAND_TIMEOUT_S} s")
    return Answer(done.returncode, done.stdout + done.stderr)
