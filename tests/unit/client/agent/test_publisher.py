"""One proxy's publisher: writes, reloads, retries, and says what is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path

from keyreeve_client.agent.config import ProxyConfig
from keyreeve_client.agent.file_sink import SvidFiles
from keyreeve_client.agent.publisher import Publisher
from keyreeve_common.errors import ErrorCode
from keyreeve_common.identity import SpiffeId

FILES = SvidFiles(b"chain", b"key", b"bundle")


def config(tmp_path: Path, command: str = "") -> ProxyConfig:
    return ProxyConfig(
        name="web",
        spiffe_id=SpiffeId.parse("spiffe://example.org/web"),
        directory=tmp_path / "web",
        reload_command=("/bin/sh", "-c", command) if command else (),
        reload_timeout=timedelta(seconds=5),
    )


class Watched:
    """A running publisher whose rounds can be awaited."""

    def __init__(self, config: ProxyConfig) -> None:
        self._rounds = asyncio.Queue[None]()
        self.publisher = Publisher(config, on_change=lambda: self._rounds.put_nowait(None))

    async def round(self) -> Publisher:
        async with asyncio.timeout(10):
            await self._rounds.get()
        return self.publisher


@asynccontextmanager
async def running(config: ProxyConfig) -> AsyncIterator[Watched]:
    watched = Watched(config)
    task = asyncio.create_task(watched.publisher.run_forever())
    yield watched
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_reloads_once_per_version(tmp_path: Path) -> None:
    count = tmp_path / "count"
    async with running(config(tmp_path, f"echo x >> {count}")) as watched:
        for files in (FILES, FILES, SvidFiles(b"2", b"2", b"2")):
            watched.publisher.want(files)
            await watched.round()
    assert count.read_text() == "x\nx\n"


async def test_a_failed_reload_is_tried_again(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    async with running(config(tmp_path, f"test -e {mark} || {{ touch {mark}; echo not yet; exit 1; }}")) as watched:
        watched.publisher.want(FILES)
        publisher = await watched.round()
        assert publisher.last_reload is not None
        assert publisher.last_reload.output == "not yet"
        await watched.round()
        assert publisher.last_reload.ok


async def test_a_reload_that_a_crash_prevented_is_made_up_for(tmp_path: Path) -> None:
    count = tmp_path / "count"
    settings = config(tmp_path, f"echo x >> {count}")
    Publisher(settings).sink.publish(FILES)
    async with running(settings) as watched:
        watched.publisher.want(FILES)
        await watched.round()
    assert count.read_text() == "x\n"


async def test_an_error_is_typed_and_heals(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web").chmod(0o777)
    async with running(config(tmp_path)) as watched:
        watched.publisher.want(FILES)
        publisher = await watched.round()
        assert publisher.settled.is_set()
        assert publisher.error is not None
        assert publisher.error.code is ErrorCode.CONFIG_INVALID
        (tmp_path / "web").chmod(0o755)
        while (await watched.round()).error is not None:
            pass
        assert publisher.sink.current_version == "v1"


async def test_withdrawal_runs_no_reload(tmp_path: Path) -> None:
    count = tmp_path / "count"
    async with running(config(tmp_path, f"echo x >> {count}")) as watched:
        for files in (FILES, None):
            watched.publisher.want(files)
            await watched.round()
    assert count.read_text() == "x\n"
    assert (tmp_path / "web" / "withdrawn").exists()
