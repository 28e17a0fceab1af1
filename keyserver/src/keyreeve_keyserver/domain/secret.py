"""A value that is never shown: not in a repr, a log line or an exception."""

from __future__ import annotations

import hmac


class Secret:
    """Secret bytes. There is no `==`: use `matches`, which takes the same time for every value of the same length."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        return self._value

    def matches(self, other: bytes) -> bool:
        return hmac.compare_digest(self._value, other)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return "Secret()"

    def __reduce__(self) -> str:
        raise TypeError("a Secret is not pickled")

    __hash__ = None  # type: ignore[assignment]  # an unhashable value cannot become a key of a dict by mistake

    def __eq__(self, other: object) -> bool:
        raise TypeError("compare a Secret with matches()")
