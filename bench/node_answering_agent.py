"""An agent that signs by itself with keys in files, for node_handshakes.py and node_delay.py: no key server shares the machine with the proxy.

It speaks the sign socket by the agent's own server class. With a delay each answer leaves that long after its request, however many wait.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from keyreeve_client.agent.config import SignSocketConfig
from keyreeve_client.agent.sign_listener import bind_sign_socket
from keyreeve_client.agent.sign_server import Cancellable, SignServer
from keyreeve_client.sign_client import Answered
from keyreeve_common import event_loop
from keyreeve_common.key_id import KeyId, parse_key_id
from keyreeve_common.sign_socket import SignFrame

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class EveryKey:
    """Any local process may use any key: this is a measurement."""

    def kinds_to_learn(self, *_: object) -> frozenset[str]:
        return frozenset()

    def check(self, *_: object) -> None:
        return


@dataclass
class KeysInFiles:
    keys: dict[KeyId, PrivateKey]
    delay_s: float

    def begin(self, request: SignFrame, trace: bytes, ends_at: float, answered: Answered, /) -> Cancellable:
        del trace, ends_at
        signature = sign(self.keys[request.key_id], request.message)
        loop = asyncio.get_running_loop()
        return (
            loop.call_later(self.delay_s, answered, signature) if self.delay_s else loop.call_soon(answered, signature)
        )


def sign(key: PrivateKey, message: bytes) -> bytes:
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(message, ec.ECDSA(SHA256()))
    return key.sign(message, padding.PSS(padding.MGF1(SHA256()), padding.PSS.DIGEST_LENGTH), SHA256())


async def serve(path: Path, keys: dict[KeyId, PrivateKey], delay_s: float) -> None:
    """Until standard input ends."""
    config = SignSocketConfig(path, max_outstanding_per_connection=4096, max_connections_per_uid=2048)
    server = SignServer(config, EveryKey(), KeysInFiles(keys, delay_s).begin)
    await server.start(bind_sign_socket(path, config.mode_bits))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def read_key(option: str) -> tuple[KeyId, PrivateKey]:
    """`key-id=file`"""
    key_id, _, path = option.partition("=")
    key = load_pem_private_key(Path(path).read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise argparse.ArgumentTypeError(f"{path}: P-256 and RSA only")
    return parse_key_id(key_id), key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--delay-ms", type=int, default=0)
    parser.add_argument("keys", nargs="+", type=read_key, metavar="KEY-ID=FILE")
    arguments = parser.parse_args()
    os.umask(0)
    event_loop.run(serve(arguments.socket, dict(arguments.keys), arguments.delay_ms / 1000))


if __name__ == "__main__":
    main()
