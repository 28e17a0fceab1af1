"""The signer's PKCS#11 workers beside bare python-pkcs11 processes on one SoftHSM token: `python bench/pkcs11_pool.py [--rounds 5]`.

Three sides sign with the same kind of key and mechanism in turn, `workers` processes each, round after round: bare processes in a tight
loop, the backend alone (`Pkcs11Backend.sign` in this process), and a whole signer with judging and audit log. Figures are of all rounds
together; JSON goes to stdout. `per_s` is by the wall clock, where the caller of a side shares the processors with it; `cpu_us` counts the
side's processes alone.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import os
import select
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pkcs11
from keyreeve_common.key_id import KeyId
from keyreeve_common.pkcs11_uri import parse_pkcs11_uri
from keyreeve_common.purposes import KeyRole, Purpose, build_tls13_content
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_keyserver import frames
from keyreeve_keyserver.backends import pkcs11_mechanisms as mechanisms
from keyreeve_keyserver.backends.pkcs11_backend import Pkcs11Backend, Pkcs11Settings
from keyreeve_keyserver.backends.ports import Backend, SignRequest
from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_testing.faulty_module import make_faulty_module
from keyreeve_testing.processes import descendants_of
from keyreeve_testing.signer import SignerClient, running_signer, write_signer_config
from keyreeve_testing.softhsm import SoftHsmToken, make_softhsm_token

MESSAGE = build_tls13_content(Purpose.TLS13_SERVER_VERIFY, bytes(range(32)))
SCHEMES = {
    "p256": (KeyType.EC_P256, SignatureScheme.ECDSA_SECP256R1_SHA256),
    "rsa2048": (KeyType.RSA_2048, SignatureScheme.RSA_PSS_RSAE_SHA256),
    "ed25519": (KeyType.ED25519, SignatureScheme.ED25519),
}
BATCH, BATCHES = 64, 4
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Tally:
    """What one side did in all its rounds."""

    signatures: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def add(self, signatures: int, wall_s: float, cpu_s: float) -> None:
        self.signatures += signatures
        self.wall_s += wall_s
        self.cpu_s += cpu_s

    def figures(self) -> dict[str, float]:
        return {
            "per_s": round(self.signatures / self.wall_s, 1),
            "cpu_us": round(self.cpu_s / self.signatures * 1e6, 2),
            "signatures": self.signatures,
        }


@dataclass(frozen=True, slots=True)
class Side:
    """`run` signs for so many seconds and gives the number of signatures; `pids` are the processes whose time it costs."""

    run: Callable[[float], int]
    pids: Callable[[], Iterable[int]]


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of living processes, all of their threads. Source: proc(5), /proc/pid/stat fields 14 and 15."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total * _TICK_S


def bare_process(token: SoftHsmToken, ref: str, scheme: int, link: Connection) -> None:
    """One session; for each number of seconds that comes it signs as long in a tight loop and tells how often. Ends with its link."""
    os.environ["SOFTHSM2_CONF"] = str(token.conf)
    how = mechanisms.SIGN_MECHANISMS[SignatureScheme(scheme)]
    data = hashlib.new(how.prehash, MESSAGE).digest() if how.prehash else MESSAGE
    session = pkcs11.lib(str(token.module)).get_token(token_label=token.label).open(rw=True, user_pin=token.pin)
    key: Any = session.get_key(object_class=pkcs11.ObjectClass.PRIVATE_KEY, id=ref.encode("ascii"))
    key.sign(data, mechanism=how.mechanism, mechanism_param=how.parameter)
    link.send(0)
    while seconds := link.recv():
        count, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            key.sign(data, mechanism=how.mechanism, mechanism_param=how.parameter)
            count += 1
        link.send(count)


@contextmanager
def bare_side(token: SoftHsmToken, ref: str, scheme: SignatureScheme, workers: int) -> Iterator[Side]:
    context = multiprocessing.get_context("spawn")
    processes, links = [], []
    for _ in range(workers):  # one after the other: SoftHSM rewrites the token at each log-in
        ours, theirs = context.Pipe()
        process = context.Process(target=bare_process, args=(token, ref, int(scheme), theirs), daemon=True)
        process.start()
        ours.recv()
        processes.append(process)
        links.append(ours)

    def run(seconds: float) -> int:
        for link in links:
            link.send(seconds)
        return sum(link.recv() for link in links)

    pids = [process.pid for process in processes if process.pid is not None]
    yield Side(run, lambda: pids)
    for link, process in zip(links, processes, strict=True):
        link.send(0)
        process.join()


async def made_key(backend: Backend, key_type: KeyType) -> KeyRecord:
    created = await backend.create(KeyId("bench"), key_type)
    record = KeyRecord(
        key_id=KeyId("bench"),
        key_type=key_type,
        role=KeyRole.HANDSHAKE,
        purposes=frozenset({Purpose.TLS13_SERVER_VERIFY}),
        backend=backend.name,
        backend_ref=created.backend_ref,
        spki_der=created.spki_der,
        label="bench",
        created=datetime.now(UTC).replace(microsecond=0),
    )
    await backend.load(record, None)
    return record


async def backend_rounds(backend: Pkcs11Backend, record: KeyRecord, scheme: SignatureScheme, seconds: float) -> int:
    """`BATCHES` callers with batches of `BATCH`, each beginning the next as its last is done."""
    end, signed = time.monotonic() + seconds, 0

    async def caller() -> None:
        nonlocal signed
        while time.monotonic() < end:
            request = SignRequest(record, scheme, MESSAGE, time.monotonic() + 20)
            outcomes = await backend.sign([request] * BATCH)
            signed += sum(isinstance(outcome, bytes) for outcome in outcomes)

    await asyncio.gather(*(caller() for _ in range(BATCHES)))
    return signed


def signer_rounds(client: SignerClient, key_id: KeyId, scheme: SignatureScheme, seconds: float) -> int:
    """The same through the frames of a signer; answers are counted, not read, so that this process costs little."""
    items = tuple(
        frames.SignItem(number, key_id, int(scheme), int(Purpose.TLS13_SERVER_VERIFY), 20_000, MESSAGE)
        for number in range(BATCH)
    )
    splitter, signed, outstanding = frames.splitter(), 0, 0
    left: dict[int, int] = {}
    end = time.monotonic() + seconds
    while True:
        while outstanding < BATCHES and time.monotonic() < end:
            batch_id = client.next_id()
            left[batch_id] = BATCH
            outstanding += 1
            client.connection.sendall(frames.SignBatch(batch_id, "local", items).to_bytes())
        if not outstanding:
            return signed
        select.select([client.connection], [], [], 60)
        for frame in splitter.feed(client.connection.recv(1_048_576)):
            answer = frames.parse_answer_frame(frame)
            if not isinstance(answer, frames.SignResults):
                raise SystemExit(f"not the results of a batch: {answer}")
            signed += sum(isinstance(result, frames.Signed) for result in answer.results)
            left[answer.batch_id] -= len(answer.results)
            if not left[answer.batch_id]:
                del left[answer.batch_id]
                outstanding -= 1


@contextmanager
def signer_side(
    directory: Path, token: SoftHsmToken, key_type: KeyType, scheme: SignatureScheme, workers: int
) -> Iterator[Side]:
    config = write_signer_config(directory, token=token)
    text = config.read_text().replace("workers = 2", f"workers = {workers}")
    config.write_text(text + '[audit]\ndirectory = "audit"\nfsync = "off"\n')
    with running_signer(config, log=directory / "log") as client:
        assert client.process is not None  # noqa: S101 - running_signer started it
        pid = client.process.pid
        made = client.control(
            "create_key",
            key_id="bench-signer",
            key_type=str(key_type),
            role="handshake",
            purposes=["tls13_server_verify"],
            backend="hsm",
            label="bench",
        )
        client.control("load_key", record=made["record"])
        yield Side(
            lambda seconds: signer_rounds(client, KeyId("bench-signer"), scheme, seconds),
            lambda: [pid, *descendants_of(pid)],
        )


def measure(kind: str = "p256", *, workers: int = 2, rounds: int = 5, seconds: float = 1.0) -> dict[str, Any]:
    """Figures by side, and what backend and signer reach of the bare processes' throughput, per second and per processor second."""
    key_type, scheme = SCHEMES[kind]
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory(prefix="keyreeve-bench-") as name:
        token = make_softhsm_token(Path(name) / "softhsm")
        uri = parse_pkcs11_uri(
            f"pkcs11:token={token.label}?module-path={token.module}&pin-source=file:{token.pin_file}"
        )
        backend = Pkcs11Backend("hsm", Pkcs11Settings(uri, workers=workers, softhsm_conf=token.conf))
        try:
            loop.run_until_complete(backend.start())
            record = loop.run_until_complete(made_key(backend, key_type))
            with (
                bare_side(token, record.backend_ref, scheme, workers) as bare,
                signer_side(Path(name) / "signer", token, key_type, scheme, workers) as signer,
            ):
                alone = Side(
                    lambda s: loop.run_until_complete(backend_rounds(backend, record, scheme, s)),
                    lambda: [os.getpid(), *backend.worker_pids],
                )
                tallies = in_turn({"bare": bare, "backend": alone, "signer": signer}, rounds, seconds)
        finally:
            loop.run_until_complete(backend.close())
            loop.close()
    figures = {side: tally.figures() for side, tally in tallies.items()}
    ratios = {
        f"{side}_{what}": round(value, 3)
        for side in ("backend", "signer")
        for what, value in (
            ("throughput", figures[side]["per_s"] / figures["bare"]["per_s"]),
            ("per_cpu", figures["bare"]["cpu_us"] / figures[side]["cpu_us"]),
        )
    }
    return {"kind": kind, "workers": workers, **figures, "ratios": ratios}


def measure_delayed(delay_us: int, *, workers: int, seconds: float = 2.0) -> dict[str, Any]:
    """What the backend reaches with a token that blocks at each signature, of `workers / delay`."""
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory(prefix="keyreeve-bench-") as name:
        token, module = make_softhsm_token(Path(name) / "softhsm"), make_faulty_module(Path(name) / "module")
        uri = parse_pkcs11_uri(f"pkcs11:token={token.label}?module-path={module.path}&pin-source=file:{token.pin_file}")
        settings = Pkcs11Settings(uri, workers=workers, softhsm_conf=token.conf, writes=(module.path.parent,))
        backend = Pkcs11Backend("hsm", settings)
        key_type, scheme = SCHEMES["p256"]
        try:
            loop.run_until_complete(backend.start())
            record = loop.run_until_complete(made_key(backend, key_type))
            module.delay(delay_us)
            loop.run_until_complete(backend_rounds(backend, record, scheme, min(seconds, 0.5)))
            began = time.monotonic()
            signed = loop.run_until_complete(backend_rounds(backend, record, scheme, seconds))
            per_s = signed / (time.monotonic() - began)
        finally:
            loop.run_until_complete(backend.close())
            loop.close()
    ratios = {"of_workers_by_delay": round(per_s * delay_us / 1e6 / workers, 3)}
    return {"delay_us": delay_us, "workers": workers, "per_s": round(per_s, 1), "ratios": ratios}


def in_turn(sides: dict[str, Side], rounds: int, seconds: float) -> dict[str, Tally]:
    tallies = {name: Tally() for name in sides}
    for side in sides.values():
        side.run(min(seconds, 0.3))  # what is done once is not measured
    for _ in range(rounds):
        for name, side in sides.items():
            cpu, wall = cpu_seconds(side.pids()), time.monotonic()
            signed = side.run(seconds)
            tallies[name].add(signed, time.monotonic() - wall, cpu_seconds(side.pids()) - cpu)
    return tallies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=tuple(SCHEMES), default="p256")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--delay-us", type=int, default=0, help="a token that blocks so long at each signature")
    arguments = parser.parse_args()
    if arguments.delay_us:
        delayed = measure_delayed(arguments.delay_us, workers=arguments.workers, seconds=arguments.seconds)
        sys.stdout.write(json.dumps(delayed) + "\n")
        return
    found = measure(arguments.kind, workers=arguments.workers, rounds=arguments.rounds, seconds=arguments.seconds)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
