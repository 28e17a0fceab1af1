"""The load generators of a benchmark, driven together: every command goes to all, their answers are added up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from keyreeve_common.errors import Internal, Unavailable
from keyreeve_common.identity import SpiffeId

from keyreeve_bench.histogram import Histogram
from keyreeve_bench.key_server import SERVER_ID, BenchKey, KeyServer
from keyreeve_bench.schemes import BenchScheme

_END_PATIENCE_S = 10.0


@dataclass(slots=True)
class LoadResult:
    """What all generators got together; `codes` counts answers by `ok` or the error's code."""

    codes: Counter[str] = field(default_factory=Counter)
    latencies: Histogram = field(default_factory=Histogram)

    @property
    def signatures(self) -> int:
        return self.codes["ok"]

    @property
    def refused(self) -> int:
        return self.codes.total() - self.signatures


@dataclass(slots=True)
class Generators:
    server: KeyServer
    holders: tuple[SpiffeId, ...]
    processes: list[subprocess.Popen[str]]

    @classmethod
    @contextmanager
    def running(cls, server: KeyServer, count: int) -> Iterator[Generators]:
        """`count` processes, each an agent of its own."""
        with ExitStack() as stack:
            holders, processes = [], []
            for number in range(count):
                holder, files = server.make_agent(f"load-{len(list(server.directory.glob('agent-*')))}-{number}")
                job = {"address": server.address, "server_id": str(SERVER_ID)}
                job |= {"key": str(files.key), "chain": str(files.chain), "bundle": str(files.bundle)}
                process = stack.enter_context(_generator())
                _tell(process, job)
                holders.append(holder)
                processes.append(process)
            yield cls(server, tuple(holders), processes)

    def warm(self, scheme: BenchScheme, keys: Sequence[BenchKey]) -> None:
        """A verified signature of every key by every generator. Raises: what the key server says."""
        self._all("warm", scheme, keys)

    def closed_loop(
        self, scheme: BenchScheme, keys: Sequence[BenchKey], *, seconds: float, outstanding: int
    ) -> LoadResult:
        """`outstanding` requests in flight all the time, shared among the generators."""
        each = max(outstanding // len(self.processes), 1)
        return self._all("closed", scheme, keys, seconds=seconds, outstanding=each)

    def lone(self, scheme: BenchScheme, keys: Sequence[BenchKey], *, seconds: float) -> LoadResult:
        """One generator, one request at a time."""
        return self._some(self.processes[:1], "lone", scheme, keys, seconds=seconds)

    def open_loop(self, scheme: BenchScheme, keys: Sequence[BenchKey], *, seconds: float, rate: float) -> LoadResult:
        """`rate` requests a second, shared among the generators."""
        return self._all("open", scheme, keys, seconds=seconds, rate=rate / len(self.processes))

    def _all(self, do: str, scheme: BenchScheme, keys: Sequence[BenchKey], **settings: float) -> LoadResult:
        return self._some(self.processes, do, scheme, keys, **settings)

    def _some(
        self,
        processes: Sequence[subprocess.Popen[str]],
        do: str,
        scheme: BenchScheme,
        keys: Sequence[BenchKey],
        **settings: float,
    ) -> LoadResult:
        pairs = [(key.key_id, key.spki_der.hex()) for key in keys]
        command = {"do": do, "scheme": int(scheme.scheme), "keys": pairs, **settings}
        for process in processes:
            _tell(process, command)
        result = LoadResult()
        for process in processes:
            answer = self._answer(process)
            result.codes.update(answer.get("codes", {}))
            result.latencies.add(Histogram.from_json(answer.get("latencies", {})))
        if do != "warm" and not result.signatures:
            self.server.check()
            raise Unavailable(
                f"the key server signed nothing: {dict(result.codes)}; {self.server.process.last_words()}"
            )
        return result

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None  # noqa: S101 - a pipe was asked for
        line = process.stdout.readline()
        if not line:
            raise Internal("a load generator ended; what it printed stands above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.server.check()
            raise Unavailable(f"the key server refused the first signatures: {answer['error']}: {answer['detail']}")
        return answer


@contextmanager
def _generator() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "keyreeve_bench.load"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=_END_PATIENCE_S)


def _tell(process: subprocess.Popen[str], message: object) -> None:
    assert process.stdin is not None  # noqa: S101 - a pipe was asked for
    try:
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        raise Internal("a load generator ended; what it printed stands above") from None
