"""Signatures through an OpenSSL provider that works in ASYNC jobs, such as Intel's qatprovider, in a helper thread in C.

`sign` answers a signature (ECDSA: DER) or one of the numbers below for each request. None but BAD_REQUEST says anything of the request.
"""

from collections.abc import Sequence

PIECE_MAX: int
JOBS_MAX: int
FAILED: int
MISMATCH: int
LATE: int
BUSY: int
CLOSED: int
BAD_REQUEST: int

class Unusable(Exception):
    """Why the provider cannot be had; safe to show."""

class NotOffered(Exception):
    """The provider does not sign with keys of this type."""

class Key:
    """A private key; it can be neither seen nor copied."""

class Engine:
    def load(self, pkcs8: bytes, /) -> Key:
        """Raises: NotOffered; ValueError for what is no private key in PKCS#8 (DER)."""

    def sign(
        self, keys: Sequence[Key], messages: Sequence[bytes], schemes: Sequence[int], timeout: float, /
    ) -> tuple[list[bytes | int], int]:
        """The outcomes, and how many of the signatures were with the card. Back after `timeout` seconds at the latest.

        A scheme is a code point of TLS, with bit 16 set where the message is the digest. Raises: TypeError, ValueError: nothing was signed.
        """

    def state(self) -> dict[str, int]:
        """Requests that are `running`, `waiting`, and of the running the `hanging`, which nobody waits for any more; `most_running` ever."""

    def close(self, timeout: float, /) -> bool:
        """False where a request did not end within `timeout` seconds: then what it uses stays until the process ends."""

def open(provider: str, directory: str | None, jobs: int, timeout: float, /) -> Engine:
    """Loads the provider, from `directory` or where OpenSSL looks, for up to `jobs` requests at once.

    Raises: Unusable, also where it does not load within `timeout` seconds; ValueError.
    """
