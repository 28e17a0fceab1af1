"""Keeps one pair of signer and front end: starts both with a socketpair between them, and both anew when either ends.

A signer that ended because of its configuration or its PIN is not started again: each attempt with a wrong PIN brings the token nearer
to its lock.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from keyreeve_common.errors import ConfigInvalid
from keyreeve_common.telemetry import log, log_error, log_warning, notify_ready

from keyreeve_keyserver.config import KeyServerConfig
from keyreeve_keyserver.domain.pair import Pair
from keyreeve_keyserver.hardening.environment import front_end_environment, signer_environment
from keyreeve_keyserver.users import User, find_user

EX_CONFIG, EX_NOPERM, EX_USAGE, EX_UNAVAILABLE = 78, 77, 2, 69
_FINAL = (EX_CONFIG, EX_NOPERM, EX_USAGE)
_MAX_BACKOFF_S = 30.0
_KILL_AFTER_S = 5.0


@dataclass(slots=True)
class Generation:
    """Both processes, and our end of the front end's socketpair."""

    signer: asyncio.subprocess.Process
    front_end: asyncio.subprocess.Process
    channel: socket.socket
    launcher: asyncio.subprocess.Process | None = None


class PairKeeper:
    """`others_serve` says whether any other pair of this host does; `stopping` ends all of them."""

    def __init__(
        self,
        config: KeyServerConfig,
        config_path: Path,
        pair: Pair,
        *,
        stopping: asyncio.Event,
        others_serve: Callable[[], bool],
    ) -> None:
        if config.signer_config is None:
            raise ConfigInvalid("signer_config: is missing; it names the signer's own TOML file")
        self._signer_config = config.signer_config
        self._config = config
        self._config_path = config_path
        self._pair = pair
        self._stopping = stopping
        self._others_serve = others_serve
        self._renewal = asyncio.Event()
        self._named = {} if pair.is_alone else {"pair": pair.number}
        self.ready = asyncio.Event()
        users = config.supervisor
        self._signer_user = find_user(users.signer_user, "supervisor.signer_user")
        self._front_end_user = find_user(users.front_end_user, "supervisor.front_end_user")
        self._worker_user = find_user(users.worker_user, "supervisor.worker_user")

    async def run(self, after: asyncio.Event | None = None) -> int:
        """Keeps the pair until the stop; the exit code. It is first started `after` another one is ready."""
        if after is not None:
            await self._first_of(after)
        settings = self._config.supervisor
        ends: deque[float] = deque()
        while not self._stopping.is_set():
            self._renewal.clear()
            pair = await self._start()
            ended = await self._watch(pair)
            self.ready.clear()
            signer_code, front_end_code = pair.signer.returncode, pair.front_end.returncode
            await self._stop(pair)
            if self._stopping.is_set() or ended == "renewal":
                continue
            log_warning(
                "process_ended", process=ended, signer_code=signer_code, front_end_code=front_end_code, **self._named
            )
            # Also the one that was being stopped: a refused PIN is final whichever of the two ended first.
            for process, code in (("signer", pair.signer.returncode), ("front_end", pair.front_end.returncode)):
                if code in _FINAL:
                    log_error("not_restarted", process=process, exit_code=code, detail=_reason(code), **self._named)
                    return code
            now = monotonic()
            ends.append(now)
            while ends and ends[0] < now - settings.window.total_seconds():
                ends.popleft()
            if len(ends) > settings.max_restarts:
                detail = f"{len(ends)} ends within {settings.window.total_seconds():g} s; see the log lines before this"
                if not self._others_serve():
                    log_error("gave_up", detail=detail, **self._named)
                    return EX_UNAVAILABLE
                log_error("pair_rests", detail=f"{detail}; other pairs serve meanwhile", **self._named)
                await self._rest(settings.window.total_seconds())
                ends.clear()
            await self._pause(len(ends))
        return 0

    async def renew(self) -> None:
        """Stops the pair, which answers first what it has, and starts it anew; back when it serves again, or the stop came."""
        self.ready.clear()
        self._renewal.set()
        await self._first_of(self.ready)

    async def _first_of(self, event: asyncio.Event) -> None:
        """Waits for the event or the stop."""
        tasks = [asyncio.create_task(_until(each)) for each in (event, self._stopping)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    async def _start(self) -> Generation:
        to_signer, to_front_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        to_launcher, launchers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        launcher = None
        with to_signer, to_front_end, theirs, to_launcher, launchers:
            which = [] if self._pair.is_alone else ["--pair", str(self._pair)]
            arguments = ["--config", str(self._signer_config), "--frames-fd", str(to_front_end.fileno()), *which]
            descriptors = [to_front_end.fileno()]
            if self._worker_user is not None:  # else the signer starts its own
                launcher = await _spawn(
                    "keyreeve_keyserver.backends.launcher",
                    [str(launchers.fileno()), str(os.getpid())],
                    [launchers.fileno()],
                    signer_environment(os.environ),
                    self._worker_user,
                )
                arguments += ["--launcher-fd", str(to_launcher.fileno())]
                descriptors.append(to_launcher.fileno())
            signer = await _spawn(
                "keyreeve_keyserver.signer", arguments, descriptors, signer_environment(os.environ), self._signer_user
            )
            front_end = await _spawn(
                "keyreeve_keyserver.frontend",
                [
                    "--config",
                    str(self._config_path),
                    "--frames-fd",
                    str(to_signer.fileno()),
                    "--supervisor-fd",
                    str(theirs.fileno()),
                    *which,
                ],
                [to_signer.fileno(), theirs.fileno()],
                front_end_environment(os.environ),
                self._front_end_user,
            )
        log("started", signer_pid=signer.pid, front_end_pid=front_end.pid, **self._named)
        return Generation(signer, front_end, ours, launcher)

    async def _watch(self, pair: Generation) -> str:
        """Waits until one of the two ends, or the supervisor is to stop; says which."""
        pair.channel.setblocking(False)
        waits = {
            "signer": asyncio.create_task(_ended(pair.signer)),
            "front_end": asyncio.create_task(_ended(pair.front_end)),
            "stop": asyncio.create_task(_until(self._stopping)),
            "renewal": asyncio.create_task(_until(self._renewal)),
        }
        readiness = asyncio.create_task(self._await_ready(pair))
        await asyncio.wait(waits.values(), return_when=asyncio.FIRST_COMPLETED)
        ended = next(name for name, task in waits.items() if task.done())
        for task in (*waits.values(), readiness):
            task.cancel()
        await asyncio.gather(*waits.values(), readiness, return_exceptions=True)
        return ended

    async def _await_ready(self, pair: Generation) -> None:
        loop = asyncio.get_running_loop()
        timeout = self._config.supervisor.start_timeout.total_seconds()
        try:
            async with asyncio.timeout(timeout):
                said = await loop.sock_recv(pair.channel, 64)
        except TimeoutError:
            log_error(
                "not_ready_in_time",
                timeout_s=timeout,
                detail="is the signer's token reachable? see its log lines",
                **self._named,
            )
            pair.front_end.terminate()
            return
        if said:
            log("ready", signer_pid=pair.signer.pid, front_end_pid=pair.front_end.pid, **self._named)
            self.ready.set()
            notify_ready("serving")

    async def _stop(self, pair: Generation) -> None:
        """Front end first, so that it can answer what it has; then the signer."""
        drain = self._config.limits.drain_timeout.total_seconds()
        await _terminate(pair.front_end, drain + _KILL_AFTER_S)
        await _terminate(pair.signer, _KILL_AFTER_S)
        if pair.launcher is not None:
            await _terminate(pair.launcher, _KILL_AFTER_S)  # it ends with the signer's socket
        pair.channel.close()

    async def _pause(self, recent_ends: int) -> None:
        if recent_ends <= 1:
            return
        base = self._config.supervisor.backoff.total_seconds()
        await self._rest(min(base * 2 ** (recent_ends - 2), _MAX_BACKOFF_S))

    async def _rest(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)


async def _spawn(
    module: str,
    arguments: Sequence[str],
    descriptors: Sequence[int],
    environment: dict[str, str],
    user: User | None,
) -> asyncio.subprocess.Process:
    options: dict[str, Any] = {}
    if user is not None:
        options = {"user": user.uid, "group": user.gid, "extra_groups": user.groups}
        environment["HOME"] = user.home
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        module,
        *arguments,
        pass_fds=tuple(descriptors),
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        start_new_session=False,
        **options,
    )


async def _ended(process: asyncio.subprocess.Process) -> None:
    await process.wait()


async def _until(event: asyncio.Event) -> None:
    await event.wait()


async def _terminate(process: asyncio.subprocess.Process, patience_s: float) -> None:
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), patience_s)
    except TimeoutError:
        log_warning("killed", pid=process.pid, detail=f"it did not stop within {patience_s:g} s")
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _reason(code: int) -> str:
    return {
        EX_CONFIG: "its configuration is wrong; its last log line says what. Correct it and start the service again",
        EX_NOPERM: "a token refused its PIN; correct pin_file before the token locks, then start the service again",
    }.get(code, "its command line is wrong: the installation is mixed from different releases")
