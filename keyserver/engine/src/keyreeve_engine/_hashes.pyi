"""SHA-256 of many messages in one call."""

def sha256_each(prefix: bytes, messages: list[bytes], /) -> list[bytes]:
    """The digest of `prefix` and each message."""

def sha256_pairs(prefix: bytes, nodes: list[bytes], /) -> list[bytes]:
    """The digest of `prefix` and two neighbours, for each pair. Raises: ValueError for an odd number."""
