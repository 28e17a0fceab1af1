"""Fixtures of the command's tests."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from keyreeve_testing.pki import TestPki

sys.path.insert(0, str(Path(__file__).parent))

from fake_services import TD, FakeCa, FakeKeyServer, Services, serve


@pytest.fixture(scope="session")
def pki() -> TestPki:
    return TestPki(TD)


@pytest.fixture
def services(
    tmp_path: Path, pki: TestPki, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Services]:
    services = Services(tmp_path, FakeCa(pki), FakeKeyServer(), capsys)
    monkeypatch.setenv("KEYREEVE_CA_SOCKET", str(services.ca_socket))
    monkeypatch.setenv("KEYREEVE_KEY_SERVER_SOCKET", str(services.key_server_socket))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    started = asyncio.run_coroutine_threadsafe(serve(services), loop).result(10)
    yield services
    for server in started:
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()
