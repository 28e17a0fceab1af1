"""Faults of real tokens, made by a module in front of SoftHSM: what the pool and its breaker make of them."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_der_public_key
from keyreeve_common.errors import DeadlineExceeded, KeyreeveError, TokenUnavailable
from keyreeve_common.key_id import KeyId
from keyreeve_common.pkcs11_uri import Pkcs11Uri
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType, schemes_of
from keyreeve_common.verification import verify_signature
from keyreeve_keyserver.backends.pkcs11_backend import Pkcs11Backend, Pkcs11Settings
from keyreeve_keyserver.backends.ports import Backend, BackendState, SignOutcome, SignRequest
from keyreeve_keyserver.backends.software import SoftwareBackend
from keyreeve_keyserver.backends.worker_place import PoolPolicy
from keyreeve_keyserver.domain.breaker import BreakerPolicy
from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_testing.faulty_module import FaultyModule, make_faulty_module
from keyreeve_testing.softhsm import SoftHsmToken, make_softhsm_token, softhsm_is_installed

pytestmark = [
    pytest.mark.softhsm,
    pytest.mark.skipif(not softhsm_is_installed(), reason="softhsm2 is not installed"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
]
QUICK = PoolPolicy(
    sign_timeout=timedelta(seconds=2),
    keepalive=timedelta(0),
    session_retry=timedelta(milliseconds=200),
    breaker=BreakerPolicy(3, timedelta(milliseconds=300), timedelta(seconds=1)),
)


@pytest.fixture
def token(tmp_path: Path) -> SoftHsmToken:
    return make_softhsm_token(tmp_path / "softhsm")


@pytest.fixture
def module(tmp_path: Path) -> FaultyModule:
    return make_faulty_module(tmp_path / "module")


@asynccontextmanager
async def started(
    token: SoftHsmToken, module: Path, *, workers: int = 1, policy: PoolPolicy = QUICK, name: str = "hsm"
) -> AsyncIterator[Pkcs11Backend]:
    uri = Pkcs11Uri(token=token.label, serial=token.serial, module_path=module, pin_source=token.pin_file)
    backend = Pkcs11Backend(
        name, Pkcs11Settings(uri, workers=workers, policy=policy, softhsm_conf=token.conf, writes=(module.parent,))
    )
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


async def loaded_key(backend: Backend, key_type: KeyType = KeyType.EC_P256) -> KeyRecord:
    created = await backend.create(KeyId("key"), key_type)
    record = KeyRecord(
        key_id=KeyId("key"),
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


async def sign(backend: Backend, record: KeyRecord, seconds: float = 30) -> SignOutcome:
    deadline = asyncio.get_running_loop().time() + seconds
    (outcome,) = await backend.sign([SignRequest(record, schemes_of(record.key_type)[0], b"message", deadline)])
    return outcome


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def is_up(backend: Backend) -> bool:
    return backend.health().state is BackendState.UP


async def test_pool_settles_at_the_sessions_that_the_token_bears(token: SoftHsmToken, module: FaultyModule) -> None:
    module.limit_sessions(2)
    async with started(token, module.path, workers=4) as backend:
        await until(lambda: backend.health().detail.startswith("2 of 4 workers"))
        health = backend.health()
        assert (health.state, health.workers, health.configured) == (BackendState.UP, 2, 4)
        record = await loaded_key(backend)
        assert isinstance(await sign(backend, record), bytes)
        module.limit_sessions(4)
        await until(lambda: backend.health().workers == 4)
        assert backend.health().detail == ""


async def test_token_without_a_session_left_is_down_and_says_so(token: SoftHsmToken, module: FaultyModule) -> None:
    module.limit_sessions(0)
    async with started(token, module.path) as backend:
        assert not is_up(backend)
        assert "no session left: configure fewer workers" in backend.health().detail
        module.limit_sessions(1)
        await until(lambda: is_up(backend))


async def test_keepalive_finds_a_lost_token_before_a_request_does(token: SoftHsmToken, module: FaultyModule) -> None:
    policy = replace(QUICK, keepalive=timedelta(milliseconds=100))
    async with started(token, module.path, policy=policy) as backend:
        record = await loaded_key(backend)
        module.fault("removed")
        await until(lambda: not is_up(backend))
        assert isinstance(await sign(backend, record), TokenUnavailable)
        module.fault("")
        await until(lambda: is_up(backend))
        assert isinstance(await sign(backend, record), bytes)


async def test_keepalive_finds_a_hanging_token(token: SoftHsmToken, module: FaultyModule) -> None:
    policy = replace(QUICK, keepalive=timedelta(milliseconds=100), sign_timeout=timedelta(milliseconds=500))
    policy = replace(policy, call_timeout=timedelta(seconds=1))
    async with started(token, module.path, policy=policy) as backend:
        record = await loaded_key(backend)
        module.fault("stall")
        await until(lambda: not is_up(backend))
        module.fault("")
        await until(lambda: is_up(backend))
        assert isinstance(await sign(backend, record), bytes)


async def test_lost_sessions_are_opened_again_without_a_lost_request(token: SoftHsmToken, module: FaultyModule) -> None:
    async with started(token, module.path, workers=2) as backend:
        record = await loaded_key(backend)
        await until(lambda: backend.health().workers == 2)
        pids = set(backend.worker_pids)
        for _ in range(3):
            module.fault("lose")
            outcomes = await asyncio.gather(*(sign(backend, record) for _ in range(8)))
            assert all(isinstance(outcome, bytes) for outcome in outcomes), outcomes
        assert set(backend.worker_pids) == pids


async def test_breaker_opens_refuses_at_once_and_closes(
    token: SoftHsmToken, module: FaultyModule, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with started(token, module.path, workers=2) as backend:
        record = await loaded_key(backend)
        module.fault("fail")
        for _ in range(QUICK.breaker.faults):
            outcome = await sign(backend, record)
            assert isinstance(outcome, TokenUnavailable)
            assert "DeviceError" in outcome.detail
        refused = await sign(backend, record)
        assert isinstance(refused, TokenUnavailable)
        assert "rests after faults in a row" in refused.detail
        assert refused.retry_after is not None
        assert timedelta(0) < refused.retry_after <= QUICK.breaker.pause
        assert not is_up(backend)
        await until(lambda: is_up(backend))  # the pause is over: the next request is the probe
        assert "DeviceError" in str(await sign(backend, record))
        assert not is_up(backend)
        module.fault("")
        await until(lambda: is_up(backend))
        assert isinstance(await sign(backend, record), bytes)
        assert isinstance(await sign(backend, record), bytes)
    names = [record.getMessage() for record in caplog.records if record.getMessage().startswith("breaker_")]
    assert names == ["breaker_opened", "breaker_opened", "breaker_closed"]


async def test_faults_of_requests_do_not_open_the_breaker(token: SoftHsmToken, module: FaultyModule) -> None:
    """A caller that asks for what cannot be, or gives no time, shuts nobody else out."""
    async with started(token, module.path) as backend:
        record = await loaded_key(backend)
        stranger = replace(record, backend_ref="0" * 32)
        for _ in range(QUICK.breaker.faults + 1):
            assert isinstance(await sign(backend, stranger), KeyreeveError)
            assert isinstance(await sign(backend, record, seconds=0), DeadlineExceeded)
        assert is_up(backend)
        assert isinstance(await sign(backend, record), bytes)


async def test_stalled_token_delays_no_other_backend(tmp_path: Path, token: SoftHsmToken, module: FaultyModule) -> None:
    other_token = make_softhsm_token(tmp_path / "other")
    software = SoftwareBackend("software")
    async with (
        started(token, module.path, workers=2) as stalled,
        started(other_token, other_token.module, name="other") as other,
    ):
        records = {backend.name: await loaded_key(backend) for backend in (stalled, other, software)}
        module.fault("stall-sign")
        stuck = [asyncio.create_task(sign(stalled, records["hsm"])) for _ in range(6)]
        for backend in (other, software):
            outcomes = await asyncio.gather(*(sign(backend, records[backend.name]) for _ in range(8)))
            assert all(isinstance(outcome, bytes) for outcome in outcomes)
        assert not any(task.done() for task in stuck)
        outcomes = await asyncio.gather(*stuck)
        assert all(isinstance(outcome, TokenUnavailable) for outcome in outcomes), outcomes
        module.fault("")
        await until(lambda: is_up(stalled) and stalled.health().workers > 0)
        assert isinstance(await sign(stalled, records["hsm"]), bytes)
    await software.close()


# CKM numbers: ECDSA; SHA256/384/512_RSA_PKCS; SHA256/384/512_RSA_PKCS_PSS.
@pytest.mark.parametrize(
    ("key_type", "hidden"),
    [
        (KeyType.RSA_2048, [0x40, 0x41, 0x42, 0x43, 0x44, 0x45]),
        (KeyType.RSA_2048, [0x01, 0x0D]),
        (KeyType.EC_P256, [0x1042]),
    ],
)
@pytest.mark.parametrize("lists_them", [False, True])
async def test_schemes_survive_the_lack_of_a_mechanism(
    token: SoftHsmToken, module: FaultyModule, key_type: KeyType, hidden: list[int], lists_them: bool
) -> None:
    """A token that does not hash, or lists what it then refuses, still signs with the other mechanism."""
    module.hide(*hidden, from_list=not lists_them)
    async with started(token, module.path) as backend:
        record = await loaded_key(backend, key_type)
        for scheme in schemes_of(key_type):
            assert scheme in backend.capabilities().schemes
            deadline = asyncio.get_running_loop().time() + 30
            (outcome,) = await backend.sign([SignRequest(record, scheme, b"message", deadline)])
            assert isinstance(outcome, bytes), outcome
            verify_signature(load_der_public_key(record.spki_der), scheme, b"message", signature=outcome)


async def test_request_of_a_hung_worker_goes_to_another_within_its_deadline(token: SoftHsmToken) -> None:
    async with started(token, token.module, workers=2) as backend:
        record = await loaded_key(backend)
        await until(lambda: backend.health().workers == 2)
        hung = backend.worker_pids[0]
        os.kill(hung, signal.SIGSTOP)
        outcomes = await asyncio.gather(*(sign(backend, record) for _ in range(4)))
        assert all(isinstance(outcome, bytes) for outcome in outcomes), outcomes
        assert hung not in backend.worker_pids
