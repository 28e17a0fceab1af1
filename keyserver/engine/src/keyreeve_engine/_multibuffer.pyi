"""Signatures eight at a time: kinds of key, statuses and forms are the numbers of native/multibuffer/{key,status,piece}.h."""

from typing import Never, final

_Readable = bytes | bytearray | memoryview

PIECE_MAX: int
LANES: int

class KeyInvalid(ValueError): ...
class KeyUnsuited(ValueError): ...

@final
class Key:
    """A private key in locked memory; nothing reads it back, and it is wiped with the last reference."""

    def __init__(self, *_: Never) -> None: ...

def kinds() -> list[int]:
    """Of keys that this processor signs with."""

def load(kind: int, pkcs8: _Readable, /) -> Key:
    """Raises: KeyInvalid, KeyUnsuited, MemoryError; ValueError where `kinds` has no such kind."""

def sign(kind: int, keys: list[Key], messages: list[bytes], forms: bytes, /) -> list[bytes | int]:
    """Signatures (ECDSA in DER), or the number of a status for what failed; releases the global lock. At most PIECE_MAX."""

def memory() -> tuple[int, int, int]:
    """Bytes for keys and nonces: mapped; locked, of these; in use."""
