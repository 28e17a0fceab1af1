"""A private key outside its token: what the token wrapped it to, and what is needed to unwrap it. Pure.

Layout: `KRW1` `u32 mechanism` (number of PKCS#11) `bytes8 key type` `bytes8 wrapping key id` `bytes16 wrapped`. The blob stands
in the box of a sealed record, so its integrity is that of the seal; the wrapping itself (RFC 3394, RFC 5649) has its own besides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from keyreeve_common.errors import MalformedFrame, SealedRecordInvalid
from keyreeve_common.schemes import KeyType
from keyreeve_common.wire import Reader, bytes8, bytes16, u32

MAGIC = b"KRW1"
MAX_WRAPPED_BYTES = 8_192
MAX_BLOB_BYTES = MAX_WRAPPED_BYTES + 600
MAX_WRAPPING_ID_BYTES = 64


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """`wrapping_id` is the CKA_ID of the token's wrapping key."""

    mechanism: int
    key_type: KeyType
    wrapping_id: bytes
    wrapped: bytes = field(repr=False)

    def to_bytes(self) -> bytes:
        name = self.key_type.value.encode("ascii")
        return MAGIC + u32(self.mechanism) + bytes8(name) + bytes8(self.wrapping_id) + bytes16(self.wrapped)


def parse_wrapped_key(blob: bytes) -> WrappedKey:
    """Raises: SealedRecordInvalid."""
    reader = Reader(blob)
    try:
        if reader.take(len(MAGIC), "magic") != MAGIC:
            raise SealedRecordInvalid("the record holds no wrapped key")
        parsed = WrappedKey(
            mechanism=reader.u32("mechanism"),
            key_type=KeyType(reader.bytes8("key type").decode("ascii")),
            wrapping_id=reader.bytes8("wrapping key id", low=1, high=MAX_WRAPPING_ID_BYTES),
            wrapped=reader.bytes16("wrapped", low=1, high=MAX_WRAPPED_BYTES),
        )
        reader.finish()
    except (MalformedFrame, ValueError):
        raise SealedRecordInvalid("the record's wrapped key is cut short or damaged") from None
    return parsed
