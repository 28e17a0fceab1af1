"""Slices of `openssl speed`: what OpenSSL signs with local keys per processor second, taken between the slices of load."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from keyreeve_common.errors import FailedPrecondition, Internal

_PATIENCE_S = 30.0
# +R5:42000:256:1.00 and +R8:42000:253:Ed25519:1.00, printed as soon as a measurement ends; the last field is user time in seconds.
_RESULT = re.compile(r"\+R\d+:(?P<count>\d+):\d+(?::[^:]+)?:(?P<seconds>\d+\.\d+)\s*")


@dataclass(frozen=True, slots=True)
class SpeedSlice:
    """So many signatures in so many processor seconds."""

    count: int
    seconds: float

    def __add__(self, other: SpeedSlice) -> SpeedSlice:
        return SpeedSlice(self.count + other.count, self.seconds + other.seconds)

    @property
    def per_second(self) -> float:
        """Raises: Internal when no processor time was used."""
        if self.seconds <= 0:
            raise Internal("openssl speed used no processor time: the machine is too busy, or the slice too short")
        return self.count / self.seconds


NOTHING = SpeedSlice(0, 0.0)


def parse_result_line(line: str) -> SpeedSlice | None:
    """A result as `openssl speed -mr` prints it on stderr; None for any other line."""
    match = _RESULT.fullmatch(line)
    return SpeedSlice(int(match["count"]), float(match["seconds"])) if match is not None else None


def find_openssl() -> str:
    """Raises: FailedPrecondition."""
    found = shutil.which("openssl")
    if found is None:
        raise FailedPrecondition(
            "openssl is not on the PATH: install it (apt-get install openssl); ratios are against it"
        )
    return found


def openssl_version(program: str) -> str:
    """For example `OpenSSL 3.0.19 27 Jan 2026`. Raises: FailedPrecondition."""
    done = subprocess.run([program, "version"], capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    if done.returncode != 0:
        raise FailedPrecondition(f"{program} version ended with {done.returncode}")
    return done.stdout.strip()


def run_speed(program: str, algorithm: str, *, seconds: int = 1) -> SpeedSlice:
    """One slice of signing with `algorithm` (a name of openssl-speed(1)) on one core.

    It measures signing first and verifying then; the second is not waited for. Raises: FailedPrecondition.
    """
    command = [program, "speed", "-mr", "-seconds", str(seconds), algorithm]
    said: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stderr is not None  # noqa: S101 - a pipe was asked for
            for line in process.stderr:
                if (found := parse_result_line(line)) is not None:
                    return found
                said.append(line.strip())
        finally:
            process.kill()
    raise FailedPrecondition(f"openssl speed {algorithm} gave no result: {' '.join(said[-2:]) or 'it said nothing'}")
