"""Closed-loop load on a sign socket from one process: `python bench/node_load.py --socket PATH --key-id ID [--connections 64] [--depth 4]`.

Each connection keeps `depth` requests outstanding. Frames are made once and only request id and transcript hash change, so that the client
costs little of the machine that it measures. Latency is from the write of a request to the read of its answer; of a closed loop it says nothing
of a queue.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import struct
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.sign_socket import SIGNED, RefusedFrame, SignFrame, parse_agent_frame

_HEAD = struct.Struct(">IBBI")
_REQUEST_ID = slice(6, 10)
_READ_BYTES = 262_144
_DEADLINE_MS = 10_000
SCHEMES = {"ec-p256": 0x0403, "ec-p384": 0x0503, "rsa-2048": 0x0804, "ed25519": 0x0807}


def request_template(key_id: str, scheme: int) -> bytearray:
    """A sign frame with its length; request id and the last 8 bytes of the transcript hash are to be filled in."""
    message = build_tls13_content(Purpose.TLS13_CLIENT_VERIFY, bytes(32))
    frame = SignFrame(0, _DEADLINE_MS, scheme, int(Purpose.TLS13_CLIENT_VERIFY), KeyId(key_id), message)
    return bytearray(frame.to_bytes())


@dataclass
class Client:
    """One connection with its outstanding requests."""

    path: str
    frame: bytearray
    sent_at: dict[int, float] = field(default_factory=dict)
    next_id: int = 0
    refused: int = 0
    codes: Counter[str] = field(default_factory=Counter)  # of refusals

    def __post_init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(self.path)
        self._buffer = b""

    def send(self, count: int) -> None:
        frame, now, out = self.frame, perf_counter(), []
        for _ in range(count):
            self.next_id += 1
            frame[_REQUEST_ID] = self.next_id.to_bytes(4, "big")
            frame[-8:] = self.next_id.to_bytes(8, "big")
            self.sent_at[self.next_id] = now
            out.append(bytes(frame))
        self.socket.sendall(b"".join(out))

    def receive(self) -> list[float]:
        """The latencies of the answers that one read brought. Raises: ConnectionError."""
        data = self.socket.recv(_READ_BYTES)
        if not data:
            raise ConnectionError("agent closed the connection")
        data, now, at, took = self._buffer + data, perf_counter(), 0, []
        while len(data) - at >= _HEAD.size:
            length, _, kind, request_id = _HEAD.unpack_from(data, at)
            if len(data) - at < 4 + length:
                break
            took.append(now - self.sent_at.pop(request_id))
            if kind != SIGNED:
                self.refused += 1
                frame = parse_agent_frame(data[at + 4 : at + 4 + length])
                self.codes[frame.error.code.value if isinstance(frame, RefusedFrame) else "other"] += 1
            at += 4 + length
        self._buffer = data[at:]
        return took


def lone(path: str, key_id: str, *, scheme: int, requests: int) -> dict[str, Any]:
    """One request at a time over one connection; the first hundred do not count."""
    client, took = Client(path, request_template(key_id, scheme)), []
    for _ in range(100 + requests):
        client.send(1)
        while client.sent_at:
            took += client.receive()
    return {"requests": requests, "refused": client.refused, **percentiles(took[100:])}


def load(path: str, key_id: str, *, scheme: int, connections: int, depth: int, seconds: float) -> dict[str, Any]:
    """`connections` times `depth` requests outstanding for about `seconds`."""
    frame = request_template(key_id, scheme)
    clients = {}
    poll = select.epoll()
    for _ in range(connections):
        client = Client(path, frame)
        clients[client.socket.fileno()] = client
        poll.register(client.socket, select.EPOLLIN)
    took: list[float] = []
    began = monotonic()
    for client in clients.values():
        client.send(depth)
    while monotonic() - began < seconds:
        for descriptor, _ in poll.poll(1.0):
            answered = clients[descriptor].receive()
            took += answered
            if answered:
                clients[descriptor].send(len(answered))
    lasted = monotonic() - began
    refused = sum(client.refused for client in clients.values())
    codes = dict(sum((client.codes for client in clients.values()), Counter[str]()))
    for client in clients.values():
        client.socket.close()
    return {
        "requests": len(took),
        "refused": refused,
        "codes": codes,
        "per_second": round(len(took) / lasted),
        **percentiles(took),
    }


def percentiles(took: list[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(took)
    return {
        f"p{share:g}_ms": round(ordered[min(int(len(ordered) * share / 100), len(ordered) - 1)] * 1000, 3)
        for share in (50, 99, 99.9)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--key-id", required=True)
    parser.add_argument("--key-type", choices=SCHEMES, default="ec-p256")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--lone", type=int, default=0, metavar="REQUESTS", help="one at a time instead, so many")
    arguments = parser.parse_args()
    path, scheme = str(arguments.socket), SCHEMES[arguments.key_type]
    if arguments.lone:
        result = lone(path, arguments.key_id, scheme=scheme, requests=arguments.lone)
    else:
        result = load(
            path,
            arguments.key_id,
            scheme=scheme,
            connections=arguments.connections,
            depth=arguments.depth,
            seconds=arguments.seconds,
        )
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
