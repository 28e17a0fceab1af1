"""The real launcher and real workers: what was read once is enough, nothing is left over, and its end is seen."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from keyreeve_common.errors import ConfigInvalid, TokenUnavailable
from keyreeve_common.pkcs11_uri import Pkcs11Uri
from keyreeve_keyserver.backends import launch
from keyreeve_keyserver.backends.launcher_link import LauncherLink
from keyreeve_keyserver.backends.pkcs11_backend import Pkcs11Backend, Pkcs11Settings
from keyreeve_testing.processes import children_of
from keyreeve_testing.softhsm import SoftHsmToken, make_softhsm_token, softhsm_is_installed

pytestmark = [
    pytest.mark.softhsm,
    pytest.mark.skipif(not softhsm_is_installed(), reason="softhsm2 is not installed"),
]


@pytest.fixture
def token(tmp_path: Path) -> SoftHsmToken:
    return make_softhsm_token(tmp_path / "softhsm")


def backend_of(token: SoftHsmToken) -> Pkcs11Backend:
    uri = Pkcs11Uri(
        token=token.label, module_path=PurePosixPath(token.module), pin_source=PurePosixPath(token.pin_file)
    )
    return Pkcs11Backend("hsm", Pkcs11Settings(uri, workers=1, softhsm_conf=token.conf))


async def worker_of(backend: Pkcs11Backend) -> int:
    async with asyncio.timeout(20):
        while not backend.worker_pids:
            await asyncio.sleep(0.02)
    return backend.worker_pids[0]


def is_running(pid: int) -> bool:
    """An orphan that nobody reaps, as in a container without an init, has ended nevertheless."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def until_gone(*pids: int) -> None:
    async with asyncio.timeout(20):
        while any(is_running(pid) for pid in pids):
            await asyncio.sleep(0.02)


async def test_a_worker_comes_back_when_the_pin_file_is_gone(token: SoftHsmToken) -> None:
    backend = backend_of(token)
    await backend.start()
    token.pin_file.unlink()
    first = await worker_of(backend)
    os.kill(first, signal.SIGKILL)
    assert await backend.encrypt("kek", bytes(12), b"", b"a question that may be put twice")
    assert await worker_of(backend) != first
    await backend.close()


async def test_a_pin_file_that_comes_later_is_read_then(token: SoftHsmToken, tmp_path: Path) -> None:
    moved = token.pin_file.rename(tmp_path / "moved")
    backend = backend_of(token)
    await backend.start()
    assert "cannot be read" in backend.health().detail
    moved.rename(token.pin_file)
    assert await worker_of(backend)
    await backend.close()


async def test_a_pin_file_that_is_open_to_others_stops_the_start(token: SoftHsmToken) -> None:
    token.pin_file.chmod(0o644)
    with pytest.raises(ConfigInvalid, match="chmod 600"):
        await backend_of(token).start()


async def test_nothing_is_left_when_the_signer_closes(token: SoftHsmToken) -> None:
    before = set(children_of(os.getpid()))
    link = await LauncherLink.start([backend_of(token).worker])
    (launcher,) = set(children_of(os.getpid())) - before
    pid, connection = await link.spawn("hsm")
    link.close()
    connection.close()
    await until_gone(pid, launcher)


async def test_a_launcher_that_is_killed_takes_its_workers_along_and_is_missed(token: SoftHsmToken) -> None:
    before = set(children_of(os.getpid()))
    link = await LauncherLink.start([backend_of(token).worker])
    (launcher,) = set(children_of(os.getpid())) - before
    pid, connection = await link.spawn("hsm")
    os.kill(launcher, signal.SIGKILL)
    async with asyncio.timeout(20):
        await link.gone.wait()
    await until_gone(pid)
    with pytest.raises(TokenUnavailable, match="launcher of workers is gone"):
        await link.spawn("hsm")
    connection.close()
    link.close()


async def test_a_spawn_that_nobody_waits_for_leaves_no_worker(token: SoftHsmToken) -> None:
    before = set(children_of(os.getpid()))
    link = await LauncherLink.start([backend_of(token).worker])
    (launcher,) = set(children_of(os.getpid())) - before
    for pause in (0, 0.001, 0.01, 0.05):
        task = asyncio.create_task(link.spawn("hsm"))
        await asyncio.sleep(pause)
        task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(ended, tuple):  # it came before the cancellation
            ended[1].close()
            link.kill(ended[0])
    pid, connection = await link.spawn("hsm")
    async with asyncio.timeout(20):
        while children_of(launcher) != [pid]:
            await asyncio.sleep(0.02)
    connection.close()
    link.close()


@pytest.mark.parametrize(
    "second",
    [
        b"junk",
        launch.order_bytes(launch.Prepare(())),
        launch.order_bytes(launch.Spawn(1, "other")),
    ],
)
def test_an_order_that_breaks_a_rule_ends_the_launcher(second: bytes) -> None:
    """So a signer that is owned cannot have it start a program of the attacker's, nor read another file."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        command = [sys.executable, "-m", "keyreeve_keyserver.backends.launcher", str(theirs.fileno()), str(os.getpid())]
        process = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
        ours.settimeout(20)
        ours.send(launch.order_bytes(launch.Prepare(())))
        assert launch.parse_report(ours.recv(4096)) == launch.Ready()
        ours.send(second)
        assert process.wait(20) == 65
