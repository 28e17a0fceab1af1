"""What the server of a TLS 1.2 handshake signs: both randoms and the ECDHE parameters, byte for byte. Spec: RFC 8422 5.4; RFC 5246 7.4.3.

`client_random[32] server_random[32] 03 curve[2] length[1] point[length]`, nothing behind it. Byte 64 is 03 here and `T` in TLS 1.3's form, so no
message has both forms.
"""

from __future__ import annotations

from keyreeve_common.purposes import Purpose

from keyreeve_keyserver.domain.purposes.tls12_params import read_server_params
from keyreeve_keyserver.domain.purposes.tls_reader import TlsReader

RANDOM_BYTES = 32


def check_server_key_exchange(message: bytes) -> None:
    """Raises: PurposeMismatch."""
    reader = TlsReader(message, Purpose.TLS12_SERVER_KEY_EXCHANGE, "message")
    reader.take(RANDOM_BYTES, "client_random")
    reader.take(RANDOM_BYTES, "server_random")
    read_server_params(reader)
    reader.finish()
