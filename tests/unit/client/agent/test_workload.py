"""Workload attestation against real processes at the other end of a real socket."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from keyreeve_client.agent import workload
from keyreeve_client.agent.authorisation import Selector
from keyreeve_client.agent.workload import COSTLY_KINDS, Peer, start_time_of
from keyreeve_common.errors import Unauthenticated

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="starts processes of other users: needs root")
CONNECT_ONLY = "import os,socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print('up',flush=True)"
CONNECT = f"{CONNECT_ONLY}; sys.stdin.read()"
# The interpreter may lie where only root can execute it: become another user from within.
AS_NOBODY = f"import os,socket; os.setgroups([33,2]); os.setgid(65534); os.setuid(65534); {CONNECT}"
PYTHON = os.path.realpath(sys.executable)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user may enter, unlike tmp_path."""
    directory = Path(tempfile.mkdtemp(prefix="keyreeve-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


Connect = Callable[..., tuple[Any, socket.socket]]


@pytest.fixture
def connect(open_directory: Path) -> Iterator[Connect]:
    """Starts a process that connects; gives it and our end."""
    listener = socket.socket(socket.AF_UNIX)
    path = open_directory / "s"
    listener.bind(str(path))
    path.chmod(0o666)
    listener.listen()
    listener.settimeout(10)
    processes: list[Any] = []
    ends: list[socket.socket] = []

    def start(*command: str, script: str = CONNECT, **options: Any) -> tuple[Any, socket.socket]:
        argv = [*(command or (PYTHON,)), "-S", "-c", script, str(path)]
        process: Any = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, **options)
        processes.append(process)
        ends.append(listener.accept()[0])
        assert process.stdout.readline() == b"up\n"
        return process, ends[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    for end in ends:
        end.close()
    listener.close()


def values(peer: Peer) -> set[str]:
    return {selector.value for selector in peer.selectors()}


def test_own_process(connect: Connect) -> None:
    process, end = connect()
    with closing(Peer(end)) as peer:
        assert peer.pid == process.pid
        assert {f"uid:{os.geteuid()}", f"gid:{os.getegid()}"} <= values(peer)
        assert not any(value.startswith(("path:", "sha256:")) for value in values(peer))
        peer.learn(COSTLY_KINDS)
        digest = hashlib.sha256(Path(PYTHON).read_bytes()).hexdigest()
        assert {f"path:{PYTHON}", f"sha256:{digest}"} <= values(peer)
        assert peer.lacks(COSTLY_KINDS) == frozenset()


@needs_root
def test_another_user_with_supplementary_groups(connect: Connect) -> None:
    _, end = connect(script=AS_NOBODY)
    with closing(Peer(end)) as peer:
        found = values(peer)
    assert {"uid:65534", "user:nobody", "gid:65534", "group:nogroup"} <= found
    assert {"supplementary_gid:33", "supplementary_group:www-data", "supplementary_gid:2"} <= found
    assert "uid:0" not in found


@needs_root
def test_groups_from_proc_when_the_kernel_does_not_say(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "_MAX_OPTION_BYTES", 2)
    _, end = connect(script=AS_NOBODY)
    with closing(Peer(end)) as peer:
        assert {"supplementary_gid:33", "supplementary_gid:2"} <= values(peer)


def test_a_process_that_is_gone_is_refused(connect: Connect) -> None:
    process, end = connect()
    with closing(Peer(end)) as peer:
        peer.check_alive()
        process.kill()
        process.wait()
        for ask in (peer.check_alive, peer.selectors, lambda: peer.learn(COSTLY_KINDS)):
            with pytest.raises(Unauthenticated):
                ask()


def test_a_process_that_was_gone_before_we_looked_is_refused(connect: Connect) -> None:
    process, end = connect()
    process.kill()
    process.wait()
    with pytest.raises(Unauthenticated):
        with closing(Peer(end)) as peer:
            peer.check_alive()


def test_pid_reuse_is_noticed_without_pidfds(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pid with another start time is another process."""
    monkeypatch.setattr(workload, "_peer_pidfd", lambda connection, pid: None)
    process, end = connect()
    with closing(Peer(end)) as peer:
        peer.check_alive()
        started = start_time_of(process.pid)
        assert started is not None
        monkeypatch.setattr(workload, "start_time_of", lambda pid: started + 1)
        with pytest.raises(Unauthenticated):
            peer.learn(COSTLY_KINDS)


def test_a_zombie_is_gone(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "_peer_pidfd", lambda connection, pid: None)
    process, end = connect()
    with closing(Peer(end)) as peer:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(Unauthenticated):
            peer.check_alive()


def test_exec_of_another_program_drops_what_was_learnt(connect: Connect, open_directory: Path) -> None:
    cat = open_directory / "cat"
    shutil.copy("/bin/cat", cat)
    process, end = connect(
        script=f"{CONNECT_ONLY}; s.set_inheritable(True); sys.stdin.buffer.raw.read(3); os.execv('{cat}', ['cat'])"
    )
    with closing(Peer(end)) as peer:
        peer.learn({workload.PATH_KIND})
        assert f"path:{PYTHON}" in values(peer)
        process.stdin.write(b"go\n")
        process.stdin.flush()
        process.stdin.write(b"echo\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"echo\n"
        assert not any(value.startswith("path:") for value in values(peer))
        peer.learn({workload.PATH_KIND})
        assert f"path:{cat}" in values(peer)


def root_is_a_mount_point() -> bool:
    return any(line.split()[4] == "/" for line in Path("/proc/self/mountinfo").read_text().splitlines())


@needs_root
@pytest.mark.skipif(not root_is_a_mount_point(), reason="in a plain chroot unshare(1) cannot make the mounts private")
def test_a_private_mount_borrows_no_name(connect: Connect, open_directory: Path) -> None:
    """A process whose own mount namespace shows another program under a trusted name has no path selector of that name."""
    trusted = open_directory / "trusted"
    shutil.copy("/bin/true", trusted)
    script = f'mount --bind {PYTHON} {trusted} && exec {trusted} "$@"'
    env = {**os.environ, "PYTHONHOME": sys.base_prefix}
    _, end = connect("/usr/bin/unshare", "--mount", "/bin/sh", "-c", script, "sh", env=env)
    with closing(Peer(end)) as peer:
        assert os.readlink(f"/proc/{peer.pid}/exe") in (str(trusted), PYTHON)
        peer.learn(COSTLY_KINDS)
        assert f"path:{trusted}" not in values(peer)
        assert any(value.startswith("sha256:") for value in values(peer))


def test_a_deleted_program_has_no_path(connect: Connect, open_directory: Path) -> None:
    program = open_directory / "python"
    shutil.copy(PYTHON, program)
    env = {**os.environ, "PYTHONHOME": sys.base_prefix}
    _, end = connect(str(program), env=env)
    program.unlink()
    with closing(Peer(end)) as peer:
        peer.learn(COSTLY_KINDS)
        assert not any(value.startswith("path:") for value in values(peer))
        assert any(value.startswith("sha256:") for value in values(peer))


def test_what_may_not_be_read_is_absent_and_logged_once(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    workload._warn_once.cache_clear()
    _, end = connect()
    real = os.open

    def forbid(path: object, *args: object, **kwargs: object) -> int:
        if str(path).endswith("/exe"):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)  # type: ignore[arg-type]

    with closing(Peer(end)) as peer:
        monkeypatch.setattr(os, "open", forbid)
        peer.learn(COSTLY_KINDS)
        peer.learn(COSTLY_KINDS)
        assert not any(value.startswith(("path:", "sha256:")) for value in values(peer))
    assert len([record for record in caplog.records if record.message == "workload_selector_absent"]) == 1


def test_an_executable_is_hashed_once(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = workload._HashCache()
    monkeypatch.setattr(workload, "_HASHES", cache)
    for _ in range(2):
        _, end = connect()
        with closing(Peer(end)) as peer:
            peer.learn({workload.SHA256_KIND})
    assert len(cache.entries) == 1


def test_a_hash_that_another_thread_pushes_out_is_still_the_answer(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload, "_HASHES", workload._HashCache())
    monkeypatch.setattr(workload, "_HASH_CACHE_SIZE", 0)
    _, end = connect()
    with closing(Peer(end)) as peer:
        peer.learn({workload.SHA256_KIND})
        assert any(selector.kind == workload.SHA256_KIND for selector in peer.selectors())


def test_kinds() -> None:
    assert Selector("unix", "path:/a:b").kind == "unix:path"
    assert start_time_of(os.getpid()) is not None
    assert start_time_of(2**22 + 1) is None
