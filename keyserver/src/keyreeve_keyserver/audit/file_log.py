"""The audit log of a running signer: gathers what is to be recorded into groups, and publishes checkpoints in the background.

Appends that come while a group is being written leave together in the next one, so that load costs one write and one sync for many. One thread
writes the journal, another publishes; the event loop waits for neither. When the disk is full or fails, every append is refused until a write
succeeds again: nothing is lost, since nothing that was refused counts.
Spec: docs/protocol/audit-log.md.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from typing import TypeVar

from keyreeve_common.errors import AuditUnavailable, KeyreeveError, Unavailable
from keyreeve_common.files import storage_error
from keyreeve_common.telemetry import log, log_error, log_exception, log_warning
from keyreeve_common.transparency.note import check_name
from keyreeve_common.transparency.records import AuditRecord, Event, Source, microseconds

from keyreeve_keyserver.audit.checkpoint_key import KeyEncryption, load_checkpoint_key, recorded_origin
from keyreeve_keyserver.audit.config import AuditConfig, FsyncPolicy
from keyreeve_keyserver.audit.log_files import LogFiles, Opened, lock_directory
from keyreeve_keyserver.audit.ports import AuditStatus
from keyreeve_keyserver.audit.publication import Snapshot
from keyreeve_keyserver.domain.pair import ALONE, Pair

RETRY_AFTER = timedelta(seconds=1)
MAX_WAITING_BYTES = 64 * 1024 * 1024  # records that no checkpoint covers, in memory
_GROUP_RECORDS = 16_384
_OPEN_AGAIN_S = 2.0
T = TypeVar("T")
_Waiting = tuple[Sequence[bytes], "asyncio.Future[None]"]


class FileAuditLog:
    """`start` before use, `close` at the end. `now` gives aware UTC."""

    enabled = True

    def __init__(
        self, config: AuditConfig, kek: KeyEncryption, *, now: Callable[[], datetime], pair: Pair = ALONE
    ) -> None:
        self._config = config
        self._pair = pair
        self._kek = kek
        self._now = now
        self._files: LogFiles | None = None
        self._lock: int | None = None
        self._queue: list[_Waiting] = []
        self._first: list[bytes] = []  # the log's own records of its start: they go before all others
        self._committing: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._enough = asyncio.Event()
        self._checkpointed = 0
        self._error: AuditUnavailable | None = AuditUnavailable(
            "the audit log is not open yet", retry_after=RETRY_AFTER
        )
        self._broken: AuditUnavailable | None = None  # not to be mended without an operator
        self._publishing_fails = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="audit-journal")
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="audit-publish")

    async def start(self) -> None:
        """Opens the log. While the disk is full or the key-encryption key is away, that is tried again in the background.

        Raises: FailedPrecondition, ConfigInvalid: an operator must act.
        """
        if not await self._try_open():
            self._tasks.append(asyncio.create_task(self._open_later()))

    async def append(self, entries: Sequence[bytes]) -> None:
        if not entries:
            return
        if self._files is None or self._broken is not None:
            raise self._broken or self._error or _closed()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((entries, done))
        self._begin_commit()
        await done

    def status(self) -> AuditStatus:
        size = self._files.size if self._files is not None else 0
        if (error := self._broken or self._error) is not None:
            return AuditStatus("unavailable", error.detail, size, self._checkpointed)
        detail = "checkpoints cannot be published; the signer's log says why" if self._publishing_fails else ""
        return AuditStatus("ok", detail, size, self._checkpointed)

    async def close(self) -> None:
        """Publishes what there is. Nothing is appended any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._committing is not None:
            await self._committing
        if self._files is not None:
            await self._publish()
            self._files.close()
            self._files, self._error = None, _closed()
        self._writer.shutdown()
        self._publisher.shutdown()
        if self._lock is not None:
            os.close(self._lock)

    async def _try_open(self) -> bool:
        try:
            opened = await self._open()
        except (Unavailable, OSError) as error:
            self._fail(error)
            return False
        self._error = None
        if opened.torn:
            log_warning("audit_log_repaired", torn_bytes=opened.torn, records=opened.size)
            self._note(Event.LOG_REPAIRED, torn_bytes=opened.torn, records=opened.size)
        self._note(Event.LOG_STARTED, records=opened.size, unsigned=opened.unsigned, fsync=self._config.fsync.value)
        self._tasks.append(asyncio.create_task(self._publish_for_ever()))
        if self._config.fsync is FsyncPolicy.INTERVAL:
            self._tasks.append(asyncio.create_task(self._sync_for_ever()))
        self._begin_commit()
        return True

    async def _open(self) -> Opened:
        directory = self._config.directory
        if self._lock is None:
            self._lock = lock_directory(directory)
        origin = self._config.origin or recorded_origin(directory) or self._pair.name(_default_origin())
        key = await load_checkpoint_key(directory, check_name(origin), self._kek)
        files = LogFiles(directory, key, sync_always=self._config.fsync is FsyncPolicy.ALWAYS)
        opened = await self._in(self._writer, files.open)
        self._files = files
        self._checkpointed = opened.size - opened.unsigned
        log("audit_log_open", origin=origin, records=opened.size, unsigned=opened.unsigned, vkey=str(key.vkey))
        return opened

    async def _open_later(self) -> None:
        while True:
            await asyncio.sleep(_OPEN_AGAIN_S)
            try:
                if await self._try_open():
                    return
            except KeyreeveError as error:
                self._break(error)
                return

    def _note(self, event: Event, **details: str | int) -> None:
        """A record of the log about itself."""
        record = AuditRecord(
            time_us=microseconds(self._now()),
            source=Source.SIGNER,
            event=event.value,
            details=tuple(sorted((name, str(value)) for name, value in details.items())),
        )
        self._first.append(record.to_bytes())

    def _begin_commit(self) -> None:
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_all())

    async def _commit_all(self) -> None:
        """Commits groups until nobody waits."""
        try:
            while self._queue or self._first:
                group = self._take_group()
                error = await self._commit([*self._first, *(entry for entries, _ in group for entry in entries)])
                if error is None:
                    self._first.clear()
                for _, done in group:
                    _settle(done, error)
                if error is not None and not self._queue:
                    return  # the log's own records wait for the next append
        finally:
            self._committing = None

    def _take_group(self) -> list[_Waiting]:
        count = at = 0
        while at < len(self._queue) and count < _GROUP_RECORDS:
            count += len(self._queue[at][0])
            at += 1
        group = self._queue[:at]
        del self._queue[:at]
        return group

    async def _commit(self, entries: list[bytes]) -> AuditUnavailable | None:
        files = self._files
        if files is None or self._broken is not None:
            return self._broken or _closed()
        if files.waiting_bytes > MAX_WAITING_BYTES:
            return self._fail(AuditUnavailable("checkpoints cannot be published, and too many records wait for one"))
        try:
            await self._in(self._writer, files.commit, entries)
        except OSError as error:
            return self._fail(error)
        except Exception:
            log_exception("audit_commit_failed")
            return self._fail(AuditUnavailable("the audit log failed; the signer's log has the cause"))
        if self._error is not None:
            log("audit_log_available", records=files.size)
            self._error = None
        if files.size - self._checkpointed >= self._config.checkpoint_records:
            self._enough.set()
        return None

    async def _publish_for_ever(self) -> None:
        interval = self._config.checkpoint_interval.total_seconds()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await self._enough.wait()
            self._enough.clear()
            await self._publish()
            if self._publishing_fails:
                await asyncio.sleep(RETRY_AFTER.total_seconds())

    async def _publish(self) -> None:
        """A checkpoint over all there is, if there is something new; a fault is logged, and the next round tries again."""
        files = self._files
        if files is None or files.size == self._checkpointed or self._broken is not None:
            return
        try:
            snapshot: Snapshot = await self._in(self._writer, files.snapshot)
            await self._in(self._publisher, files.publish, snapshot)
            self._checkpointed = snapshot.size
            await self._in(self._writer, files.published, snapshot)
        except KeyreeveError as error:
            self._break(error)
        except OSError as error:
            if not self._publishing_fails:
                shown = storage_error(error, self._config.directory)
                log_error("audit_checkpoint_failed", code=shown.code.value, detail=shown.detail)
            self._publishing_fails = True
        except Exception:
            self._publishing_fails = True
            log_exception("audit_publishing_failed")
        else:
            if self._publishing_fails:
                log("audit_checkpoint_published", records=snapshot.size)
            self._publishing_fails = False

    async def _sync_for_ever(self) -> None:
        files = self._files
        assert files is not None  # noqa: S101 - started when it is open
        while True:
            await asyncio.sleep(self._config.sync_interval.total_seconds())
            try:
                await self._in(self._writer, files.sync)
            except OSError as error:
                self._fail(error)

    def _fail(self, error: Exception) -> AuditUnavailable:
        """What appends are refused with until a write succeeds."""
        if isinstance(error, OSError):
            error = storage_error(error, self._config.directory)
        detail = error.detail if isinstance(error, KeyreeveError) else type(error).__name__
        unavailable = AuditUnavailable(f"nothing is signed that cannot be recorded: {detail}", retry_after=RETRY_AFTER)
        if self._error is None or self._files is None:
            log_error("audit_log_unavailable", detail=detail)
        self._error = unavailable
        return unavailable

    def _break(self, error: KeyreeveError) -> None:
        log_error("audit_log_broken", code=error.code.value, detail=error.detail)
        self._broken = AuditUnavailable(f"nothing is signed that cannot be recorded: {error.detail}")

    @staticmethod
    async def _in(executor: ThreadPoolExecutor, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, work, *arguments)


def _settle(done: asyncio.Future[None], error: AuditUnavailable | None) -> None:
    if done.done():  # who waited has gone
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


def _closed() -> AuditUnavailable:
    return AuditUnavailable("the audit log is closed: this signer is stopping", retry_after=RETRY_AFTER)


def _default_origin() -> str:
    """A name for a log whose configuration gives none: it stays, whatever the host is called later."""
    host = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "-.") else "-" for letter in socket.gethostname()
    )
    return f"keyreeve-audit/{host[:200] or 'signer'}"
