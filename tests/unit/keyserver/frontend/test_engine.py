"""Keys that the signer does not hold: loaded within the deadline, and only while they are enabled. The signer is played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from keyreeve_common.errors import DeadlineExceeded, KeyNotFound
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType
from keyreeve_common.sign_batch import open_items, pack_items, with_count
from keyreeve_keyserver.catalog.catalog import Catalog
from keyreeve_keyserver.catalog.records import NewKey
from keyreeve_keyserver.domain.keys import KeyState
from keyreeve_keyserver.frames import Refused, Signed, SignItem, SignResult
from keyreeve_keyserver.frontend.access import CatalogThreads
from keyreeve_keyserver.frontend.admission import Admission
from keyreeve_keyserver.frontend.engine import SigningEngine
from keyreeve_keyserver.frontend.metrics import FrontEndMetrics
from keyreeve_keyserver.frontend.signer_link import OnResults, SignerLink
from sqlalchemy import URL

OPEN_ADMISSION = Admission(lambda _: "", max_items=1000, max_wait_s=60.0)
NOW = datetime(2026, 1, 1, tzinfo=UTC)


class PlayedSigner:
    """Signs with keys that are loaded; `load_s` is what a load takes."""

    def __init__(self) -> None:
        self.load_s = 0.0
        self.loaded = False
        self.submitted: list[tuple[list[SignItem], float]] = []

    def submit(self, caller: str, items: Sequence[SignItem], on_results: OnResults, *, timeout_s: float) -> None:
        self.submitted.append((list(items), timeout_s))
        on_results([Signed(item.id, b"s") if self.loaded else Refused(item.id, KeyNotFound()) for item in items])

    async def control(self, operation: str, *, timeout: float, **arguments: Any) -> dict[str, Any]:
        assert operation == "load_key"
        await asyncio.sleep(self.load_s)
        self.loaded = True
        return {}


class Rig:
    def __init__(self, path: Path) -> None:
        url = URL.create("sqlite", database=str(path / "catalog.sqlite3"))
        self.threads = CatalogThreads(Catalog.open(url, busy_timeout=timedelta(seconds=1)))
        self.signer = PlayedSigner()
        link = cast("SignerLink", self.signer)
        self.engine = SigningEngine(
            link,
            self.threads,
            control_timeout=timedelta(seconds=20),
            metrics=FrontEndMetrics(),
            admission=OPEN_ADMISSION,
        )
        purposes = frozenset({Purpose.TLS13_SERVER_VERIFY})
        entry = self.threads.catalog.begin_key(
            NewKey("r", KeyType.EC_P256, KeyRole.HANDSHAKE, purposes, "", ""), now=NOW
        )
        self.key_id = KeyId(entry.key_id)
        self.threads.catalog.complete_key(self.key_id, backend="b", sealed_record=b"s", spki_der=b"p", attributes={})

    async def sign(self, *, timeout_s: float) -> SignResult:
        answer: asyncio.Future[SignResult] = asyncio.get_running_loop().create_future()
        item = SignItem(1, self.key_id, 0x0403, 1, int(timeout_s * 1000), b"m")
        self.engine.submit("local", [item], lambda results: answer.set_result(results[0]), timeout_s=timeout_s)
        async with asyncio.timeout(5):
            return await answer


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.threads.close()


async def test_key_is_loaded_and_the_deadline_goes_on(rig: Rig) -> None:
    rig.signer.load_s = 0.05
    assert isinstance(await rig.sign(timeout_s=3), Signed)
    (first, first_s), (second, second_s) = rig.signer.submitted
    assert second[0].deadline_ms < first[0].deadline_ms
    assert second_s < first_s


async def test_slow_load_does_not_outlast_the_deadline(rig: Rig) -> None:
    rig.signer.load_s = 2
    result = await rig.sign(timeout_s=0.05)
    assert isinstance(result, Refused)
    assert isinstance(result.error, DeadlineExceeded)
    assert len(rig.signer.submitted) == 1


async def test_disabled_key_is_not_loaded_again(rig: Rig) -> None:
    rig.threads.catalog.change_state(rig.key_id, to=KeyState.DISABLED, from_states=(KeyState.ENABLED,))
    result = await rig.sign(timeout_s=3)
    assert isinstance(result, Refused)
    assert isinstance(result.error, KeyNotFound)
    assert not rig.signer.loaded


async def test_a_packed_batch_whose_key_is_not_loaded_comes_back_whole(rig: Rig) -> None:
    """It went out as it came; after the load its items go again one by one, each with its own id, and each is counted once."""
    trace = b"\x01" * 16 + bytes(9)
    items = [SignItem(number, rig.key_id, 0x0403, 1, 3_000, b"m%d" % number, trace) for number in range(5)]
    results: list[SignResult] = []
    done = asyncio.Event()

    def on_results(some: Sequence[SignResult]) -> None:
        results.extend(some)
        if len(results) == len(items):
            done.set()

    packed = open_items(with_count(len(items), pack_items(items)))
    rig.engine.submit("local", packed, on_results, timeout_s=3)
    async with asyncio.timeout(5):
        await done.wait()
    assert sorted(result.id for result in results if isinstance(result, Signed)) == [0, 1, 2, 3, 4]
    (first, _), (again, _) = rig.signer.submitted
    assert first == items
    assert [item._replace(deadline_ms=3_000) for item in again] == items
    assert rig.engine.signatures == {rig.key_id: 5}
    assert OPEN_ADMISSION.outstanding() == {"": 0}
