"""Keys that rest outside the token: many are served by few objects, and a blob opens only in its token, for its record."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from os import environ
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_der_public_key
from keyreeve_common.errors import (
    FailedPrecondition,
    KeyNotFound,
    KeySelfTestFailed,
    KeyTypeNotSupported,
    SealedRecordInvalid,
)
from keyreeve_common.key_id import KeyId
from keyreeve_common.pkcs11_uri import Pkcs11Uri
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType, schemes_of
from keyreeve_common.verification import verify_signature
from keyreeve_keyserver.backends.pkcs11_backend import Pkcs11Backend, Pkcs11Settings
from keyreeve_keyserver.backends.ports import Backend, CreatedKey, SignRequest
from keyreeve_keyserver.backends.software import SoftwareBackend
from keyreeve_keyserver.domain.keys import Custody, KeyRecord
from keyreeve_keyserver.domain.secret import Secret
from keyreeve_keyserver.domain.wrapped_key import parse_wrapped_key
from keyreeve_keyserver.signer.self_test import load_tested
from keyreeve_testing.faulty_module import make_faulty_module
from keyreeve_testing.softhsm import SoftHsmToken, make_softhsm_token, softhsm_is_installed

pytestmark = [
    pytest.mark.softhsm,
    pytest.mark.skipif(not softhsm_is_installed(), reason="softhsm2 is not installed"),
]
LOADED_KEYS = 8


@pytest.fixture
def token(tmp_path: Path) -> SoftHsmToken:
    return make_softhsm_token(tmp_path / "softhsm")


@asynccontextmanager
async def started(token: SoftHsmToken, *, module: Path | None = None, **changes: Any) -> AsyncIterator[Pkcs11Backend]:
    uri = Pkcs11Uri(serial=token.serial, module_path=module or token.module, pin_source=token.pin_file)
    fields: dict[str, Any] = {"custody": Custody.TOKEN_WRAPPED, "loaded_keys": LOADED_KEYS, "workers": 1, **changes}
    if module is not None:
        fields["writes"] = (module.parent,)  # what steers a faulty module stands beside it
    backend = Pkcs11Backend("hsm", Pkcs11Settings(uri, softhsm_conf=token.conf, **fields))
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


def record_of(key_id: str, key_type: KeyType, created: CreatedKey) -> KeyRecord:
    return KeyRecord(
        key_id=KeyId(key_id),
        key_type=key_type,
        role=KeyRole.HANDSHAKE,
        purposes=frozenset({Purpose.TLS13_SERVER_VERIFY}),
        backend="hsm",
        backend_ref=created.backend_ref,
        spki_der=created.spki_der,
        label="test",
        created=datetime(2026, 1, 1, tzinfo=UTC),
    )


async def made_key(
    backend: Backend, key_id: str = "key", key_type: KeyType = KeyType.EC_P256
) -> tuple[KeyRecord, Secret]:
    created = await backend.create(KeyId(key_id), key_type)
    assert created.secret is not None
    return record_of(key_id, key_type, created), created.secret


async def check_signs(backend: Backend, *records: KeyRecord) -> None:
    requests = [SignRequest(r, schemes_of(r.key_type)[0], b"message", time.monotonic() + 60) for r in records]
    for request, outcome in zip(requests, await backend.sign(requests), strict=True):
        assert isinstance(outcome, bytes), outcome
        public_key = load_der_public_key(request.record.spki_der)
        verify_signature(public_key, request.scheme, request.message, signature=outcome)


_INSIDE = """
import sys
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_keyserver.backends.pkcs11_token import Token, TokenSettings
from keyreeve_keyserver.backends.worker_frames import TokenSignItem
from keyreeve_keyserver.domain.secret import Secret
import time
module, uri, conf, pin = sys.argv[1:5]
token = Token(TokenSettings(module, uri, conf, "token-wrapped", "keyreeve-wrapping", 8), Secret(pin.encode()))
objects = lambda: len(list(token._session.get_objects()))
{body}
"""


def inside(token: SoftHsmToken, body: str) -> list[str]:
    """Runs `body` in a process that is the worker: only it sees the session objects."""
    arguments = [str(token.module), f"pkcs11:serial={token.serial}", str(token.conf), token.pin]
    ended = subprocess.run(
        [sys.executable, "-c", _INSIDE.format(body=body), *arguments],
        env={**environ, "SOFTHSM2_CONF": str(token.conf)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048])
async def test_wrapped_key_signs_with_each_scheme_after_a_restart(token: SoftHsmToken, key_type: KeyType) -> None:
    async with started(token) as backend:
        assert backend.capabilities().custody is Custody.TOKEN_WRAPPED
        record, secret = await made_key(backend, key_type=key_type)
        assert parse_wrapped_key(secret.reveal()).key_type is key_type
    async with started(token, workers=2) as backend:
        await backend.load(record, secret)
        for scheme in schemes_of(key_type):
            request = SignRequest(record, scheme, b"message", time.monotonic() + 60)
            (outcome,) = await backend.sign([request])
            assert isinstance(outcome, bytes), outcome
            verify_signature(load_der_public_key(record.spki_der), scheme, b"message", signature=outcome)


async def test_token_says_what_the_key_was_at_its_birth(token: SoftHsmToken) -> None:
    async with started(token) as backend:
        created = await backend.create(KeyId("key"), KeyType.EC_P256)
        assert created.attributes == {
            "token": token.label,
            "object_label": "",
            "extractable": True,
            "sensitive": True,
            "generated_in_token": True,
            "never_extractable": False,
            "always_sensitive": True,
            "wrap_with_trusted": False,
        }


async def test_type_that_the_token_does_not_wrap_is_not_offered(token: SoftHsmToken) -> None:
    """SoftHSM 2.6 lists EdDSA and wraps no Edwards key."""
    async with started(token) as backend:
        assert KeyType.ED25519 not in backend.capabilities().key_types
        assert KeyType.EC_P256 in backend.capabilities().key_types
        with pytest.raises(KeyTypeNotSupported):
            await backend.create(KeyId("key"), KeyType.ED25519)


async def test_many_keys_are_served_by_few_objects(token: SoftHsmToken) -> None:
    async with started(token, workers=2) as backend:
        keys = [await made_key(backend, f"key-{n}") for n in range(150)]
        for record, secret in keys:
            await backend.load(record, secret)
        records = [record for record, _ in keys]
        await check_signs(backend, *records)
        await asyncio.gather(*(check_signs(backend, *records[n::5]) for n in range(5)))
    # Nothing but the wrapping key was left in the token.
    assert inside(token, "print(objects())") == ["1"]


def test_a_worker_never_holds_more_than_it_may(token: SoftHsmToken) -> None:
    body = """
blobs = [bytes.fromhex(token.create(str(n), str(n), KeyType.EC_P256)["wrapped"]) for n in range(30)]
print(objects())
seen = set()
for n in list(range(30)) * 2 + [29] * 5:
    item = TokenSignItem(f"ref-{n}", SignatureScheme.ECDSA_SECP256R1_SHA256, 2**63, b"message", wrapped=blobs[n])
    token.sign(item)
    seen.add(objects())
print(max(seen))
token.destroy("ref-29")
print(objects())
token._session.close()
token.sign(item)
print(objects())
key = token._private_key("ref-29", blobs[29])
from pkcs11 import Attribute
print(key[Attribute.EXTRACTABLE], key[Attribute.SENSITIVE], key[Attribute.TOKEN], key[Attribute.DECRYPT])
"""
    assert inside(token, body) == ["1", "9", "8", "2", "False True False False"]


async def test_destroyed_key_is_in_no_worker(token: SoftHsmToken) -> None:
    async with started(token, workers=3) as backend:
        record, secret = await made_key(backend)
        await backend.load(record, secret)
        await asyncio.gather(*(check_signs(backend, record) for _ in range(12)))
        await backend.destroy(record)
        await backend.destroy(record)
        request = SignRequest(record, schemes_of(record.key_type)[0], b"message", time.monotonic() + 60)
        assert isinstance((await backend.sign([request]))[0], KeyNotFound)


async def test_blob_of_another_token_is_refused(tmp_path: Path, token: SoftHsmToken) -> None:
    other = make_softhsm_token(tmp_path / "other")
    async with started(token) as backend:
        record, secret = await made_key(backend)
    async with started(other) as stranger:
        await made_key(stranger)
        with pytest.raises(SealedRecordInvalid, match="no such wrapping key"):
            await stranger.load(record, secret)


async def test_damaged_blob_is_refused_and_the_token_goes_on(token: SoftHsmToken) -> None:
    async with started(token) as backend:
        record, secret = await made_key(backend)
        blob = parse_wrapped_key(secret.reveal())
        other = parse_wrapped_key((await made_key(backend, "other"))[1].reveal())
        flipped = bytes([blob.wrapped[0] ^ 1]) + blob.wrapped[1:]
        for damaged in (
            replace(blob, wrapped=flipped),
            replace(blob, wrapped=blob.wrapped[:-8]),
            replace(blob, wrapped=blob.wrapped[:40] + other.wrapped[40:]),
            replace(blob, wrapping_id=b"elsewhere"),
            replace(blob, mechanism=0x1082),  # CKM_AES_CBC: no integrity
            replace(blob, key_type=KeyType.RSA_2048),
        ):
            with pytest.raises(SealedRecordInvalid):
                await backend.load(record, Secret(damaged.to_bytes()))
        for noise in (b"no blob", b"KRW1", bytes(5000)):
            with pytest.raises(SealedRecordInvalid):
                await backend.load(record, Secret(noise))
        await backend.load(record, secret)
        await check_signs(backend, record)


async def test_swapped_blob_is_refused_at_load(token: SoftHsmToken) -> None:
    """Who could forge a seal and swap two blobs still finds that the key does not fit the record's public key."""
    async with started(token) as backend:
        record, _ = await made_key(backend)
        _, secret = await made_key(backend, "other")
        with pytest.raises(KeySelfTestFailed):
            await load_tested(backend, record, secret)


async def test_software_key_is_no_wrapped_key(token: SoftHsmToken) -> None:
    software = SoftwareBackend("software")
    created = await software.create(KeyId("key"), KeyType.EC_P256)
    async with started(token) as backend:
        with pytest.raises(SealedRecordInvalid, match="holds no wrapped key"):
            await backend.load(record_of("key", KeyType.EC_P256, created), created.secret)
    await software.close()


async def test_request_judged_by_one_record_is_not_signed_by_the_key_of_another(token: SoftHsmToken) -> None:
    async with started(token) as backend:
        judged_by, first = await made_key(backend)
        await backend.load(judged_by, first)
        loaded_now, second = await made_key(backend)
        await backend.load(loaded_now, second)
        request = SignRequest(judged_by, schemes_of(judged_by.key_type)[0], b"message", time.monotonic() + 60)
        assert isinstance((await backend.sign([request]))[0], KeyNotFound)
        await check_signs(backend, loaded_now)


async def test_both_custodies_are_served_whatever_new_keys_get(token: SoftHsmToken) -> None:
    async with started(token, custody=Custody.TOKEN_RESIDENT) as backend:
        created = await backend.create(KeyId("resident"), KeyType.EC_P256)
        assert created.secret is None
        resident = record_of("resident", KeyType.EC_P256, created)
    async with started(token) as backend:
        wrapped, secret = await made_key(backend, "wrapped")
    for custody in (Custody.TOKEN_RESIDENT, Custody.TOKEN_WRAPPED):
        async with started(token, custody=custody) as backend:
            await backend.load(resident, None)
            await backend.load(wrapped, secret)
            await check_signs(backend, resident, wrapped)


def test_wrapping_key_that_may_decrypt_is_refused(token: SoftHsmToken) -> None:
    body = """
import pkcs11
token._session.generate_key(pkcs11.KeyType.AES, 256, id=b"bad", label="keyreeve-wrapping", store=True)
try:
    token.create("ref", "label", KeyType.EC_P256)
except Exception as error:
    print(type(error).__name__, "may decrypt" in str(error))
"""
    assert inside(token, body) == ["FailedPrecondition True"]


async def test_token_without_key_wrap_says_so(tmp_path: Path, token: SoftHsmToken) -> None:
    module = make_faulty_module(tmp_path / "module")
    module.hide(0x2109, 0x210A, 0x210B, 0x210C)
    async with started(token, module=module.path) as backend:
        with pytest.raises(FailedPrecondition, match="wraps no keys"):
            await backend.create(KeyId("key"), KeyType.EC_P256)


async def test_lost_sessions_and_killed_workers_lose_no_wrapped_key(tmp_path: Path, token: SoftHsmToken) -> None:
    module = make_faulty_module(tmp_path / "module")
    async with started(token, module=module.path, workers=2) as backend:
        keys = [await made_key(backend, f"key-{n}") for n in range(12)]
        for record, secret in keys:
            await backend.load(record, secret)
        for _ in range(2):
            module.fault("lose")
            await check_signs(backend, *(record for record, _ in keys))
