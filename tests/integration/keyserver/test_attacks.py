"""docs/threat-model.md says what owning a process gains: here each claim is tried against real processes, and shown to be no empty one."""

from __future__ import annotations

import base64
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key
from keyreeve_common.errors import KeyNotFound, KeyreeveError, PurposeMismatch, PurposeNotPermitted, SealedRecordInvalid
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.schemes import SignatureScheme
from keyreeve_keyserver import frames
from keyreeve_keyserver.hardening import landlock
from keyreeve_testing.attacks import attack_as
from keyreeve_testing.processes import command_line, descendants_of
from keyreeve_testing.signer import SignerClient, connect_signer, running_signer, signer_command, write_signer_config
from keyreeve_testing.softhsm import make_softhsm_token, softhsm_is_installed
from keyreeve_testing.users import (
    OTHER_UID,
    TARGET_UID,
    command_as,
    directory_of,
    give,
    users_can_be_changed,
)

pytestmark = [
    pytest.mark.softhsm,
    pytest.mark.skipif(not softhsm_is_installed(), reason="softhsm2 is not installed"),
    pytest.mark.skipif(not users_can_be_changed(), reason="needs root, to run signer and attacker as other users"),
]
CONTENT = build_tls13_content(Purpose.TLS13_SERVER_VERIFY, bytes(range(32)))
IDLE = "import sys; print('ready', flush=True); sys.stdin.read()"


@dataclass(frozen=True)
class Target:
    """A signer with a token, its launcher and its workers, all of TARGET_UID."""

    signer: SignerClient
    log: Path
    pin: str
    pin_file: Path

    @property
    def pids(self) -> dict[str, int]:
        assert self.signer.process is not None
        found = {"signer": self.signer.process.pid}
        for pid in descendants_of(self.signer.process.pid):
            line = command_line(pid)
            if any(line):  # else it has ended, and nobody has waited for it yet
                found["launcher" if "keyreeve_keyserver.backends.launcher" in line else "worker"] = pid
        return found


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with directory_of(TARGET_UID) as directory:
        token = make_softhsm_token(directory / "softhsm")
        config = write_signer_config(directory / "etc", token=token)
        give(directory, TARGET_UID)
        with running_signer(config, log=directory / "log", uid=TARGET_UID) as signer:
            signer.control("health")
            yield Target(signer, directory / "log", token.pin, token.pin_file)


@contextmanager
def idle_process(uid: int) -> Iterator[int]:
    """What has no protection of its own, and shows that the attacks work."""
    command = command_as(uid, [sys.executable, "-c", IDLE])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        process.stdin.close()  # type: ignore[union-attr]  # it is a pipe


# Attach and dump, from outside, as the same user.


def test_the_attacks_work_on_a_process_without_protections() -> None:
    with idle_process(TARGET_UID) as pid:
        results = attack_as(TARGET_UID, pid)
    assert {name for name, result in results.items() if result.startswith("gained")} == set(results)


@pytest.mark.parametrize("role", ["signer", "launcher", "worker"])
def test_the_same_user_neither_attaches_nor_reads(target: Target, role: str) -> None:
    results = attack_as(TARGET_UID, target.pids[role])
    assert set(results.values()) == {"refused: PermissionError"}, results
    assert Path(f"/proc/{target.pids[role]}/mem").stat().st_uid == 0


@pytest.mark.skipif(shutil.which("gcore") is None, reason="gdb is not installed")
def test_gcore_dumps_the_idle_process_and_not_the_signer(target: Target) -> None:
    with directory_of(TARGET_UID) as directory, idle_process(TARGET_UID) as idle:
        for pid, dumps in ((idle, True), (target.pids["signer"], False)):
            command = command_as(TARGET_UID, ["gcore", "-o", str(directory / "core"), str(pid)])
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
            assert (done.returncode == 0) is dumps, done.stderr
            assert (directory / f"core.{pid}").exists() is dumps


def core_dumped(protect: str, directory: Path) -> bool:
    """Whether a process that lifted its own core limit leaves a core when it is ended by a signal that writes one."""
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)\n{protect}\n{IDLE}"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=directory
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGSEGV)
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    return ended.si_code == os.CLD_DUMPED


def test_a_crash_writes_no_core(target: Target, tmp_path: Path) -> None:
    """Neither by the limit, nor where somebody lifted that."""
    assert re.search(r"Max core file size +0 +0 ", Path(f"/proc/{target.pids['signer']}/limits").read_text())
    if resource.getrlimit(resource.RLIMIT_CORE)[1] != resource.RLIM_INFINITY:
        pytest.skip("the core limit cannot be lifted here")
    if not core_dumped("", tmp_path):
        pytest.skip("this host writes no cores at all")
    assert not core_dumped(
        "from keyreeve_keyserver.hardening.process import forbid_tracing; forbid_tracing()", tmp_path
    )


# Inside the signer, and inside a worker: the real protections in a process that runs the attacker's code.


def run_inside(kind: str, directory: Path, **more: Any) -> dict[str, Any]:
    allowed = directory / kind / "allowed"
    allowed.mkdir(parents=True)
    secret = directory / kind / "secret"
    secret.write_text("12345678")
    paths = {"write": str(allowed), "secret": str(secret), "reads": [], "writes": [], "network": False, **more}
    done = subprocess.run(
        [sys.executable, "-m", "keyreeve_testing.inside", kind, json.dumps(paths)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


REFUSALS = ("EPERM", "EACCES", "ENOSYS", "EXDEV")  # EXDEV: Landlock's word for a link across its rules
HARMLESS = {"write where it may", "thread"}


def test_the_acts_are_possible_without_protections(tmp_path: Path) -> None:
    """Those that a call with wrong arguments stands for fail by their arguments, so not with one of REFUSALS."""
    acts = run_inside("nothing", tmp_path)["acts"]
    assert not [name for name, result in acts.items() if result in REFUSALS]


def test_code_inside_the_signer_reaches_nothing(tmp_path: Path) -> None:
    result = run_inside("signer", tmp_path)
    off = {name: state for name, state in result["protections"].items() if state != "on"}
    assert not off
    done = {name for name, act in result["acts"].items() if act not in REFUSALS}
    assert done == HARMLESS


@pytest.mark.parametrize("network", [False, True])
def test_code_inside_a_worker_reaches_what_its_backend_needs(tmp_path: Path, network: bool) -> None:
    acts = run_inside("worker", tmp_path, network=network)["acts"]
    refused = {name for name, act in acts.items() if act in REFUSALS}
    assert refused >= {
        "exec", "fork", "ptrace the parent", "read the parent's memory", "process_vm_readv", "mount", "chroot", "bpf",
        "keyctl", "userfaultfd", "io_uring_setup", "unshare", "open to traces again", "socket: packet",
        "signal the parent", "signal the parent by a descriptor",
        "read the secret", "read a user's file", "list the root", "write elsewhere", "link the secret to where it may read",
    }  # fmt: skip
    assert ("truncate the secret" in refused) is (landlock.abi() >= 3)
    sockets = {name for name in acts if name.startswith("socket") and name != "socket: packet"}
    assert sockets & refused == (set() if network else sockets)
    assert {acts[name] for name in HARMLESS} == {"done"}


def test_code_inside_a_worker_whose_files_are_not_confined_signals_nobody(tmp_path: Path) -> None:
    acts = run_inside("worker", tmp_path, anywhere=True)["acts"]
    assert acts["read the secret"] == "done"
    for act in ("signal the parent", "signal the parent by a descriptor", "exec", "fork", "read the parent's memory"):
        assert acts[act] in REFUSALS, act
    assert {acts[name] for name in HARMLESS} == {"done"}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the other ways to make a call are those of x86-64")
@pytest.mark.parametrize("confine", ["confine_signer_calls(p)", "confine_worker(p, Reach())"])
@pytest.mark.parametrize("way", ["int 0x80", "x32"])
def test_a_call_by_the_numbers_of_another_abi_ends_the_process(confine: str, way: str) -> None:
    """By those numbers a filter would let through what it does not mean to: getpid of i386 (20) is writev, which the signer may."""
    code = f"""
import ctypes, mmap, os, threading
from keyreeve_keyserver.hardening.lockdown import Protections, Reach, confine_signer_calls, confine_worker
code = mmap.mmap(-1, 4096, prot=7)
code.write(bytes.fromhex("53b814000000cd805bc3"))  # push rbx; mov eax, 20; int 0x80; pop rbx; ret
old = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
call = old if {way!r} == "int 0x80" else lambda: ctypes.CDLL(None).syscall(0x4000_0000 + 39)
if {way!r} == "int 0x80":
    assert call() == os.getpid()
print("tried", flush=True)
p = Protections()
{confine}
assert "calls" in map(str, p.on)
thread = threading.Thread(target=call)  # not it alone is to end
thread.start()
thread.join()
print("survived")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    if way == "int 0x80" and not done.stdout:
        pytest.skip("this kernel has no calls of 32 bits")
    assert (done.stdout, done.returncode) == ("tried\n", -signal.SIGSYS), done.stderr


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_the_real_processes_are_protected(target: Target) -> None:
    for role, pid in target.pids.items():
        for task in Path(f"/proc/{pid}/task").iterdir():
            status = status_of(int(task.name))
            assert status["NoNewPrivs"] == "1", role
            assert status["Seccomp"] == ("0" if role == "launcher" else "2"), role
            assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0, role
            assert status["Uid"].split() == [str(TARGET_UID)] * 4
    events = [json.loads(line) for line in target.log.read_text().splitlines() if line.startswith("{")]
    (hardened,) = (event for event in events if event.get("event") == "signer_hardened")
    assert [hardened[name] for name in ("no_core", "no_trace", "no_new_privileges", "files", "calls")] == ["on"] * 5
    health = target.signer.control("health")
    assert health["protections"]["calls"] == "on"
    (hsm,) = (backend for backend in health["backends"] if backend["name"] == "hsm")
    assert (hsm["protections"]["files"], hsm["protections"]["calls"]) == ("on", "on")


def test_the_memory_of_a_privileged_signer_is_locked(tmp_path: Path) -> None:
    """Without privileges it takes LimitMEMLOCK=infinity, as in the unit; what is off is said with what to do."""
    with running_signer(write_signer_config(tmp_path / "etc"), log=tmp_path / "log") as signer:
        protections = signer.control("health")["protections"]
        assert signer.process is not None
        locked = int(status_of(signer.process.pid)["VmLck"].split()[0])
    assert (locked > 0) is (protections["memory-locked"] == "on")
    assert protections["memory-locked"] == "on" or "LimitMEMLOCK=infinity" in protections["memory-locked"]


def test_a_required_protection_that_is_not_to_be_had_stops_the_start(tmp_path: Path) -> None:
    with directory_of(TARGET_UID) as directory:
        extra = '[hardening]\nrequired = ["calls", "files", "memory-locked"]'
        config = write_signer_config(directory / "etc", extra=extra)
        give(directory, TARGET_UID)
        command = [
            "prlimit",
            "--memlock=65536:65536",
            *command_as(TARGET_UID, signer_command(config, "--frames-fd", "0")),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 78
    assert "hardening.required: not to be had here: memory-locked (needs LimitMEMLOCK=infinity" in done.stderr


def test_the_signer_and_its_children_have_no_more_descriptors_than_they_need(target: Target) -> None:
    """No network socket, and no open PIN file in any of them."""
    networks = [Path(f"/proc/{target.pids['signer']}/net/{table}") for table in ("tcp", "tcp6", "udp", "udp6", "raw")]
    inodes = {
        word for table in networks if table.exists() for line in table.read_text().splitlines() for word in line.split()
    }
    for role, pid in target.pids.items():
        opened = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]
        sockets = {match[1] for each in opened if (match := re.fullmatch(r"socket:\[(\d+)\]", each))}
        assert sockets, role
        assert not sockets & inodes, role
        assert not [each for each in opened if each.startswith(str(target.pin_file.parent / "pin"))], role


def test_the_pin_is_read_once(target: Target) -> None:
    """The worker that comes after the file is gone logs in all the same; neither arguments nor environments have the PIN."""
    pin = target.pin_file.read_bytes()
    target.pin_file.unlink()
    try:
        os.kill(target.pids["worker"], signal.SIGKILL)
        members = {"key_type": "ec-p256", "role": "handshake", "purposes": ["tls13_server_verify"], "backend": "hsm"}
        made = [_created(target.signer, f"after-{n}", members) for n in range(3)]
        assert any(made)
    finally:
        target.pin_file.write_bytes(pin)
        target.pin_file.chmod(0o600)
        os.chown(target.pin_file, TARGET_UID, TARGET_UID)
    for pid in target.pids.values():
        told = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        assert target.pin.encode() not in told


def _created(signer: SignerClient, key_id: str, members: dict[str, Any]) -> bool:
    """Making a key is never put to a second worker: the one that was killed costs one request."""
    try:
        return bool(signer.control("create_key", key_id=key_id, **members)["record"])
    except KeyreeveError:
        return False


# Frames: what an owned front end can say.


def new_key(signer: SignerClient, key_id: str, **changes: Any) -> dict[str, Any]:
    members = {"key_type": "ec-p256", "role": "handshake", "purposes": ["tls13_server_verify"], "backend": "software"}
    return signer.control("create_key", key_id=key_id, **{**members, **changes})


def item(key_id: str, **changes: Any) -> frames.SignItem:
    fields: dict[str, Any] = {
        "id": 1,
        "key_id": KeyId(key_id),
        "scheme": SignatureScheme.ECDSA_SECP256R1_SHA256,
        "purpose": Purpose.TLS13_SERVER_VERIFY,
        "deadline_ms": 20_000,
        "message": CONTENT,
    }
    return frames.SignItem(**{**fields, **changes})


def refusal(signer: SignerClient, asked: frames.SignItem) -> type[KeyreeveError]:
    (result,) = signer.sign(asked).values()
    assert isinstance(result, frames.Refused), result
    return type(result.error)


def test_forged_records_open_nothing(target: Target, tmp_path: Path) -> None:
    """Wider purposes, another role, one key's header on another's box, a record of another cluster."""
    signer = target.signer
    mine, other = (base64.b64decode(new_key(signer, key_id)["record"]) for key_id in ("mine", "other"))
    header = len(b"KRV1") + 4 + int.from_bytes(mine[4:8], "big")
    with running_signer(write_signer_config(tmp_path / "etc"), log=tmp_path / "log") as stranger:
        own = write_signer_config(tmp_path / "own")
        (own.parent / "passphrase").write_text("the passphrase of quite another cluster\n")
        assert new_key(stranger, "foreign")["record"]
    with running_signer(own, log=tmp_path / "log") as stranger:
        foreign = base64.b64decode(new_key(stranger, "foreign")["record"])
    forged = {
        "wider purposes": mine.replace(b'"tls13_server_verify"', b'"tls13_client_verify"'),
        "another role": mine.replace(b'"handshake"', b'"authority"'),
        "another key's box": mine[:header] + other[header:],
        "another key id": mine.replace(b'"mine"', b'"good"'),
        "another cluster's": foreign,
    }
    for what, record in forged.items():
        assert record != mine, what
        with pytest.raises(SealedRecordInvalid):
            signer.control("load_key", record=base64.b64encode(record).decode())
    for key_id in ("mine", "good", "foreign"):
        assert refusal(signer, item(key_id)) is KeyNotFound


def test_a_purpose_that_the_record_does_not_have_is_refused(target: Target) -> None:
    signer = target.signer
    signer.control("load_key", record=new_key(signer, "narrow")["record"])
    for purpose in Purpose:
        if purpose is not Purpose.TLS13_SERVER_VERIFY:
            assert refusal(signer, item("narrow", purpose=purpose)) is PurposeNotPermitted, purpose
    client = build_tls13_content(Purpose.TLS13_CLIENT_VERIFY, bytes(range(32)))
    for message in (client, CONTENT[:-1], CONTENT + b"0", b"", bytes(32)):
        assert refusal(signer, item("narrow", message=message)) is PurposeMismatch


def test_a_replayed_frame_gains_another_signature_of_the_same_message_and_no_more(tmp_path: Path) -> None:
    """The signer is locked down while its audit log is on: it writes there, and each of the two signatures is on record."""
    extra = f'[audit]\ndirectory = "{tmp_path / "audit"}"\norigin = "log.td.test/one"'
    with running_signer(write_signer_config(tmp_path / "etc", extra=extra), log=tmp_path / "log") as signer:
        _replay(signer)


def _replay(signer: SignerClient) -> None:
    health = signer.control("health")
    assert {health["protections"][name] for name in ("files", "calls", "no-trace")} == {"on"}
    made = new_key(signer, "replayed")
    signer.control("load_key", record=made["record"])
    before = signer.control("health")["audit"]["recorded"]
    frame = frames.SignBatch(77, "spiffe://td.test/agent/a", (item("replayed"),)).to_bytes()
    signer.connection.sendall(frame + frame)
    key = load_der_public_key(base64.b64decode(made["spki_der"]))
    assert isinstance(key, ec.EllipticCurvePublicKey)
    for _ in range(2):
        answer = signer.read_answer()
        assert isinstance(answer, frames.SignResults)
        (result,) = answer.results
        assert isinstance(result, frames.Signed)
        key.verify(result.signature, CONTENT, ec.ECDSA(hashes.SHA256()))
    assert signer.control("health")["audit"]["recorded"] - before == 2


# The signer's socket file.


def test_another_user_gets_no_answer_from_the_socket() -> None:
    """By the file's mode; and where that was opened wide, by SO_PEERCRED. Junk of one peer does not disturb the next."""
    with directory_of(TARGET_UID) as directory:
        config = write_signer_config(directory / "etc")
        config.write_text(config.read_text() + f"[listen]\nallowed_uids = [{TARGET_UID}, 0]\n")
        give(directory, TARGET_UID)
        path, log = directory / "s", directory / "log"
        with log.open("wb") as stderr:
            command = command_as(TARGET_UID, signer_command(config, "--listen", str(path)))
            process = subprocess.Popen(command, stderr=stderr, stdin=subprocess.DEVNULL)
        try:
            first = connect_signer(path, process)
            first.connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert isinstance(first.read_answer(), frames.Malformed)
            first.connection.close()
            assert attack_as(OTHER_UID, path) == {"connect": "refused: PermissionError"}
            path.chmod(0o666)
            assert attack_as(OTHER_UID, path) == {"connect": "gained: answered 0"}
            assert f'"uid": {OTHER_UID}' in log.read_text() or f'"uid":{OTHER_UID}' in log.read_text()
            second = connect_signer(path, process)
            assert second.control("health")["protections"]["calls"] == "on"
            second.connection.close()
        finally:
            process.terminate()
            assert process.wait(20) == 0
        assert not path.exists()
