"""A Signing service in this process, on a Unix socket, whose answers the test steers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from keyreeve_common.errors import KeyNotFound, KeyreeveError
from keyreeve_common.grpc_edge import LOCAL, EdgeInterceptor, error_to_proto
from keyreeve_common.identity import TrustDomain
from keyreeve_common.sign_batch import (
    PACKED_METADATA,
    Refused,
    Signed,
    SignResult,
    open_items,
    pack_results,
    with_count,
)
from keyreeve_common.v1 import keyserver_pb2, keyserver_pb2_grpc

KEY = ec.generate_private_key(ec.SECP256R1())


def answer_of(item: keyserver_pb2.SignItem) -> keyserver_pb2.SignResult:
    if item.key_id != "key-1":
        return keyserver_pb2.SignResult(id=item.id, error=error_to_proto(KeyNotFound()))
    if item.message == b"lie":
        return keyserver_pb2.SignResult(id=item.id, signature=KEY.sign(b"truth", ec.ECDSA(hashes.SHA256())))
    return keyserver_pb2.SignResult(id=item.id, signature=KEY.sign(item.message, ec.ECDSA(hashes.SHA256())))


@dataclass
class SteeredSigning(keyserver_pb2_grpc.SigningServicer):
    """Records batches. While `gate` is clear nothing is answered; `refusal` ends a stream that begins; `cut` ends open ones.

    `packed`: it reads packed batches, and says so; `garbled`: it answers those with noise.
    """

    batches: list[list[keyserver_pb2.SignItem]] = field(default_factory=list)
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    cut: asyncio.Event = field(default_factory=asyncio.Event)
    streams: int = 0
    refusal: KeyreeveError | None = None
    packed: bool = False
    garbled: bool = False
    packed_batches: int = 0

    async def Sign(self, request: keyserver_pb2.SignRequest, context: Any) -> keyserver_pb2.SignResponse:
        item = keyserver_pb2.SignItem(id=1, key_id=request.key_id, message=request.message)
        result = answer_of(item)
        if result.WhichOneof("result") == "error":
            raise KeyNotFound
        return keyserver_pb2.SignResponse(signature=result.signature)

    async def SignStream(self, requests: Any, context: Any) -> AsyncIterator[keyserver_pb2.SignResultBatch]:
        self.streams += 1
        if self.refusal is not None:
            raise self.refusal
        if self.packed:
            await context.send_initial_metadata(((PACKED_METADATA, "1"),))
        async for batch in requests:
            if batch.packed:
                yield await self._packed_answer(batch.packed)
                continue
            async with self.arrived:
                self.batches.append(list(batch.items))
                self.arrived.notify_all()
            if not await self._opened():
                return
            for item in reversed(batch.items):  # any order, in several messages
                yield keyserver_pb2.SignResultBatch(results=[answer_of(item)])

    async def _packed_answer(self, packed: bytes) -> keyserver_pb2.SignResultBatch:
        items = open_items(packed)
        async with self.arrived:
            self.packed_batches += 1
            self.arrived.notify_all()
        await self.gate.wait()
        if self.garbled:
            return keyserver_pb2.SignResultBatch(packed=b"\x00\x01noise")
        results: list[SignResult] = []
        for item in reversed(items):
            answer = answer_of(keyserver_pb2.SignItem(id=item.id, key_id=item.key_id, message=item.message))
            found = answer.WhichOneof("result") == "signature"
            results.append(Signed(item.id, answer.signature) if found else Refused(item.id, KeyNotFound()))
        return keyserver_pb2.SignResultBatch(packed=with_count(len(results), pack_results(results)))

    async def _opened(self) -> bool:
        waits = [asyncio.ensure_future(self.gate.wait()), asyncio.ensure_future(self.cut.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return not self.cut.is_set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with self.arrived, asyncio.timeout(20):
            await self.arrived.wait_for(condition)


@dataclass
class SigningServer:
    service: SteeredSigning
    socket: Path
    server: grpc.aio.Server
    public_key: ec.EllipticCurvePublicKey = field(default_factory=KEY.public_key)


async def start_server(service: SteeredSigning, socket: Path) -> grpc.aio.Server:
    edge = EdgeInterceptor(lambda: TrustDomain("example.org"), {"/keyreeve.keyserver.v1.Signing/": (LOCAL,)})
    server = grpc.aio.server(interceptors=[edge])
    keyserver_pb2_grpc.add_SigningServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    return server


@pytest.fixture
async def signing(tmp_path: Path) -> AsyncIterator[SigningServer]:
    service = SteeredSigning()
    socket = tmp_path / "s.sock"
    server = await start_server(service, socket)
    yield SigningServer(service, socket, server)
    service.cut.set()
    await server.stop(0)
