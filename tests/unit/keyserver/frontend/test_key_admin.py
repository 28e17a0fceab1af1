"""CreateKey when the signer or the catalog fails in the middle; the signer is one that the test scripts."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from keyreeve_common.errors import Conflict, InvalidRequest, KeyreeveError, StorageFull, Unavailable
from keyreeve_common.grpc_edge import Peer, _current_peer
from keyreeve_common.identity import TrustDomain
from keyreeve_common.key_id import KeyId
from keyreeve_common.v1 import keyserver_pb2, types_pb2
from keyreeve_keyserver.catalog.catalog import Catalog
from keyreeve_keyserver.config import KeysConfig, KeyServerConfig
from keyreeve_keyserver.frontend.access import Access, CatalogThreads
from keyreeve_keyserver.frontend.admission import Admission
from keyreeve_keyserver.frontend.engine import SigningEngine
from keyreeve_keyserver.frontend.key_admin import KeyAdminServicer
from keyreeve_keyserver.frontend.key_life import KeyLifeService
from keyreeve_keyserver.frontend.metrics import FrontEndMetrics
from keyreeve_keyserver.frontend.signer_link import SignerLink
from sqlalchemy import URL

OPEN_ADMISSION = Admission(lambda _: "", max_items=1000, max_wait_s=60.0)
SECOND = timedelta(seconds=1)


class ScriptedSigner:
    """`failures` are raised by create_key, one at each call."""

    def __init__(self) -> None:
        self.capabilities = {"default_backend": "soft"}
        self.failures: list[KeyreeveError] = []
        self.destroy_failures: list[KeyreeveError] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.go = asyncio.Event()
        self.go.set()

    async def control(self, operation: str, *, timeout: float, **arguments: Any) -> dict[str, Any]:
        self.calls.append((operation, arguments))
        await self.go.wait()
        if operation == "create_key" and self.failures:
            raise self.failures.pop(0)
        if operation == "destroy_key" and self.destroy_failures:
            raise self.destroy_failures.pop(0)
        return {"record": base64.b64encode(b"sealed").decode(), "spki_der": "", "attributes": {}, "permit": ""}

    def named(self, operation: str) -> list[dict[str, Any]]:
        return [arguments for name, arguments in self.calls if name == operation]


def config_of(path: Path) -> KeyServerConfig:
    keys = KeysConfig(destruction_wait=timedelta(0))
    return KeyServerConfig(TrustDomain("example.org"), path, path / "admin.sock", keys=keys)


class Rig:
    def __init__(self, path: Path) -> None:
        url = URL.create("sqlite", database=str(path / "catalog.sqlite3"))
        self.threads = CatalogThreads(Catalog.open(url, busy_timeout=SECOND))
        self.signer = ScriptedSigner()
        link = cast("SignerLink", self.signer)
        access = Access(self.threads, max_staleness=SECOND)
        engine = SigningEngine(
            link, self.threads, control_timeout=SECOND, metrics=FrontEndMetrics(), admission=OPEN_ADMISSION
        )
        clock = lambda: datetime(2026, 1, 1, tzinfo=UTC)  # noqa: E731 - one clock for both
        self.service = KeyAdminServicer(
            threads=self.threads,
            access=access,
            link=link,
            engine=engine,
            life=KeyLifeService(
                threads=self.threads, access=access, link=link, engine=engine, config=config_of(path), clock=clock
            ),
            trust_domain=TrustDomain("example.org"),
            control_timeout=SECOND,
            clock=clock,
        )

    async def create(self, request_id: str = "r", label: str = "x") -> keyserver_pb2.Key:
        _current_peer.set(Peer(local=True))
        request = keyserver_pb2.CreateKeyRequest(
            request_id=request_id,
            key_type=types_pb2.KEY_TYPE_EC_P256,
            role=keyserver_pb2.KEY_ROLE_HANDSHAKE,
            purposes=[types_pb2.PURPOSE_TLS13_SERVER_VERIFY],
            label=label,
        )
        return await self.service.CreateKey(request, None)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.threads.close()


async def test_lost_signer_keeps_the_intent(rig: Rig) -> None:
    rig.signer.failures = [Unavailable("gone")]
    with pytest.raises(Unavailable):
        await rig.create()
    made = await rig.create()
    asked = rig.signer.named("create_key")
    assert [arguments["key_id"] for arguments in asked] == [made.key_id] * 2


async def test_refused_creation_frees_its_request_id(rig: Rig) -> None:
    rig.signer.failures = [InvalidRequest("no")]
    with pytest.raises(InvalidRequest):
        await rig.create(label="wrong")
    assert (await rig.create(label="right")).label == "right"


async def test_key_left_by_a_crash_is_never_given_out(rig: Rig) -> None:
    rig.signer.failures = [Conflict("the token holds a key with this id already")]
    made = await rig.create()
    first, second = rig.signer.named("create_key")
    assert first["key_id"] != second["key_id"] == made.key_id
    assert (await rig.create()).key_id == made.key_id


async def test_key_that_cannot_be_recorded_is_destroyed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise StorageFull("full")

    with monkeypatch.context() as patched:
        patched.setattr(rig.threads.catalog, "complete_key", full)
        with pytest.raises(StorageFull):
            await rig.create()
    assert len(rig.signer.named("destroy_key")) == 1
    assert (await rig.create()).key_id


async def test_key_whose_commit_is_in_doubt_is_not_destroyed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = rig.threads.catalog.complete_key

    def committed_unheard(*arguments: Any, **named: Any) -> None:
        complete(*arguments, **named)
        raise Unavailable("the connection went with the answer")

    with monkeypatch.context() as patched:
        patched.setattr(rig.threads.catalog, "complete_key", committed_unheard)
        with pytest.raises(Unavailable):
            await rig.create()
    assert rig.signer.named("destroy_key") == []
    made = await rig.create()
    assert made.state == keyserver_pb2.KEY_STATE_ENABLED
    assert len(rig.signer.named("create_key")) == 1


async def test_intent_renamed_by_another_replica_is_a_retry(rig: Rig) -> None:
    rig.signer.go.clear()
    creating = asyncio.create_task(rig.create())
    while not rig.signer.calls:
        await asyncio.sleep(0.001)
    renamed = rig.threads.catalog.rename_intent(rig.signer.named("create_key")[0]["key_id"])
    rig.signer.go.set()
    with pytest.raises(Unavailable, match="retry with the same request_id"):
        await creating
    assert renamed is not None
    assert (await rig.create()).key_id == renamed.key_id


async def test_retry_waits_for_a_creation_under_a_new_id(rig: Rig) -> None:
    rig.signer.failures = [Conflict("the token holds a key with this id already")]
    first = asyncio.create_task(rig.create())
    while not rig.signer.calls:
        await asyncio.sleep(0.001)
    rig.signer.go.clear()
    while len(rig.signer.calls) < 2:
        await asyncio.sleep(0.001)
    retry = asyncio.create_task(rig.create())
    await asyncio.sleep(0.05)
    rig.signer.go.set()
    assert (await first).key_id == (await retry).key_id
    assert len(rig.signer.named("create_key")) == 2


async def test_concurrent_retries_ask_the_signer_once(rig: Rig) -> None:
    rig.signer.go.clear()
    calls = [asyncio.create_task(rig.create()) for _ in range(4)]
    while not rig.signer.calls:
        await asyncio.sleep(0)
    calls[0].cancel()
    rig.signer.go.set()
    made = await asyncio.gather(*calls[1:])
    assert len({key.key_id for key in made}) == 1
    assert len(rig.signer.named("create_key")) == 1


async def test_destroy_goes_on_where_it_stopped(rig: Rig) -> None:
    key_id = (await rig.create()).key_id
    await rig.service.DisableKey(keyserver_pb2.DisableKeyRequest(key_id=key_id), None)
    rig.signer.destroy_failures = [Unavailable("gone")]
    await rig.service.DestroyKey(keyserver_pb2.DestroyKeyRequest(key_id=key_id), None)
    assert rig.threads.catalog.sealed_record(KeyId(key_id)) is not None
    gone = await rig.service.DestroyKey(keyserver_pb2.DestroyKeyRequest(key_id=key_id), None)
    assert gone.state == keyserver_pb2.KEY_STATE_DESTROYED
    assert rig.threads.catalog.sealed_record(KeyId(key_id)) is None
    assert len(rig.signer.named("destroy_key")) == 2
