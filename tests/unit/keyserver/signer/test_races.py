"""Loads, attestations and forgets of one key at once: the table of keys and the backend agree afterwards."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from keyreeve_common.errors import KeyNotFound
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_keyserver.backends.ports import SignOutcome, SignRequest
from keyreeve_keyserver.backends.software import SoftwareBackend
from keyreeve_keyserver.domain.secret import Secret
from keyreeve_keyserver.frames import Control, Refused, SignBatch, Signed, SignItem, SignResult, SignResults
from keyreeve_keyserver.signer.controls import ControlService
from keyreeve_keyserver.signer.judging import KeyTable
from keyreeve_keyserver.signer.sealing import PassphraseKey, Sealer
from keyreeve_keyserver.signer.service import SigningService

MESSAGE = build_tls13_content(Purpose.TLS13_SERVER_VERIFY, bytes(32))


class GatedBackend(SoftwareBackend):
    """Each signature waits, once it is made, for its gate."""

    def __init__(self) -> None:
        super().__init__("software", threads=1)
        self.gates: list[asyncio.Event] = []
        self.made = 0

    async def sign(self, requests: Sequence[SignRequest]) -> list[SignOutcome]:
        outcomes = await super().sign(requests)
        self.made += 1
        if self.gates:
            await self.gates.pop(0).wait()
        return outcomes


class Signer:
    def __init__(self) -> None:
        self.backend, keys = GatedBackend(), KeyTable()
        backends, now = {"software": self.backend}, lambda: datetime(2026, 1, 1, tzinfo=UTC)
        sealer = Sealer(PassphraseKey(Secret(bytes(32))))
        self.signing = SigningService(cast("Any", backends), keys, now=now, max_message=65_536)
        self.controls = ControlService(cast("Any", backends), keys, sealer, default_backend="software", now=now)

    async def control(self, op: str, **arguments: Any) -> dict[str, Any]:
        return await self.controls.run(Control(1, op, arguments))

    async def create(self) -> str:
        members = {"key_type": "ec-p256", "role": "handshake", "purposes": ["tls13_server_verify"]}
        return cast("str", (await self.control("create_key", key_id="web", **members))["record"])

    async def attest(self, record: str) -> dict[str, Any]:
        key = (await self.control("make_attestation_key"))["attestation_key"]
        nonce = base64.b64encode(bytes(16)).decode()
        return await self.control("attest_key", record=record, nonce=nonce, attestation_key=key)

    async def sign(self) -> SignResult:
        item = SignItem(1, KeyId("web"), 0x0403, 1, 5_000, MESSAGE)
        batch = SignBatch(1, "local", (item,))
        (result,) = [
            result
            async for frame in self.signing.sign(batch)
            if isinstance(frame, SignResults)
            for result in frame.results
        ]
        return result

    async def until_made(self, count: int) -> None:
        """So many signatures were made, or all tasks stand still: what waits for another waits for good."""
        for _ in range(200):
            if self.backend.made >= count:
                return
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("order", ["attested first", "loaded first"])
async def test_attestation_beside_a_load_leaves_the_key_loaded(order: str) -> None:
    signer = Signer()
    record = await signer.create()
    attested, loaded = asyncio.Event(), asyncio.Event()
    signer.backend.gates = [attested, loaded]
    attesting = asyncio.create_task(signer.attest(record))
    await signer.until_made(1)
    loading = asyncio.create_task(signer.control("load_key", record=record))
    await signer.until_made(2)
    for gate, task in [(attested, attesting), (loaded, loading)]:
        gate.set()
        if order == "attested first":
            await task
    await asyncio.gather(attesting, loading)
    assert isinstance(await signer.sign(), Signed)


async def test_key_that_is_forgotten_while_it_loads_is_not_loaded_afterwards() -> None:
    signer = Signer()
    record = await signer.create()
    gate = asyncio.Event()
    signer.backend.gates = [gate]
    loading = asyncio.create_task(signer.control("load_key", record=record))
    await signer.until_made(1)
    forgetting = asyncio.create_task(signer.control("forget_key", key_id="web"))
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(loading, forgetting, return_exceptions=True)
    result = await signer.sign()
    assert isinstance(result, Refused)
    assert isinstance(result.error, KeyNotFound)
    await signer.control("load_key", record=record)
    assert isinstance(await signer.sign(), Signed)


async def test_key_that_is_destroyed_while_it_loads_is_not_loaded_afterwards() -> None:
    signer = Signer()
    record = await signer.create()
    gate = asyncio.Event()
    signer.backend.gates = [gate]
    loading = asyncio.create_task(signer.control("load_key", record=record))
    await signer.until_made(1)
    destroying = asyncio.create_task(signer.control("destroy_key", record=record))
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(loading, destroying, return_exceptions=True)
    assert isinstance(await signer.sign(), Refused)


async def test_keys_that_are_loaded_elsewhere_are_not_kept_for_ever() -> None:
    signer, now = Signer(), [datetime(2026, 1, 1, tzinfo=UTC)]
    signer.controls._now = lambda: now[0]
    for _ in range(20):
        await signer.create()
        now[0] += timedelta(minutes=5)
    assert len(signer.controls._fresh) == 3
