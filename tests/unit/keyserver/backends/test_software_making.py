"""Making RSA keys takes seconds each: nothing else of the software backend waits for it."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType
from keyreeve_keyserver.backends import software
from keyreeve_keyserver.backends.software import SoftwareBackend
from keyreeve_keyserver.domain.keys import KeyRecord


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.RSA_2048])
async def test_no_load_waits_while_large_keys_are_made(monkeypatch: pytest.MonkeyPatch, key_type: KeyType) -> None:
    """A queue of RSA-4096 keys that are being made: a key that a handshake waits for is made, if it is small, and loaded all the same."""
    backend = SoftwareBackend("soft", threads=1)
    key = rsa.generate_private_key(65537, 2048)
    before = await backend.create(KeyId("k"), key_type)
    begun, go = threading.Event(), threading.Event()

    def slowly() -> rsa.RSAPrivateKey:
        begun.set()
        assert go.wait(60)
        return key

    monkeypatch.setitem(software._GENERATORS, KeyType.RSA_4096, slowly)
    making = [asyncio.create_task(backend.create(KeyId(f"large-{n}"), KeyType.RSA_4096)) for n in range(3)]
    try:
        assert await asyncio.to_thread(begun.wait, 20)
        async with asyncio.timeout(20):
            created = before if key_type is KeyType.RSA_2048 else await backend.create(KeyId("k"), key_type)
            purposes = frozenset({Purpose.TLS13_SERVER_VERIFY})
            now = datetime(2026, 1, 1, tzinfo=UTC)
            record = KeyRecord(
                KeyId("k"), key_type, KeyRole.HANDSHAKE, purposes, "soft", "k", created.spki_der, "", now
            )
            await backend.load(record, created.secret)
    finally:
        go.set()
        await asyncio.gather(*making)
        await backend.close()
