"""The QAT engine over a provider that pauses its jobs as a card's does: no fault of the card costs a signature, and each is said.

The provider is ours, in C; no card was there when this ran (docs/qat.md).
"""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_public_key
from keyreeve_common.errors import ConfigInvalid, DeadlineExceeded
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import DEFAULT_SCHEMES, KeyType
from keyreeve_common.verification import verify_signature
from keyreeve_engine import asyncsign
from keyreeve_keyserver.backends import qat_engine
from keyreeve_keyserver.backends.engine_choice import Engines, choose_engines
from keyreeve_keyserver.backends.engines import EngineChoice, EngineUnusable
from keyreeve_keyserver.backends.openssl_engine import OpenSslEngine
from keyreeve_keyserver.backends.ports import SignRequest
from keyreeve_keyserver.backends.qat_engine import PIECES, QatEngine, open_qat
from keyreeve_keyserver.backends.software import SoftwareBackend
from keyreeve_keyserver.domain.breaker import BreakerPolicy
from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_keyserver.signer.config import BackendConfig, BackendKind, SealingConfig, SignerConfig
from keyreeve_testing.pausing import Count, Fault, Knob, PausingProvider, pausing_provider

MESSAGE = b"a message that the signer has judged"


class Clock:
    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


@pytest.fixture
def provider() -> Iterator[PausingProvider]:
    found = pausing_provider()
    found.reset()
    yield found
    found.reset()  # what hung is let go, so that no thread of a closed engine stays


@dataclass
class Setup:
    """A software backend whose preferred engine is a card; the breaker opens after two faults."""

    backend: SoftwareBackend
    card: QatEngine
    provider: PausingProvider
    clock: Clock
    records: dict[KeyType, KeyRecord]

    async def sign(self, key_type: KeyType, count: int = 1, seconds: float = 20) -> list[Any]:
        deadline = self.clock() + seconds  # the card's clock is ahead of the backend's at times
        scheme = DEFAULT_SCHEMES[key_type.family]
        return await self.backend.sign([SignRequest(self.records[key_type], scheme, MESSAGE, deadline)] * count)

    async def sign_well(self, key_type: KeyType, count: int = 1) -> None:
        for outcome in await self.sign(key_type, count):
            assert isinstance(outcome, bytes), outcome
            key = load_der_public_key(self.records[key_type].spki_der)
            verify_signature(key, DEFAULT_SCHEMES[key_type.family], MESSAGE, signature=outcome)

    def signed_by(self) -> dict[str, int]:
        return dict(self.backend.health().by_engine)


@pytest.fixture
async def setup(provider: PausingProvider) -> AsyncIterator[Setup]:
    clock = Clock()
    core = asyncsign.open(provider.path.stem, str(provider.path.parent), 64, 20.0)
    # A card that hangs is given up soon enough for a test; one that is sound is never waited for.
    policy = BreakerPolicy(faults=2, pause=timedelta(seconds=60), longest_pause=timedelta(seconds=600))
    card = QatEngine(asyncsign, core, policy=policy, timeout_s=0.2, clock=clock)
    card.test()
    backend = SoftwareBackend("soft", threads=2, engines=Engines([card, OpenSslEngine()], close=card.close))
    await backend.start()
    records = {}
    for key_type in (KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048):
        created = await backend.create(KeyId(f"k-{key_type}"), key_type)
        purposes = frozenset({Purpose.TLS13_SERVER_VERIFY})
        records[key_type] = KeyRecord(
            KeyId(f"k-{key_type}"),
            key_type,
            KeyRole.HANDSHAKE,
            purposes,
            "soft",
            f"k-{key_type}",
            created.spki_der,
            "test",
            datetime(2026, 1, 1, tzinfo=UTC),
        )
        await backend.load(records[key_type], created.secret)
    yield Setup(backend, card, provider, clock, records)
    provider.let_go()
    await backend.close()


async def test_the_card_signs_its_types_and_leaves_p256(setup: Setup) -> None:
    before = setup.provider.get(Count.SIGNED)
    await setup.sign_well(KeyType.RSA_2048, 5)
    await setup.sign_well(KeyType.EC_P384, 3)
    assert setup.provider.get(Count.SIGNED) == before + 8
    await setup.sign_well(KeyType.EC_P256, 4)
    assert setup.signed_by() == {"qat": 8, "openssl": 4}
    assert setup.provider.get(Count.OUTSIDE_JOBS) == 0
    assert setup.backend.health().engine_detail == ""


async def test_a_batch_is_with_the_card_all_at_once(setup: Setup) -> None:
    """It answers nothing before 32 are there: so they were in flight together."""
    setup.provider.set(Knob.BATCH, 32)
    await setup.sign_well(KeyType.EC_P384, 32)
    assert setup.provider.get(Count.MOST_WITH_THE_CARD) == 32


@pytest.mark.parametrize("fault", [Fault.FAIL, Fault.HANG, Fault.BLOCK])
async def test_what_the_card_does_not_sign_the_next_engine_does(
    setup: Setup, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    """One fault costs nothing but time; the second opens the breaker, and a probe that comes back closes it."""
    caplog.set_level("INFO", "keyreeve")
    setup.provider.set(Knob.FAULT, fault)
    await setup.sign_well(KeyType.RSA_2048, 3)
    await setup.sign_well(KeyType.RSA_2048, 3)
    assert setup.signed_by() == {"qat": 6, "openssl": 6}
    assert "rests after faults" in setup.backend.health().engine_detail
    await setup.sign_well(KeyType.RSA_2048, 3)
    assert setup.signed_by() == {"qat": 6, "openssl": 9}  # not asked
    setup.provider.let_go()
    setup.clock.ahead_s += 61
    await setup.sign_well(KeyType.RSA_2048)
    assert setup.signed_by()["qat"] == 7
    assert setup.backend.health().engine_detail == ""
    assert [said for said in caplog.messages if said.startswith("breaker")] == ["breaker_opened", "breaker_closed"]


async def test_a_probe_that_fails_pauses_longer(setup: Setup) -> None:
    setup.provider.set(Knob.FAULT, Fault.FAIL)
    for _ in range(2):
        await setup.sign_well(KeyType.RSA_2048)
    setup.clock.ahead_s += 61
    await setup.sign_well(KeyType.RSA_2048)
    setup.clock.ahead_s += 61
    await setup.sign_well(KeyType.RSA_2048)
    assert setup.signed_by() == {"qat": 3, "openssl": 4}


@pytest.mark.parametrize(
    ("fault", "key_type"),
    [
        (Fault.WRONG, KeyType.RSA_2048),
        (Fault.SHAM, KeyType.RSA_2048),
        (Fault.SHAM, KeyType.EC_P384),
        (Fault.CUT, KeyType.EC_P384),
    ],
)
async def test_a_wrong_signature_is_not_released_and_ends_the_card(
    setup: Setup, caplog: pytest.LogCaptureFixture, fault: Fault, key_type: KeyType
) -> None:
    setup.provider.set(Knob.FAULT, fault)
    await setup.sign_well(key_type, 2)
    setup.provider.set(Knob.FAULT, Fault.SOUND)
    setup.clock.ahead_s += 3600
    await setup.sign_well(KeyType.RSA_2048, 2)
    assert setup.signed_by() == {"qat": 2, "openssl": 4}
    assert "until a restart" in setup.backend.health().engine_detail
    assert caplog.messages.count("qat_signature_wrong") == 1


async def test_a_provider_that_signs_without_its_card_is_given_up(setup: Setup) -> None:
    """qatprovider falls back to OpenSSL's code by itself when the card is gone: right signatures, at the processor's cost."""
    setup.provider.set(Knob.FAULT, Fault.AT_ONCE)
    for _ in range(3):
        await setup.sign_well(KeyType.EC_P384)
    assert setup.signed_by() == {"qat": 2, "openssl": 1}
    assert "without a card" in setup.backend.health().engine_detail


async def test_a_caller_in_a_hurry_is_no_fault_of_the_card(setup: Setup) -> None:
    setup.provider.set(Knob.FAULT, Fault.HANG)
    for _ in range(4):
        (outcome,) = await setup.sign(KeyType.RSA_2048, seconds=0.05)
        assert isinstance(outcome, DeadlineExceeded)
    assert setup.backend.health().engine_detail == ""


async def test_many_callers_and_a_card_that_dies_between(setup: Setup) -> None:
    async def caller() -> None:
        for _ in range(6):
            await setup.sign_well(KeyType.EC_P384, 4)

    callers = [asyncio.create_task(caller()) for _ in range(8)]
    await asyncio.sleep(0)
    setup.provider.set(Knob.FAULT, Fault.HANG)
    await asyncio.gather(*callers)
    signed = setup.signed_by()
    assert signed["openssl"] > 0
    assert "rests" in setup.backend.health().engine_detail


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.BLOCK])
async def test_closing_with_work_at_the_card_ends_in_time_and_loses_no_answer(
    provider: PausingProvider, fault: Fault
) -> None:
    core = asyncsign.open(provider.path.stem, str(provider.path.parent), 4, 20.0)
    engine = QatEngine(asyncsign, core)
    key = core.load(rsa_pkcs8())
    provider.set(Knob.FAULT, fault)
    answers: list[Any] = []
    caller = threading.Thread(target=lambda: answers.append(core.sign([key], [MESSAGE], [0x0804], 60.0)))
    caller.start()
    while core.state()["running"] == 0:
        await asyncio.sleep(0.001)
    assert core.close(0.05) is False  # and the memory stays the provider's
    engine.health()
    provider.let_go()
    await asyncio.to_thread(caller.join)
    (outcome,), with_card = answers[0]
    assert isinstance(outcome, bytes)
    assert with_card == (1 if fault is Fault.HANG else 0)
    assert core.close(20.0) is True


def rsa_pkcs8() -> bytes:
    return rsa.generate_private_key(65537, 2048).private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def test_a_provider_that_is_missing_refuses_or_lies_is_said_with_the_step(
    provider: PausingProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineUnusable, match=r"provider: .*no-such.*\(device: no QAT device"):
        open_qat("no-such-provider", root=tmp_path)
    provider.set(Knob.REFUSE, 1)
    with pytest.raises(EngineUnusable, match="provider: the provider does not load"):
        open_qat(str(provider.path), root=tmp_path)
    provider.set(Knob.REFUSE, 2)
    monkeypatch.setattr(qat_engine, "START_TIMEOUT_S", 0.05)
    with pytest.raises(EngineUnusable, match="provider: the provider did not load in time"):
        open_qat(str(provider.path), root=tmp_path)
    monkeypatch.undo()
    provider.set(Knob.REFUSE, 0)
    provider.set(Knob.FAULT, Fault.AT_ONCE)
    with pytest.raises(EngineUnusable, match=r"self-test: .*signs without a card.*\(device: "):
        open_qat(str(provider.path), root=tmp_path)
    provider.set(Knob.FAULT, Fault.WRONG)
    with pytest.raises(EngineUnusable, match="does not verify"):
        open_qat(str(provider.path), root=tmp_path)


def test_openssl_itself_is_no_card() -> None:
    with pytest.raises(EngineUnusable, match="without a card"):
        open_qat("default")


def test_without_a_card_the_others_sign_and_it_is_no_reason_not_to_start(provider: PausingProvider) -> None:
    found = choose_engines(EngineChoice.QAT, qat_provider="no-such-provider")
    assert found.engines[-1].name == "openssl"
    assert all(engine.name != "qat" for engine in found.engines)
    assert found.fallback.startswith("no qat: provider: ")
    found = choose_engines(EngineChoice.QAT, qat_provider=str(provider.path))
    assert [found.engines[0].name, found.engines[-1].name] == ["qat", "openssl"]
    assert {key_type for key_type in KeyType if found.engines[0].supports(key_type)} == set(PIECES)
    found.close()


def test_a_key_is_neither_shown_nor_copied(provider: PausingProvider) -> None:
    core = asyncsign.open(provider.path.stem, str(provider.path.parent), 1, 20.0)
    key = core.load(rsa_pkcs8())
    assert repr(key) == "<Key>"
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            copied(key)
    other = asyncsign.open(provider.path.stem, str(provider.path.parent), 1, 20.0)
    with pytest.raises(ValueError, match="another engine"):
        other.sign([key], [MESSAGE], [0x0804], 1.0)
    for arguments in (
        ([key], [], [], 1.0),
        ([key], [MESSAGE], [0x0804], -1.0),
        ([key], [MESSAGE], [0x0804], float("nan")),
    ):
        with pytest.raises(ValueError, match=r"number|timeout"):
            core.sign(*arguments)
    with pytest.raises(TypeError):
        core.sign(["key"], [MESSAGE], [0x0804], 1.0)
    with pytest.raises(ValueError, match="PKCS#8"):
        core.load(b"no key")
    assert core.close(20.0)
    assert other.close(20.0)


def test_the_provider_is_named_with_its_engine_only() -> None:
    BackendConfig("soft", BackendKind.SOFTWARE, engine=EngineChoice.QAT, qat_provider="/opt/qat/qatprovider.so")
    with pytest.raises(ConfigInvalid, match="engine qat only"):
        BackendConfig("soft", BackendKind.SOFTWARE, qat_provider="other")
    for wrong in ("", "a b", "relative/qat.so", "/etc/passwd", "../x.so", "/opt/q\0.so"):
        with pytest.raises(ConfigInvalid, match="neither a name"):
            BackendConfig("soft", BackendKind.SOFTWARE, engine=EngineChoice.QAT, qat_provider=wrong)


def test_one_backend_alone_has_the_card() -> None:
    backends = tuple(BackendConfig(name, BackendKind.SOFTWARE, engine=EngineChoice.QAT) for name in ("one", "two"))
    sealing = SealingConfig(passphrase_file=Path("passphrase"))
    SignerConfig(sealing, backends[:1])
    with pytest.raises(ConfigInvalid, match="two backends have engine qat"):
        SignerConfig(sealing, backends, default_backend="one")
