"""What the agent's request path costs by itself: `python bench/node_sign_path.py [--seconds 3] [--loop uvloop|asyncio]`.

Two levels, each with the agent's own classes in a process of their own and the load of node_load.py:
- `socket`: the sign socket's server alone; each request is answered at once with 71 bytes.
- `agent`: sign socket, balancer and stream over mTLS to a key server that answers each batch at once with as many constant signatures.
What a real key server adds is in node_agent.py. Processor time is that of the agent's process for one request. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc.aio
from keyreeve_client.agent.authorisation import KeyRules, Selector
from keyreeve_client.agent.config import SignSocketConfig
from keyreeve_client.agent.key_cluster import KeyCluster
from keyreeve_client.agent.sign_listener import bind_sign_socket
from keyreeve_client.agent.sign_server import SignServer
from keyreeve_client.channel import SvidFiles
from keyreeve_client.sign_client import Answered
from keyreeve_common.identity import SpiffeId
from keyreeve_common.key_id import KeyId
from keyreeve_common.sign_socket import SignFrame
from keyreeve_common.v1 import keyserver_pb2, keyserver_pb2_grpc
from keyreeve_testing.pki import TestPki
from keyreeve_testing.processes import free_port
from node_agent import cpu_seconds, run_load

KEY = KeyId("k-bench")
SIGNATURE = bytes(71)
SERVER_PATH = "/keyreeve/keyserver"


class ConstantSigner(keyserver_pb2_grpc.SigningServicer):
    """Answers each batch at once, and counts."""

    batches = items = 0

    async def Sign(self, request: keyserver_pb2.SignRequest, context: Any) -> keyserver_pb2.SignResponse:
        raise NotImplementedError(request, context)

    async def SignStream(
        self, batches: AsyncIterator[keyserver_pb2.SignBatch], context: Any
    ) -> AsyncIterator[keyserver_pb2.SignResultBatch]:
        async for batch in batches:
            self.batches += 1
            self.items += len(batch.items)
            results = [keyserver_pb2.SignResult(id=item.id, signature=SIGNATURE) for item in batch.items]
            yield keyserver_pb2.SignResultBatch(results=results)


async def serve_signatures(directory: Path, port: int) -> None:
    """Until standard input ends; then says how large the batches were."""
    key, chain, bundle = ((directory / f"server-{name}.pem").read_bytes() for name in ("key", "chain", "bundle"))
    signer, server = ConstantSigner(), grpc.aio.server()
    keyserver_pb2_grpc.add_SigningServicer_to_server(signer, server)
    credentials = grpc.ssl_server_credentials([(key, chain)], bundle, require_client_auth=True)
    server.add_secure_port(f"127.0.0.1:{port}", credentials)
    await server.start()
    say("ready")
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    say(json.dumps({"batches": signer.batches, "items": signer.items}))
    await server.stop(None)


class NoFlight:
    def cancel(self) -> None:
        return


def answer_at_once(request: SignFrame, trace: bytes, ends_at: float, answered: Answered) -> NoFlight:
    del request, trace, ends_at
    answered(SIGNATURE)
    return NoFlight()


async def serve_socket(directory: Path, port: int | None) -> None:
    """The agent's path until standard input ends; without a port there is no key server behind it."""
    config = SignSocketConfig(directory / "sign.sock")
    rules = KeyRules({KEY: frozenset({frozenset({Selector("unix", f"uid:{os.geteuid()}")})})})
    cluster = None
    if port is not None:
        files = SvidFiles(*(directory / f"client-{name}.pem" for name in ("key", "chain", "bundle")))
        server_id = SpiffeId.parse((directory / "server-id").read_text())
        cluster = KeyCluster((f"127.0.0.1:{port}",), files, server_id=server_id)
    server = SignServer(config, rules, cluster.begin if cluster else answer_at_once)
    await server.start(bind_sign_socket(config.path, config.mode_bits))
    say("ready")
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextmanager
def child(*options: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A part in a process of its own; it ends when its standard input is closed."""
    command = [sys.executable, __file__, *map(str, options)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None or process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{options} did not start")
        yield process
    finally:
        process.kill()
        process.wait()


def write_identities(directory: Path) -> None:
    pki = TestPki("bench.test")
    for name, path in (("server", SERVER_PATH), ("client", "/keyreeve/agent/bench")):
        svid = pki.svid(path)
        for part, content in (("key", svid.key_pem), ("chain", svid.chain_pem), ("bundle", pki.bundle_pem)):
            (directory / f"{name}-{part}.pem").write_bytes(content)
    (directory / "server-id").write_text(pki.spiffe_id(SERVER_PATH))


def measure_level(directory: Path, loop: str, port: int | None, *, seconds: float, lone: int) -> dict[str, Any]:
    socket = directory / "sign.sock"
    with child("--part", "socket", "--directory", directory, "--loop", loop, *port_option(port)) as agent:
        run_load(socket, KEY, "--lone", "200")
        alone = run_load(socket, KEY, "--lone", str(lone))
        before = cpu_seconds(agent.pid)
        busy = run_load(socket, KEY, "--seconds", str(seconds))
        spent = cpu_seconds(agent.pid) - before
        return {"lone": alone, "load": {**busy, "cpu_us": round(spent / busy["requests"] * 1e6, 2)}}


def port_option(port: int | None) -> tuple[str, ...]:
    return () if port is None else ("--port", str(port))


def measure(*, seconds: float = 3.0, lone: int = 2000, loop: str = "uvloop") -> dict[str, Any]:
    """Both levels; `mean_batch` is of lone requests and load together, so a little less than under load."""
    with tempfile.TemporaryDirectory(prefix="keyreeve-bench-") as name:
        directory, port = Path(name), free_port()
        write_identities(directory)
        bare = measure_level(directory, loop, None, seconds=seconds, lone=lone)
        with child("--part", "signer", "--directory", directory, "--loop", loop, "--port", str(port)) as signer:
            whole = measure_level(directory, loop, port, seconds=seconds, lone=lone)
            counted = json.loads(signer.communicate("")[0])
        alone = lone + 300 + 100  # requests that were one batch each
        whole["load"]["mean_batch"] = round((counted["items"] - alone) / max(1, counted["batches"] - alone), 1)
    return {"loop": loop, "socket": bare, "agent": whole}


def run(loop: str, work: Coroutine[Any, Any, None]) -> None:
    if loop == "uvloop":
        import uvloop  # noqa: PLC0415 - not everywhere

        uvloop.run(work)
    else:
        asyncio.run(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--lone", type=int, default=2000)
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--output", choices=("json",), default="json")
    parser.add_argument("--part", choices=("signer", "socket"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part == "signer":
        run(arguments.loop, serve_signatures(arguments.directory, arguments.port))
    elif arguments.part == "socket":
        run(arguments.loop, serve_socket(arguments.directory, arguments.port))
    else:
        result = measure(seconds=arguments.seconds, lone=arguments.lone, loop=arguments.loop)
        sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
