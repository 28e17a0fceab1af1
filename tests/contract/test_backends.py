"""One suite over every backend: what it says it can do it does, and what it makes an independent verifier accepts."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key
from keyreeve_common.errors import (
    Conflict,
    DeadlineExceeded,
    KeyNotFound,
    KeySelfTestFailed,
    SchemeNotSupported,
    SealedRecordInvalid,
    StorageFull,
    TokenPinIncorrect,
    TokenUnavailable,
)
from keyreeve_common.key_id import KeyId
from keyreeve_common.pkcs11_uri import Pkcs11Uri
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import HASHES, KeyType, SignatureScheme, schemes_of
from keyreeve_common.vault.config import VaultLogin
from keyreeve_common.verification import rsa_padding
from keyreeve_engine import available
from keyreeve_keyserver.backends.engine_choice import choose_engines
from keyreeve_keyserver.backends.engines import EngineChoice
from keyreeve_keyserver.backends.pkcs11_backend import Pkcs11Backend, Pkcs11Settings
from keyreeve_keyserver.backends.ports import Backend, BackendState, CreatedKey, SignRequest
from keyreeve_keyserver.backends.software import SoftwareBackend
from keyreeve_keyserver.backends.worker_place import PoolPolicy
from keyreeve_keyserver.domain.keys import Custody, KeyRecord
from keyreeve_testing.openbao import PREFIX, TRANSIT_POLICY, OpenBao, transit_config, vault_backend
from keyreeve_testing.pausing import pausing_provider
from keyreeve_testing.softhsm import SoftHsmToken, make_softhsm_token, softhsm_is_installed

softhsm = pytest.mark.softhsm
needs_softhsm = pytest.mark.skipif(not softhsm_is_installed(), reason="softhsm2 is not installed")
_NUMBERS = itertools.count(1)
MESSAGE = b"a message that the signer has judged"


@pytest.fixture
def token(tmp_path: Path) -> SoftHsmToken:
    return make_softhsm_token(tmp_path / "softhsm")


def settings_of(token: SoftHsmToken, /, **changes: Any) -> Pkcs11Settings:
    fields: dict[str, Any] = {
        "token": Pkcs11Uri(token=token.label, module_path=token.module, pin_source=token.pin_file),
        "softhsm_conf": token.conf,
        "workers": 2,
    }
    return Pkcs11Settings(**{**fields, **changes})


@pytest.fixture
async def hsm(token: SoftHsmToken) -> AsyncIterator[Pkcs11Backend]:
    backend = Pkcs11Backend("hsm", settings_of(token))
    await backend.start()
    yield backend
    await backend.close()


@pytest.fixture(
    params=[
        "software-openssl",
        "software-multibuffer",
        "software-qat",
        pytest.param("softhsm", marks=[softhsm, needs_softhsm]),
        pytest.param("vault", marks=pytest.mark.openbao),
    ]
)
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Backend]:
    made: Backend
    if request.param == "software-multibuffer":
        if not available().usable:
            pytest.skip(available().reason)
        made = SoftwareBackend("software", engine=EngineChoice.MULTIBUFFER)
    elif request.param == "software-qat":
        provider = pausing_provider()
        provider.reset()
        made = SoftwareBackend("software", engines=choose_engines(EngineChoice.QAT, qat_provider=str(provider.path)))
        assert made.health().engine == "qat"
    elif request.param == "software-openssl":
        made = SoftwareBackend("software", engine=EngineChoice.OPENSSL)
    elif request.param == "vault":
        bao: OpenBao = request.getfixturevalue("bao")
        mount = bao.enable("transit")
        policy = bao.policy(TRANSIT_POLICY, mount=mount, prefix=PREFIX)
        token_file = bao.token(policy, directory=tmp_path)
        made = vault_backend(transit_config(bao, mount, login=VaultLogin.TOKEN, token_file=token_file))
    else:
        made = Pkcs11Backend("hsm", settings_of(make_softhsm_token(tmp_path / "softhsm")))
    await made.start()
    yield made
    await made.close()


def record_of(key_id: KeyId, key_type: KeyType, created: CreatedKey, backend: str) -> KeyRecord:
    return KeyRecord(
        key_id=key_id,
        key_type=key_type,
        role=KeyRole.HANDSHAKE,
        purposes=frozenset({Purpose.TLS13_SERVER_VERIFY}),
        backend=backend,
        backend_ref=created.backend_ref,
        spki_der=created.spki_der,
        label="test",
        created=datetime(2026, 1, 1, tzinfo=UTC),
    )


async def loaded_key(backend: Backend, key_type: KeyType) -> KeyRecord:
    key_id = KeyId(f"key-{next(_NUMBERS)}")
    created = await backend.create(key_id, key_type)
    record = record_of(key_id, key_type, created, backend.name)
    await backend.load(record, created.secret)
    return record


def request_for(
    record: KeyRecord, scheme: SignatureScheme | None = None, message: bytes = MESSAGE, seconds: float = 20
) -> SignRequest:
    return SignRequest(record, scheme or schemes_of(record.key_type)[-1], message, time.monotonic() + seconds)


def verify(record: KeyRecord, scheme: SignatureScheme, signature: object, message: bytes = MESSAGE) -> None:
    """Independent of the backend's own code path: `cryptography` on the SPKI. Raises on a wrong signature."""
    assert isinstance(signature, bytes), signature
    key = load_der_public_key(record.spki_der)
    if isinstance(key, ec.EllipticCurvePublicKey):
        key.verify(signature, message, ec.ECDSA(HASHES[scheme.facts.hash_name]()))
    elif isinstance(key, rsa.RSAPublicKey):
        key.verify(signature, message, rsa_padding(scheme), HASHES[scheme.facts.hash_name]())
    else:
        assert isinstance(key, ed25519.Ed25519PublicKey)
        key.verify(signature, message)


@pytest.mark.parametrize("key_type", list(KeyType))
async def test_every_scheme_verifies(backend: Backend, key_type: KeyType) -> None:
    if key_type not in backend.capabilities().key_types:
        pytest.skip(f"{backend.name} does not offer {key_type.value}")
    record = await loaded_key(backend, key_type)
    schemes = [scheme for scheme in schemes_of(key_type) if scheme in backend.capabilities().schemes]
    assert schemes
    outcomes = await backend.sign([request_for(record, scheme) for scheme in schemes])
    for scheme, outcome in zip(schemes, outcomes, strict=True):
        verify(record, scheme, outcome)


@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048])
async def test_a_signed_digest_is_the_signature_of_its_message(backend: Backend, key_type: KeyType) -> None:
    """With every scheme, beside whole messages of the same batch: neither is taken for the other."""
    record = await loaded_key(backend, key_type)
    schemes = [scheme for scheme in schemes_of(key_type) if scheme in backend.capabilities().schemes]
    requests = [request_for(record, scheme) for scheme in schemes]
    digests = [hashlib.new(scheme.facts.hash_name, MESSAGE).digest() for scheme in schemes]
    requests += [
        request_for(record, scheme, digest)._replace(prehashed=True)
        for scheme, digest in zip(schemes, digests, strict=True)
    ]
    outcomes = await backend.sign(requests)
    for scheme, outcome in zip([*schemes, *schemes], outcomes, strict=True):
        verify(record, scheme, outcome)


async def test_ed25519_signs_no_digest(backend: Backend) -> None:
    if KeyType.ED25519 not in backend.capabilities().key_types:
        pytest.skip(f"{backend.name} does not offer ed25519")
    record = await loaded_key(backend, KeyType.ED25519)
    whole, digest = await backend.sign(
        [request_for(record), request_for(record, message=bytes(64))._replace(prehashed=True)]
    )
    verify(record, SignatureScheme.ED25519, whole)
    assert isinstance(digest, SchemeNotSupported)


async def test_capabilities_are_what_these_backends_have(backend: Backend) -> None:
    offered = backend.capabilities()
    assert set(offered.key_types) == set(KeyType)
    assert set(offered.schemes) == set(SignatureScheme)
    assert backend.health().state is BackendState.UP
    assert backend.health().workers >= 1


async def test_mixed_batch_keeps_its_order_and_its_failures_apart(backend: Backend) -> None:
    records = [await loaded_key(backend, key_type) for key_type in (KeyType.EC_P256, KeyType.RSA_2048, KeyType.ED25519)]
    stranger = records[0]
    unknown = KeyRecord(
        **{**{name: getattr(stranger, name) for name in stranger.__slots__}, "key_id": KeyId("unknown")}
    )
    requests = [request_for(records[n % 3], message=f"message {n}".encode()) for n in range(60)]
    requests[7] = request_for(unknown)
    requests[11] = request_for(records[0], seconds=-1)
    outcomes = await backend.sign(requests)
    for n, outcome in enumerate(outcomes):
        if n == 7:
            assert isinstance(outcome, KeyNotFound)
        elif n == 11:
            assert isinstance(outcome, DeadlineExceeded)
        else:
            verify(requests[n].record, requests[n].scheme, outcome, requests[n].message)


async def test_forgotten_key_is_not_found_until_loaded_again(backend: Backend) -> None:
    key_id = KeyId("life")
    created = await backend.create(key_id, KeyType.EC_P256)
    record = record_of(key_id, KeyType.EC_P256, created, backend.name)
    assert isinstance((await backend.sign([request_for(record)]))[0], KeyNotFound)
    await backend.load(record, created.secret)
    verify(record, SignatureScheme.ECDSA_SECP256R1_SHA256, (await backend.sign([request_for(record)]))[0])
    backend.forget(key_id)
    backend.forget(key_id)
    assert isinstance((await backend.sign([request_for(record)]))[0], KeyNotFound)


async def test_destroyed_key_is_gone(backend: Backend) -> None:
    record = await loaded_key(backend, KeyType.EC_P256)
    await backend.destroy(record)
    await backend.destroy(record)
    assert isinstance((await backend.sign([request_for(record)]))[0], KeyNotFound)
    with pytest.raises((KeyNotFound, SealedRecordInvalid)):
        await backend.load(record, None)


async def test_signatures_of_concurrent_batches_verify(backend: Backend) -> None:
    record = await loaded_key(backend, KeyType.EC_P256)
    batches = [[request_for(record, message=f"{b}-{n}".encode()) for n in range(40)] for b in range(4)]
    for requests, outcomes in zip(batches, await asyncio.gather(*map(backend.sign, batches)), strict=True):
        for request, outcome in zip(requests, outcomes, strict=True):
            verify(record, request.scheme, outcome, request.message)


async def test_software_key_of_another_record_is_refused() -> None:
    backend = SoftwareBackend("software")
    one, two = [await backend.create(KeyId(name), KeyType.EC_P256) for name in ("one", "two")]
    await backend.load(record_of(KeyId("one"), KeyType.EC_P256, one, "software"), one.secret)
    with pytest.raises(KeySelfTestFailed, match="not the one of the record's header"):
        await backend.load(record_of(KeyId("one"), KeyType.EC_P256, one, "software"), two.secret)
    await backend.close()


async def test_request_judged_by_one_record_is_not_signed_by_the_key_of_another() -> None:
    """The front end can have two records of one key id; loading the second must not catch what waits under the first."""
    backend = SoftwareBackend("software")
    one, two = [await backend.create(KeyId("same"), KeyType.EC_P256) for _ in range(2)]
    judged_by, loaded_now = [record_of(KeyId("same"), KeyType.EC_P256, made, "software") for made in (one, two)]
    await backend.load(judged_by, one.secret)
    waiting = request_for(judged_by)
    backend.forget(KeyId("same"))
    await backend.load(loaded_now, two.secret)
    assert isinstance((await backend.sign([waiting]))[0], KeyNotFound)
    verify(loaded_now, waiting.scheme, (await backend.sign([request_for(loaded_now)]))[0])
    await backend.close()


_PEEK = """
import sys, pkcs11
from pkcs11 import Attribute, ObjectClass, exceptions
module, label, pin_file, key_id = sys.argv[1:]
token = pkcs11.lib(module).get_token(token_label=label)
with token.open(user_pin=open(pin_file).read().strip()) as session:
    for kind in (ObjectClass.PRIVATE_KEY,):
        key = session.get_key(object_class=kind, label=key_id)
        for attribute in (Attribute.VALUE, Attribute.PRIVATE_EXPONENT, Attribute.PRIME_1, Attribute.PRIME_2):
            try:
                value = key[attribute]
            except (exceptions.AttributeSensitive, exceptions.AttributeTypeInvalid) as error:
                print(attribute.name, type(error).__name__)
            else:
                print(attribute.name, "READ", len(value))
        print("flags", key[Attribute.EXTRACTABLE], key[Attribute.SENSITIVE], key[Attribute.TOKEN])
        try:
            key[Attribute.EXTRACTABLE] = True
            print("EXTRACTABLE was SET")
        except exceptions.PKCS11Error as error:
            print("set", type(error).__name__)
"""


@softhsm
@needs_softhsm
@pytest.mark.parametrize("key_type", [KeyType.EC_P256, KeyType.ED25519, KeyType.RSA_2048])
async def test_token_key_cannot_be_read_out(hsm: Pkcs11Backend, token: SoftHsmToken, key_type: KeyType) -> None:
    created = await hsm.create(KeyId("fixed"), key_type)
    assert created.secret is None
    assert hsm.capabilities().custody is Custody.TOKEN_RESIDENT
    assert created.attributes == {
        "token": token.label,
        "object_label": "fixed",
        "extractable": False,
        "sensitive": True,
        "generated_in_token": True,
        "never_extractable": True,
        "always_sensitive": True,
    }
    arguments = [str(token.module), token.label, str(token.pin_file), "fixed"]
    seen = subprocess.run(
        [sys.executable, "-c", _PEEK, *arguments],
        env={**os.environ, "SOFTHSM2_CONF": str(token.conf)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "READ" not in seen
    assert "was SET" not in seen
    assert "AttributeSensitive" in seen
    assert "flags False True True" in seen


@softhsm
@needs_softhsm
async def test_second_key_of_one_id_is_a_conflict(hsm: Pkcs11Backend) -> None:
    await hsm.create(KeyId("once"), KeyType.EC_P256)
    with pytest.raises(Conflict):
        await hsm.create(KeyId("once"), KeyType.EC_P256)


@softhsm
@needs_softhsm
async def test_keys_outlive_the_workers(token: SoftHsmToken) -> None:
    first = Pkcs11Backend("hsm", settings_of(token, workers=1))
    await first.start()
    record = await loaded_key(first, KeyType.EC_P256)
    await first.close()
    second = Pkcs11Backend("hsm", settings_of(token, workers=1))
    await second.start()
    await second.load(record, None)
    verify(record, SignatureScheme.ECDSA_SECP256R1_SHA256, (await second.sign([request_for(record)]))[0])
    await second.close()


@softhsm
@needs_softhsm
async def test_record_of_a_destroyed_key_does_not_open_a_later_key_of_its_id(hsm: Pkcs11Backend) -> None:
    """The front end chooses key ids: an old record, with another role or profile, must not fit the new key."""
    first = await loaded_key(hsm, KeyType.EC_P256)
    await hsm.destroy(first)
    second = await hsm.create(first.key_id, KeyType.EC_P256)
    with pytest.raises(KeyNotFound):
        await hsm.load(first, None)
    await hsm.load(record_of(first.key_id, KeyType.EC_P256, second, "hsm"), None)
    assert isinstance((await hsm.sign([request_for(first)]))[0], KeyNotFound)


@softhsm
@needs_softhsm
async def test_key_forgotten_while_the_token_signs_releases_nothing(hsm: Pkcs11Backend) -> None:
    """Without its public key an RSA result could not be verified before release."""
    record = await loaded_key(hsm, KeyType.RSA_2048)
    signing = asyncio.create_task(hsm.sign([request_for(record)]))
    await asyncio.sleep(0)
    hsm.forget(record.key_id)
    assert isinstance((await signing)[0], KeyNotFound)


async def until_workers(backend: Pkcs11Backend, count: int) -> None:
    async with asyncio.timeout(30):
        while len(backend.worker_pids) < count:
            await asyncio.sleep(0.01)


@softhsm
@needs_softhsm
async def test_killed_worker_loses_no_request(hsm: Pkcs11Backend) -> None:
    record = await loaded_key(hsm, KeyType.EC_P256)
    await until_workers(hsm, 2)
    before = set(hsm.worker_pids)
    killed: list[int] = []

    async def batches() -> list[object]:
        outcomes: list[object] = []
        for n in range(30):
            outcomes += await hsm.sign([request_for(record) for _ in range(40)])
            if n in (5, 15):
                victim = hsm.worker_pids[0]
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)
        return outcomes

    for outcome in itertools.chain(*await asyncio.gather(batches(), batches())):
        verify(record, SignatureScheme.ECDSA_SECP256R1_SHA256, outcome)
    await until_workers(hsm, 2)
    assert set(hsm.worker_pids) - before
    assert not set(hsm.worker_pids) & set(killed)


@softhsm
@needs_softhsm
async def test_stopped_worker_is_a_deadline_and_then_is_replaced(token: SoftHsmToken) -> None:
    backend = Pkcs11Backend("hsm", settings_of(token, workers=1, policy=PoolPolicy(sign_timeout=timedelta(seconds=2))))
    await backend.start()
    record = await loaded_key(backend, KeyType.EC_P256)
    (pid,) = backend.worker_pids
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    (outcome,) = await backend.sign([request_for(record, seconds=0.2)])
    assert isinstance(outcome, DeadlineExceeded)
    assert time.monotonic() - began < 1.5
    verify(record, SignatureScheme.ECDSA_SECP256R1_SHA256, (await backend.sign([request_for(record)]))[0])
    assert backend.worker_pids != (pid,)
    await backend.close()


async def started_down(backend: Pkcs11Backend) -> str:
    await backend.start()
    assert backend.health().state is BackendState.DOWN
    with pytest.raises(TokenUnavailable) as refused:
        await backend.create(KeyId("x"), KeyType.EC_P256)
    await backend.close()
    assert "\n" not in refused.value.detail
    return refused.value.detail


@softhsm
@needs_softhsm
async def test_faults_are_named_and_say_what_to_do(token: SoftHsmToken, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    not_a_module = tmp_path / "module.so"
    not_a_module.write_bytes(b"not an ELF file")
    named = settings_of(token).token
    cases: dict[str, Pkcs11Settings] = {
        "does not exist: install it": settings_of(token, token=replace(named, module_path=missing)),
        "does not load or start": settings_of(token, token=replace(named, module_path=not_a_module)),
        "no token matches pkcs11:token=nobody (there are: 'keyreeve-test'": settings_of(
            token, token=replace(named, token="nobody")
        ),
        "cannot be read or names no directories.tokendir": settings_of(token, softhsm_conf=missing),
        "cannot be read: give the worker's user access": settings_of(token, token=replace(named, pin_source=missing)),
    }
    for text, settings in cases.items():
        assert text in await started_down(Pkcs11Backend("hsm", settings))
    token.directory.rename(tmp_path / "moved")
    assert "token directory" in await started_down(Pkcs11Backend("hsm", settings_of(token)))


@softhsm
@needs_softhsm
async def test_uri_chooses_among_the_tokens_of_a_module(tmp_path: Path) -> None:
    """Two tokens of one label: the serial tells them apart, and each backend has its own keys."""
    token = make_softhsm_token(tmp_path / "softhsm")
    twin = make_softhsm_token(tmp_path / "softhsm", pin_name="pin-of-twin")
    one, two = (settings_of(made, token=replace(settings_of(made).token, serial=made.serial)) for made in (token, twin))
    assert one.token.serial != two.token.serial
    detail = await started_down(Pkcs11Backend("hsm", settings_of(token)))
    assert "several tokens match pkcs11:token=keyreeve-test" in detail
    backends = [Pkcs11Backend("one", one), Pkcs11Backend("two", two)]
    for backend in backends:
        await backend.start()
    records = [await loaded_key(backend, KeyType.EC_P256) for backend in backends]
    for backend, record, foreign in zip(backends, records, reversed(records), strict=True):
        verify(record, SignatureScheme.ECDSA_SECP256R1_SHA256, (await backend.sign([request_for(record)]))[0])
        with pytest.raises(KeyNotFound):
            await backend.load(foreign, None)
        await backend.close()


@softhsm
@needs_softhsm
async def test_backend_comes_up_when_its_token_does(token: SoftHsmToken, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    token.directory.rename(moved)
    backend = Pkcs11Backend("hsm", settings_of(token))
    await backend.start()
    assert backend.health().state is BackendState.DOWN
    moved.rename(token.directory)
    await until_workers(backend, 1)
    await loaded_key(backend, KeyType.EC_P256)
    assert backend.health().state is BackendState.UP
    await backend.close()


@softhsm
@needs_softhsm
async def test_wrong_pin_is_tried_once(token: SoftHsmToken) -> None:
    pin = token.pin
    token.pin_file.write_text("0" * 8)
    backend = Pkcs11Backend("hsm", settings_of(token))
    with pytest.raises(TokenPinIncorrect, match="correct the PIN file") as refused:
        await backend.start()
    assert backend.worker_pids == ()
    assert pin not in str(refused.value)
    await backend.close()


@softhsm
@needs_softhsm
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
async def test_full_disk_is_storage_full(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "none", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        token = make_softhsm_token(small / "softhsm")
        backend = Pkcs11Backend("hsm", settings_of(token, workers=1))
        await backend.start()
        record = await loaded_key(backend, KeyType.EC_P256)

        async def fill() -> None:
            for n in range(200):
                await backend.create(KeyId(f"many-{n}"), KeyType.EC_P256)

        with pytest.raises(StorageFull, match="is full: make room"):
            await fill()
        verify(record, SignatureScheme.ECDSA_SECP256R1_SHA256, (await backend.sign([request_for(record)]))[0])
        await backend.close()
    finally:
        subprocess.run(["umount", str(small)], check=True)


_LOSE_SESSION = """
import sys
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_keyserver.domain.secret import Secret
from keyreeve_keyserver.backends.worker_frames import TokenSignItem
from keyreeve_keyserver.backends.pkcs11_token import Token, TokenSettings
import time
token = Token(TokenSettings(*sys.argv[1:4]), Secret(sys.argv[4].encode()))
token.create("k", "label", KeyType.EC_P256)
item = TokenSignItem("k", SignatureScheme.ECDSA_SECP256R1_SHA256, 2**63, b"message")
token.sign(item)
token._session.close()
print("again", len(token.sign(item)) > 60)
token._session.close()
print("found", token.find("k"))
token._session.close()
token.destroy("k")
try:
    token.find("k")
except Exception as error:
    print(type(error).__name__)
"""


@softhsm
@needs_softhsm
def test_lost_session_is_opened_again_and_the_key_found_again(token: SoftHsmToken) -> None:
    arguments = [str(token.module), f"pkcs11:token={token.label}", str(token.conf), token.pin]
    ended = subprocess.run(
        [sys.executable, "-c", _LOSE_SESSION, *arguments], capture_output=True, text=True, check=False
    )
    assert ended.stdout.splitlines() == ["again True", "found None", "KeyNotFound"], ended.stderr


_LOSE_SESSION_AND_PIN = """
import sys, time
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_keyserver.backends.launch import WorkerStart
from keyreeve_keyserver.domain.secret import Secret
from keyreeve_keyserver.backends.worker_frames import Open, TokenSign, TokenSignItem
from keyreeve_keyserver.backends.pkcs11_token import Token
from keyreeve_keyserver.backends.pkcs11_worker import Worker

class Counted:
    def __init__(self, token):
        self.token, self.tries = token, 0
    def __getattr__(self, name):
        return getattr(self.token, name)
    def open(self, **arguments):
        self.tries += 1
        return self.token.open(**arguments)

settings = dict(zip(("module", "token", "softhsm_conf"), sys.argv[1:]))
worker = Worker(WorkerStart(settings, {"pin_file": Secret(sys.argv[4].encode())}))
worker.answer(Open())
token = worker._token
token.create("k", "label", KeyType.EC_P256)
token._pin = Secret(b"00000000")
token._token = counted = Counted(token._token)
token._session.close()
item = TokenSignItem("k", SignatureScheme.ECDSA_SECP256R1_SHA256, 2**63, b"message")
for _ in range(3):
    answer = worker.answer(TokenSign((item,) * 4))
print(sorted({outcome.code.value for outcome in answer.outcomes}), counted.tries)
"""


@softhsm
@needs_softhsm
def test_wrong_pin_is_tried_once_when_the_session_is_lost(token: SoftHsmToken) -> None:
    arguments = [str(token.module), f"pkcs11:token={token.label}", str(token.conf), token.pin]
    ended = subprocess.run(
        [sys.executable, "-c", _LOSE_SESSION_AND_PIN, *arguments], capture_output=True, text=True, check=False
    )
    assert ended.stdout.splitlines() == ["['token_pin_incorrect'] 1"], ended.stderr
