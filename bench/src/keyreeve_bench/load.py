"""One load generator: a process of its own, so that its processor time is never counted as the key server's.

It signs through the product's own client (one stream, batches of up to 64). It reads one JSON command a line from stdin and answers with one
JSON line each; at the end of stdin it ends, so it never outlives the benchmark. Started as `python -m keyreeve_bench.load`.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import load_der_public_key
from keyreeve_client.channel import ReloadingChannel, SvidFiles
from keyreeve_client.sign_client import SignStreamClient
from keyreeve_common.errors import KeyreeveError
from keyreeve_common.identity import SpiffeId
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.verification import verify_signature

from keyreeve_bench.histogram import Histogram
from keyreeve_bench.open_loop import LoopClock, run_open_loop

PURPOSE = Purpose.TLS13_SERVER_VERIFY
_MESSAGES = 1_024
_VERIFIED = 512  # one of so many signatures is verified: the generator must not be what limits the load
_REFUSED_PAUSE_S = 0.02
_DEADLINE = timedelta(seconds=5)


class LoadGenerator:
    """One agent's stream to one key server."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        files = SvidFiles(Path(job["key"]), Path(job["chain"]), Path(job["bundle"]))
        self._channel = ReloadingChannel(job["address"], files, server_id=SpiffeId.parse(job["server_id"]))
        self._client = SignStreamClient(self._channel.current)
        self._messages = [build_tls13_content(PURPOSE, secrets.token_bytes(32)) for _ in range(_MESSAGES)]

    async def run(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Raises: KeyreeveError when not even the first signatures of a key succeed."""
        keys = [(key_id, load_der_public_key(bytes.fromhex(spki))) for key_id, spki in command["keys"]]
        scheme = SignatureScheme(command["scheme"])
        self._keys, self._scheme = keys, scheme
        kinds = {"warm": self._warm, "closed": self._closed, "lone": self._lone, "open": self._open}
        return await kinds[command["do"]](command)

    async def close(self) -> None:
        await self._client.close()
        await self._channel.close()

    async def _sign(self, number: int) -> str:
        """`ok`, or the error's code."""
        key_id, public_key = self._keys[number % len(self._keys)]
        message = self._messages[number % _MESSAGES]
        try:
            signature = await self._client.sign(key_id, self._scheme, PURPOSE, message=message, deadline=_DEADLINE)
            if number % _VERIFIED == 0:
                verify_signature(public_key, self._scheme, message, signature=signature)
        except KeyreeveError as error:
            return error.code.value
        return "ok"

    async def _warm(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """One verified signature of each key; raises what the key server says."""
        for key_id, public_key in self._keys:
            await self._client.sign(
                key_id, self._scheme, PURPOSE, message=self._messages[0], deadline=_DEADLINE, public_key=public_key
            )
        return {}

    async def _closed(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """`outstanding` callers, each with one request in flight all the time."""
        codes: Counter[str] = Counter()
        ends_at = time.monotonic() + command["seconds"]
        callers = int(command["outstanding"])

        async def caller(number: int) -> None:
            while time.monotonic() < ends_at:
                code = await self._sign(number)
                codes[code] += 1
                if code != "ok":
                    await asyncio.sleep(_REFUSED_PAUSE_S)
                number += callers

        await asyncio.gather(*(caller(number) for number in range(callers)))
        return {"codes": dict(codes)}

    async def _lone(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """One request after the other: what a handshake on an idle system waits."""
        latencies, codes = Histogram(), Counter[str]()
        ends_at, number = time.monotonic() + command["seconds"], 1
        while time.monotonic() < ends_at:
            began = time.perf_counter()
            code = await self._sign(number)
            latencies.record(time.perf_counter() - began)
            codes[code] += 1
            number += 1
        return {"codes": dict(codes), "latencies": latencies.to_json()}

    async def _open(self, command: Mapping[str, Any]) -> dict[str, Any]:
        clock = LoopClock(time.perf_counter, asyncio.sleep)
        result = await run_open_loop(self._sign, rate=command["rate"], seconds=command["seconds"], clock=clock)
        return {"codes": dict(result.codes), "latencies": result.latencies.to_json()}


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    generator = LoadGenerator(json.loads(await loop.run_in_executor(None, sys.stdin.readline)))
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        try:
            answer = await generator.run(json.loads(line))
        except KeyreeveError as error:
            answer = {"error": error.code.value, "detail": error.detail}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    await generator.close()


if __name__ == "__main__":
    asyncio.run(_serve())
