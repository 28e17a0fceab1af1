"""The content that a TLS 1.3 CertificateVerify signs, for the server and for the client. Spec: RFC 8446 4.4.3.

64 spaces, the context string of the role, a zero byte, the transcript hash. The hash of the scheme and the transcript hash are independent,
so both lengths are good with every scheme.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from keyreeve_common.errors import PurposeMismatch
from keyreeve_common.purposes import (
    TLS13_CLIENT_CONTEXT,
    TLS13_HASH_LENGTHS,
    TLS13_PAD,
    TLS13_SERVER_CONTEXT,
    Purpose,
)


class FixedForm(NamedTuple):
    """Every message that has this head and one of these lengths, and no other."""

    head: bytes
    lengths: tuple[int, ...]


def _fixed(context: bytes) -> FixedForm:
    head = TLS13_PAD + context + b"\x00"
    return FixedForm(head, tuple(len(head) + length for length in TLS13_HASH_LENGTHS))


FIXED_FORMS: Final = {
    Purpose.TLS13_SERVER_VERIFY: _fixed(TLS13_SERVER_CONTEXT),
    Purpose.TLS13_CLIENT_VERIFY: _fixed(TLS13_CLIENT_CONTEXT),
}


def _form(purpose: Purpose, context: bytes) -> Callable[[bytes], None]:
    head, lengths = FIXED_FORMS[purpose]
    form = f"{lengths[0]} or {lengths[1]}"

    def check(message: bytes) -> None:
        if len(message) not in lengths:
            raise PurposeMismatch(f"{purpose.label}: message has {len(message)} bytes, the form has {form}")
        if message.startswith(head):
            return
        if message[:64] != TLS13_PAD:
            raise PurposeMismatch(f"{purpose.label}: message does not begin with 64 bytes 0x20")
        if message[64 : 64 + len(context)] != context:
            raise PurposeMismatch(f"{purpose.label}: context string is not that of {purpose.label}")
        raise PurposeMismatch(f"{purpose.label}: no zero byte stands after the context string")

    return check


check_server_verify = _form(Purpose.TLS13_SERVER_VERIFY, TLS13_SERVER_CONTEXT)
check_client_verify = _form(Purpose.TLS13_CLIENT_VERIFY, TLS13_CLIENT_CONTEXT)
