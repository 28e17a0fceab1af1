"""Which of a host's pairs of front end and signer a process belongs to, and what is its own there (ADR 0031). Pure.

The first pair has every path and port as configured. The others have them with their number: `admin-2.sock`, `audit-2`, and the next ports.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from keyreeve_common.errors import ConfigInvalid

MAX_PAIRS = 64
_FORM = re.compile(r"([1-9][0-9]?)/([1-9][0-9]?)", re.ASCII)
_HIGHEST_PORT = 65_535


@dataclass(frozen=True, slots=True)
class Pair:
    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count <= MAX_PAIRS:
            raise ConfigInvalid(f"pair {self.number} of {self.count}: there are at most {MAX_PAIRS}")

    @property
    def is_alone(self) -> bool:
        return self.count == 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def path(self, path: Path) -> Path:
        return path if self.number == 1 else path.with_name(f"{path.stem}-{self.number}{path.suffix}")

    def name(self, name: str) -> str:
        return name if self.number == 1 or not name else f"{name}-{self.number}"

    def address(self, address: str) -> str:
        """HOST:PORT, with the port that many further on. Raises: ConfigInvalid."""
        host, _, port = address.rpartition(":")
        if self.number == 1 or not port.isdecimal() or port == "0":
            return address
        if int(port) + self.number - 1 > _HIGHEST_PORT:
            raise ConfigInvalid(f"{address}: pair {self.number} has no port above it")
        return f"{host}:{int(port) + self.number - 1}"

    def share(self, total: int) -> int:
        """What this pair gets of `total`, which is the host's: all pairs together get it, but each at least one."""
        return max(total // self.count + (self.number <= total % self.count), 1)


ALONE = Pair()


def parse_pair(text: str) -> Pair:
    """`2/4` is the second of four. Raises: ConfigInvalid."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise ConfigInvalid(f"pair {text[:16]!r} is not NUMBER/COUNT, for example '2/4'")
    return Pair(int(match.group(1)), int(match.group(2)))
