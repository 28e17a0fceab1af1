"""Key ids: opaque, never reused, 1 to 64 of a-z 0-9 and '-'."""

from __future__ import annotations

import re
from typing import NewType

from keyreeve_common.errors import InvalidRequest

KeyId = NewType("KeyId", str)
MAX_KEY_ID_BYTES = 64
_KEY_ID = re.compile(r"[a-z0-9-]{1,64}", re.ASCII)


def parse_key_id(text: str) -> KeyId:
    """Raises: InvalidRequest."""
    if _KEY_ID.fullmatch(text) is None:
        raise InvalidRequest("key id is not 1 to 64 of a-z, 0-9 and '-'")
    return KeyId(text)
