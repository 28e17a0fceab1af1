"""The signer's Vault workers beside bare clients of OpenBao's Transit with `batch_input`: `python bench/vault_transit.py [--rounds 4]`.

Three sides sign in turn with keys of one kind: `workers` bare processes, each with one kept-alive connection and a tight loop of batches of
`--batch`; the backend with callers that bring whole batches; and with callers that bring one request each, which the backend has to gather.
The backend verifies each signature, the bare clients do not. `cpu_us` counts the side's own processes, not OpenBao. `per_call` says how many
signatures went in one call. JSON goes to stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import requests
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_common.vault.config import VaultLogin
from keyreeve_keyserver.backends import worker_frames
from keyreeve_keyserver.backends.ports import SignRequest
from keyreeve_keyserver.backends.vault_backend import VaultBackend
from keyreeve_keyserver.backends.worker_process import WorkerProcess
from keyreeve_keyserver.domain.keys import KeyRecord
from keyreeve_testing.openbao import PREFIX, TRANSIT_POLICY, OpenBao, transit_config, vault_backend
from pkcs11_pool import MESSAGE, Side, in_turn, made_key

IN_FLIGHT = 512
KINDS = {
    "p256": (KeyType.EC_P256, SignatureScheme.ECDSA_SECP256R1_SHA256),
    "rsa2048": (KeyType.RSA_2048, SignatureScheme.RSA_PSS_RSAE_SHA256),
}
_BARE = {
    "p256": {"hash_algorithm": "sha2-256", "marshaling_algorithm": "asn1"},
    "rsa2048": {"hash_algorithm": "sha2-256", "signature_algorithm": "pss", "salt_length": "hash"},
}


def bare_process(url: str, ca_file: str, token: str, body: dict[str, Any], link: Connection) -> None:
    """One connection; for each number of seconds that comes it calls as long in a tight loop and tells how many signatures it got."""
    session = requests.Session()
    session.trust_env, session.verify = False, ca_file
    session.headers["X-Vault-Token"] = token
    link.send(0)
    while seconds := link.recv():
        count, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            results = session.post(url, json=body, timeout=20).json()["data"]["batch_results"]
            count += sum(len(base64.b64decode(result["signature"].split(":")[2])) > 0 for result in results)
        link.send(count)


@contextmanager
def bare_side(bao: OpenBao, mount: str, kind: str, *, workers: int, batch: int) -> Iterator[Side]:
    key_type = {"p256": "ecdsa-p256", "rsa2048": "rsa-2048"}[kind]
    bao.client().secrets.transit.create_key("bare", key_type=key_type, mount_point=mount)
    inputs = [{"input": base64.b64encode(MESSAGE).decode()} for _ in range(batch)]
    body = {**_BARE[kind], "batch_input": inputs}
    context = multiprocessing.get_context("spawn")
    processes, links = [], []
    for _ in range(workers):
        ours, theirs = context.Pipe()
        opens = (f"{bao.address}/v1/{mount}/sign/bare", str(bao.ca_file), bao.root_token, body, theirs)
        process = context.Process(target=bare_process, args=opens, daemon=True)
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


async def callers(backend: VaultBackend, record: KeyRecord, scheme: SignatureScheme, batch: int, seconds: float) -> int:
    """`IN_FLIGHT` requests at a time, from callers that bring `batch` of them each."""
    end, signed = time.monotonic() + seconds, 0

    async def caller() -> None:
        nonlocal signed
        while time.monotonic() < end:
            request = SignRequest(record, scheme, MESSAGE, time.monotonic() + 20)
            outcomes = await backend.sign([request] * batch)
            signed += sum(isinstance(outcome, bytes) for outcome in outcomes)

    await asyncio.gather(*(caller() for _ in range(IN_FLIGHT // batch)))
    return signed


class CallCounter:
    """Counts the questions to workers that are calls of Transit's sign, and the signatures in them."""

    def __init__(self) -> None:
        self.calls = self.items = 0
        sends = WorkerProcess.send

        def send(process: WorkerProcess, question: worker_frames.Question) -> None:
            if isinstance(question, worker_frames.TokenSign):
                self.calls += 1
                self.items += len(question.items)
            sends(process, question)

        setattr(WorkerProcess, "send", send)  # noqa: B010 - this process measures only


def measure(
    kind: str = "p256", *, workers: int = 4, batch: int = 32, rounds: int = 4, seconds: float = 1.0
) -> dict[str, Any]:
    """Figures by side, and what the backend reaches of the bare clients' throughput."""
    key_type, scheme = KINDS[kind]
    counter, loop = CallCounter(), asyncio.new_event_loop()
    with tempfile.TemporaryDirectory(prefix="keyreeve-bench-") as name:
        bao = OpenBao(Path(name) / "bao").start()
        try:
            mount = bao.enable("transit")
            token_file = bao.token(bao.policy(TRANSIT_POLICY, mount=mount, prefix=PREFIX), directory=Path(name))
            config = transit_config(bao, mount, login=VaultLogin.TOKEN, token_file=token_file)
            backend = vault_backend(config, workers=workers)
            loop.run_until_complete(backend.start())
            record = loop.run_until_complete(made_key(backend, key_type))

            def side(size: int) -> Side:
                return Side(
                    lambda s: loop.run_until_complete(callers(backend, record, scheme, size, s)),
                    lambda: [os.getpid(), *backend.worker_pids],
                )

            with bare_side(bao, mount, kind, workers=workers, batch=batch) as bare:
                tallies = in_turn({"bare": bare, "batches": side(batch), "singles": side(1)}, rounds, seconds)
            loop.run_until_complete(backend.close())
        finally:
            bao.close()
            loop.close()
    figures = {which: tally.figures() for which, tally in tallies.items()}
    ratios = {which: round(figures[which]["per_s"] / figures["bare"]["per_s"], 3) for which in ("batches", "singles")}
    per_call = round(counter.items / max(counter.calls, 1), 1)
    return {"kind": kind, "workers": workers, "batch": batch, **figures, "per_call": per_call, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=tuple(KINDS), default="p256")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    found = measure(
        arguments.kind,
        workers=arguments.workers,
        batch=arguments.batch,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
    )
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
