"""Reads TLS structures inside a message that is to be signed; whatever is cut short, too long or left over is refused with the purpose's name.

Spec: RFC 5246 4 (presentation language).
"""

from __future__ import annotations

from keyreeve_common.errors import PurposeMismatch
from keyreeve_common.purposes import Purpose


class TlsReader:
    """A place in `data` that only moves forward. Raises: PurposeMismatch."""

    def __init__(self, data: bytes, purpose: Purpose, what: str) -> None:
        self._data = data
        self._at = 0
        self._purpose = purpose
        self._what = what

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def refuse(self, rule: str) -> PurposeMismatch:
        return PurposeMismatch(f"{self._purpose.label}: {self._what}: {rule}")

    def require(self, condition: bool, rule: str) -> None:
        if not condition:
            raise self.refuse(rule)

    def take(self, length: int, field: str) -> bytes:
        if length > self.left:
            raise self.refuse(f"{field} is cut short")
        self._at += length
        return self._data[self._at - length : self._at]

    def number(self, octets: int, field: str) -> int:
        return int.from_bytes(self.take(octets, field), "big")

    def vector(self, octets: int, field: str, *, low: int = 0, high: int | None = None) -> bytes:
        """What stands behind a length of so many octets, `low` to `high` bytes of it."""
        length = self.number(octets, f"length of {field}")
        if length < low or (high is not None and length > high):
            raise self.refuse(f"{field} has {length} bytes")
        return self.take(length, field)

    def inner(self, data: bytes, what: str) -> TlsReader:
        return TlsReader(data, self._purpose, what)

    def finish(self) -> None:
        if self.left:
            raise self.refuse(f"{self.left} bytes too many")
