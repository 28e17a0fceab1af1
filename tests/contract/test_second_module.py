"""A module that is not SoftHSM: opencryptoki's software token, which has RSA only, a daemon, and a PIN of 4 to 8 digits."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_der_public_key
from keyreeve_common.errors import (
    Conflict,
    FailedPrecondition,
    KeyNotFound,
    KeyTypeNotSupported,
    SealedRecordInvalid,
)
from keyreeve_common.key_id import KeyId
from keyreeve_common.pkcs11_uri import Pkcs11Uri
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType, SignatureScheme, schemes_of
from keyreeve_common.verification import verify_signature
from keyreeve_keyserver.backends.pkcs11_backend import Pkcs11Backend, Pkcs11Settings
from keyreeve_keyserver.backends.ports import BackendState, SignRequest
from keyreeve_keyserver.domain.keys import Custody, KeyRecord
from keyreeve_testing.opencryptoki import OpencryptokiToken, opencryptoki_is_usable, opencryptoki_token
from keyreeve_testing.softhsm import make_softhsm_token, softhsm_is_installed

pytestmark = pytest.mark.skipif(
    not opencryptoki_is_usable(), reason="opencryptoki is not installed, or this is not root"
)


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpencryptokiToken]:
    with opencryptoki_token(tmp_path_factory.mktemp("opencryptoki")) as made:
        yield made


def settings_of(token: OpencryptokiToken, custody: Custody = Custody.TOKEN_RESIDENT) -> Pkcs11Settings:
    uri = Pkcs11Uri(token=token.label, model="IBM SoftTok", module_path=token.module, pin_source=token.pin_file)
    return Pkcs11Settings(uri, custody=custody)


@pytest.fixture
async def backend(token: OpencryptokiToken) -> AsyncIterator[Pkcs11Backend]:
    made = Pkcs11Backend("opencryptoki", settings_of(token))
    await made.start()
    yield made
    await made.close()


async def loaded_key(backend: Pkcs11Backend, key_id: str, key_type: KeyType = KeyType.RSA_2048) -> KeyRecord:
    created = await backend.create(KeyId(key_id), key_type)
    assert created.attributes["never_extractable"]
    record = KeyRecord(
        key_id=KeyId(key_id),
        key_type=key_type,
        role=KeyRole.HANDSHAKE,
        purposes=frozenset({Purpose.TLS13_SERVER_VERIFY}),
        backend=backend.name,
        backend_ref=created.backend_ref,
        spki_der=created.spki_der,
        label="test",
        created=datetime(2026, 1, 1, tzinfo=UTC),
    )
    await backend.load(record, created.secret)
    return record


async def check_signs(backend: Pkcs11Backend, record: KeyRecord) -> None:
    schemes = schemes_of(record.key_type)
    requests = [SignRequest(record, scheme, b"message", time.monotonic() + 60) for scheme in schemes]
    for request, outcome in zip(requests, await backend.sign(requests), strict=True):
        assert isinstance(outcome, bytes), outcome
        public_key = load_der_public_key(record.spki_der)
        verify_signature(public_key, request.scheme, request.message, signature=outcome)


async def test_what_the_token_has_is_offered_and_nothing_else(backend: Pkcs11Backend) -> None:
    offered = backend.capabilities()
    assert set(offered.key_types) == {KeyType.RSA_2048, KeyType.RSA_3072, KeyType.RSA_4096}
    assert set(offered.schemes) == {scheme for scheme in SignatureScheme if scheme.name.startswith("RSA")}
    with pytest.raises(KeyTypeNotSupported):
        await backend.create(KeyId("ec"), KeyType.EC_P256)


@pytest.mark.parametrize("key_type", [KeyType.RSA_2048, KeyType.RSA_4096])
async def test_every_scheme_verifies(backend: Pkcs11Backend, key_type: KeyType) -> None:
    await check_signs(backend, await loaded_key(backend, f"schemes-{key_type.value}", key_type))


async def test_life_of_a_key(backend: Pkcs11Backend, token: OpencryptokiToken) -> None:
    record = await loaded_key(backend, "life")
    with pytest.raises(Conflict):
        await backend.create(KeyId("life"), KeyType.RSA_2048)
    again = Pkcs11Backend("opencryptoki", settings_of(token))
    await again.start()
    await again.load(record, None)
    await check_signs(again, record)
    await again.destroy(record)
    await again.destroy(record)
    with pytest.raises((KeyNotFound, SealedRecordInvalid)):
        await again.load(record, None)
    await again.close()


async def test_killed_worker_loses_no_request(backend: Pkcs11Backend) -> None:
    record = await loaded_key(backend, "killed")
    signing = [asyncio.create_task(check_signs(backend, record)) for _ in range(8)]
    os.kill(backend.worker_pids[0], signal.SIGKILL)
    await asyncio.gather(*signing)


async def test_wrapped_custody_is_refused_since_the_token_wraps_no_keys(token: OpencryptokiToken) -> None:
    backend = Pkcs11Backend("opencryptoki", settings_of(token, Custody.TOKEN_WRAPPED))
    await backend.start()
    with pytest.raises(FailedPrecondition, match="no AES key wrap"):
        await backend.create(KeyId("wrapped"), KeyType.RSA_2048)
    await backend.close()


@pytest.mark.skipif(not softhsm_is_installed(), reason="softhsm2 is not installed")
async def test_two_modules_serve_at_once(backend: Pkcs11Backend, tmp_path: Path) -> None:
    other = make_softhsm_token(tmp_path / "softhsm")
    uri = Pkcs11Uri(serial=other.serial, module_path=other.module, pin_source=other.pin_file)
    softhsm = Pkcs11Backend("softhsm", Pkcs11Settings(uri, softhsm_conf=other.conf))
    await softhsm.start()
    records = [await loaded_key(made, "both") for made in (backend, softhsm)]
    await asyncio.gather(*(check_signs(made, r) for made, r in zip((backend, softhsm), records, strict=True)))
    assert backend.health().state is softhsm.health().state is BackendState.UP
    await softhsm.close()
