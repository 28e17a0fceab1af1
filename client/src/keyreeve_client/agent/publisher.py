"""Keeps one proxy's files at the present state and has the proxy take them up; retries what failed, blocks nobody."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from keyreeve_common.errors import Internal, KeyreeveError
from keyreeve_common.telemetry import log, log_error, log_exception, log_warning

from keyreeve_client.agent.assignments import Clock, utc_now
from keyreeve_client.agent.backoff import Backoff
from keyreeve_client.agent.config import ProxyConfig
from keyreeve_client.agent.file_sink import FileSink, Ownership, SvidFiles
from keyreeve_client.agent.reload_command import ReloadResult, run_reload


def sink_of(config: ProxyConfig) -> FileSink:
    return FileSink(config.directory, Ownership(config.owner, config.group))


@dataclass
class Publisher:
    """`want` says what the files should be, None when the identity is not assigned; `settled` is set once that was tried."""

    config: ProxyConfig
    on_change: Callable[[], None] = lambda: None
    clock: Clock = utc_now
    error: KeyreeveError | None = None
    last_reload: ReloadResult | None = None
    last_reload_at: datetime | None = None
    assigned: bool = False
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    _wanted: SvidFiles | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.sink = sink_of(self.config)

    def want(self, files: SvidFiles | None) -> None:
        self._wanted, self.assigned = files, files is not None
        self._changed.set()

    async def run_forever(self) -> None:
        backoff = Backoff(timedelta(seconds=1), timedelta(minutes=5))
        while True:
            if not self.settled.is_set():
                await self._changed.wait()
            self._changed.clear()
            done = await self._bring_up_to_date()
            self.settled.set()
            self.on_change()
            if done:
                backoff.reset()
                await self._changed.wait()
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(backoff.next()):
                        await self._changed.wait()

    async def _bring_up_to_date(self) -> bool:
        """Whether nothing is left to do."""
        try:
            await self._write()
        except KeyreeveError as error:
            self._say_error(error)
            return False
        except Exception:
            log_exception("proxy_files_failed", proxy=self.config.name)
            self.error = Internal("internal error; the agent's log has the cause")
            return False
        self.error = None
        return await self._reload()

    async def _write(self) -> None:
        fields = {"proxy": self.config.name, "spiffe_id": str(self.config.spiffe_id)}
        if self._wanted is None:
            if await asyncio.to_thread(self.sink.withdraw, f"not assigned since {self.clock().isoformat()}"):
                log_warning("proxy_files_withdrawn", **fields)
        elif await asyncio.to_thread(self.sink.publish, self._wanted):
            log("proxy_files_replaced", **fields, version=self.sink.current_version)

    async def _reload(self) -> bool:
        command, version = self.config.reload_command, self.sink.current_version
        if not command or version is None or self._wanted is None or not self.sink.reload_is_due:
            return True
        try:
            result = await run_reload(command, self.config.reload_timeout)
        except OSError as error:
            result = ReloadResult(None, f"cannot be started: {error.strerror}")
        self.last_reload, self.last_reload_at = result, self.clock()
        report = log if result.ok else log_error
        report(
            "proxy_reloaded" if result.ok else "proxy_reload_failed",
            proxy=self.config.name,
            version=version,
            exit_status=result.exit_status,
            output=result.output,
        )
        if result.ok:
            try:
                await asyncio.to_thread(self.sink.note_reload, version)
            except KeyreeveError as error:
                self._say_error(error)
                return False
        return result.ok

    def _say_error(self, error: KeyreeveError) -> None:
        if self.error is None or self.error.detail != error.detail:
            log_error("proxy_files_failed", proxy=self.config.name, code=error.code.value, detail=error.detail)
        self.error = error
