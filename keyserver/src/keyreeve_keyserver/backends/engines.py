"""The port between the software backend and what makes its signatures: OpenSSL, eight lanes at a time, a card.

Engines are asked in order of preference which of them takes the work that waits; the last of them takes any. Each loads every key that it can
sign with, so that the choice is made anew for each piece of work and never binds a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType, Protocol

from keyreeve_common.schemes import KeyType

from keyreeve_keyserver.backends.ports import SignOutcome, SignRequest


class EngineChoice(StrEnum):
    """`AUTO`: the fastest that works here, each for what it is fastest at."""

    AUTO = "auto"
    OPENSSL = "openssl"
    MULTIBUFFER = "multibuffer"
    QAT = "qat"


Handle = NewType("Handle", object)
Work = tuple[Handle, SignRequest]
"""A key as this engine has loaded it, and what it is to sign; the scheme fits the type of the key."""


class EngineUnusable(Exception):
    """Why an engine does not sign here."""


class KeyUnsuited(Exception):
    """This engine cannot sign with a key that is otherwise good, such as an RSA key with primes of unlike lengths."""


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """`usable`: it signs here and now; `detail` says why not."""

    usable: bool
    detail: str = ""


class KeyEngine(Protocol):
    @property
    def name(self) -> str: ...

    def supports(self, key_type: KeyType) -> bool:
        """Whether it loads and signs with keys of this type now."""

    def piece(self, key_type: KeyType, waiting: int) -> int:
        """How many of `waiting` requests it would take at once; 0 leaves them to the next engine. Called under a lock: no I/O."""

    def load(self, key_type: KeyType, pkcs8: bytes) -> Handle:
        """Raises: KeyUnsuited; KeySelfTestFailed where the parts of the key do not belong together; SealedRecordInvalid."""

    def sign(self, key_type: KeyType, work: Sequence[Work]) -> Sequence[SignOutcome | None]:
        """One outcome each, in order; ECDSA signatures are DER. None leaves that one to the next engine; the last has no None.

        Called in a worker thread; raises nothing.
        """

    def health(self) -> EngineHealth: ...
