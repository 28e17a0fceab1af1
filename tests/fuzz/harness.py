"""Runs one fuzz target for some seconds: mutates the seeds of its corpus, keeps what brings a new outcome, stops at the first fault.

A target takes bytes and returns a short word for what came of them ("accepted", an error's name and rule); it raises for a fault. With atheris
libFuzzer drives the target, led by what it reaches of our own packages. Where atheris is not installed, the mutation engine takes a new word as
new ground. Both apply the target's own mutator, which keeps its form (DER, JSON) whole.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import random
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FunctionType

Target = Callable[[bytes], str]
Mutator = Callable[[bytes, Sequence[bytes], random.Random], bytes]
CORPUS = Path(__file__).parent / "corpus"
MAX_BYTES = 8_192
MAX_POOL = 2_000
_NUMBER = re.compile(r"(?<![.\w])\d{2,}|0x[0-9a-f]+|(?<=n )\d+|\d+(?= bytes)|(?<=critical extension )[\d.]+")
_NUMBERS = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0x81,
    0x82,
    0x84,
    0xFF,
    0x100,
    0x101,
    0x7FFF,
    0xFFFF,
    0x10000,
    0x10001,
    0x7FFFFFFF,
    0xFFFFFFFF,
)


def read_corpus(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def mutate(data: bytes, pool: Sequence[bytes], random_source: random.Random) -> bytes:
    """One to six small changes."""
    changed = bytearray(data)
    for _ in range(random_source.choice((1, 1, 1, 2, 3, 6))):
        _CHANGES[random_source.randrange(len(_CHANGES))](changed, pool, random_source)
    return bytes(changed[:MAX_BYTES])


def _place(data: bytearray, source: random.Random) -> int:
    return source.randrange(len(data) + 1)


def _flip(data: bytearray, _pool: Sequence[bytes], source: random.Random) -> None:
    if data:
        data[source.randrange(len(data))] ^= 1 << source.randrange(8)


def _byte(data: bytearray, _pool: Sequence[bytes], source: random.Random) -> None:
    if data:
        data[source.randrange(len(data))] = source.choice((source.randrange(256), 0, 0xFF, 0x30, 0x31, 0x80))


def _remove(data: bytearray, _pool: Sequence[bytes], source: random.Random) -> None:
    at = _place(data, source)
    del data[at : at + source.choice((1, 1, 2, 4, 16))]


def _insert(data: bytearray, _pool: Sequence[bytes], source: random.Random) -> None:
    at = _place(data, source)
    data[at:at] = source.randbytes(source.choice((1, 1, 2, 4, 16)))


def _repeat(data: bytearray, _pool: Sequence[bytes], source: random.Random) -> None:
    at, length = _place(data, source), source.randrange(1, 64)
    data[at:at] = data[at : at + length] * source.choice((1, 1, 2, 30))


def _splice(data: bytearray, pool: Sequence[bytes], source: random.Random) -> None:
    other = source.choice(pool)
    at, start = _place(data, source), source.randrange(len(other) + 1)
    data[at : at + source.randrange(64)] = other[start : start + source.randrange(1, 64)]


def _number(data: bytearray, _pool: Sequence[bytes], source: random.Random) -> None:
    width = source.choice((1, 2, 4))
    at = _place(data, source)
    data[at : at + width] = (source.choice(_NUMBERS) & ((1 << 8 * width) - 1)).to_bytes(width, "big")


def _lengthen(data: bytearray, _pool: Sequence[bytes], source: random.Random) -> None:
    """A change that keeps an enclosing length right: the one byte before grows with what is put in."""
    if len(data) < 3:
        return
    at = source.randrange(1, len(data) - 1)
    extra = source.randbytes(source.randrange(1, 4))
    data[at] = (data[at] + len(extra)) & 0xFF
    data[at + 1 : at + 1] = extra


_CHANGES = (_flip, _byte, _remove, _insert, _repeat, _splice, _number, _lengthen)


def run(
    target: Target, seeds: Sequence[bytes], *, mutator: Mutator, seconds: float, seed: int, findings: Path
) -> Counter[str]:
    """What came of the inputs tried, by word. Raises: what the target raised, after writing the input to `findings`."""
    source, pool = random.Random(seed), list(seeds)  # noqa: S311 - to be repeatable, not secret
    outcomes: Counter[str] = Counter()
    inputs = iter(pool[:])
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        data = next(inputs, None)
        if data is None:
            data = mutator(source.choice(pool), pool, source)[:MAX_BYTES]
        try:
            word = _NUMBER.sub("n", target(data))
        except BaseException:
            findings.mkdir(parents=True, exist_ok=True)
            path = findings / f"{hash(data) & 0xFFFFFFFF:08x}"
            path.write_bytes(data)
            sys.stderr.write(f"fault, input in {path}\n")
            raise
        if word not in outcomes and len(pool) < MAX_POOL:
            pool.append(data)
        outcomes[word] += 1
    return outcomes


def main(target: Target, name: str, *, mutator: Mutator = mutate) -> int:
    """The command line of each fuzz_*.py. Exit code 1 is a fault."""
    parser = argparse.ArgumentParser(description=f"Fuzzes {name}.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=time.time_ns() & 0xFFFFFFFF)
    parser.add_argument("--engine", choices=("auto", "mutation", "atheris"), default="auto")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings") / name)
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    engine = arguments.engine
    if engine == "auto":
        engine = "atheris" if importlib.util.find_spec("atheris") else "mutation"
    seeds = read_corpus(name)
    if engine == "atheris":
        return _atheris(target, name, seeds, mutator, arguments)
    try:
        outcomes = run(
            target,
            seeds,
            mutator=mutator,
            seconds=arguments.seconds,
            seed=arguments.seed,
            findings=arguments.findings,
        )
    except Exception:
        traceback.print_exc()
        return 1
    sys.stdout.write(f"{name}: {outcomes.total()} inputs, {len(outcomes)} outcomes, seed {arguments.seed}\n")
    accepted = sum(count for word, count in outcomes.items() if "accepted" in word)
    sys.stdout.write(f"  {accepted:>9} of them accepted\n")
    for word, count in outcomes.most_common(20):
        sys.stdout.write(f"  {count:>9} {word}\n")
    return 0


def _atheris(target: Target, name: str, seeds: Sequence[bytes], mutator: Mutator, arguments: argparse.Namespace) -> int:
    """Does not come back: libFuzzer ends the process, with another code than 0 after a fault."""
    atheris = importlib.import_module("atheris")
    accepted = sum("accepted" in target(seed) for seed in seeds)
    if not accepted:
        sys.stderr.write(f"{name}: none of {len(seeds)} seeds is accepted: the corpus is out of date\n")
        return 1
    functions = list(_our_functions())
    for function in functions:
        atheris.instrument_func(function)
    sys.stdout.write(f"{name}: {accepted} of {len(seeds)} seeds accepted, {len(functions)} functions instrumented\n")
    sys.stdout.flush()

    def once(data: bytes) -> None:
        target(data)

    def change(data: bytes, high: int, seed: int) -> bytes:
        """By turns libFuzzer's own mutation and ours."""
        if seed % 2:
            return bytes(atheris.Mutate(data, high))
        return mutator(data, seeds, random.Random(seed))[:high]  # noqa: S311 - to be repeatable, not secret

    arguments.findings.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as found:
        options = [
            f"-max_total_time={arguments.seconds:.0f}",
            f"-seed={arguments.seed % 0xFFFFFFFF + 1}",
            f"-max_len={MAX_BYTES}",
            f"-artifact_prefix={arguments.findings}/",
        ]
        atheris.Setup([sys.argv[0], *options, found, str(CORPUS / name)], once, custom_mutator=change)
        atheris.Fuzz()
    return 0


def _our_functions() -> Iterator[FunctionType]:
    """Every function and method of our packages that is loaded; what is imported from elsewhere counts for no coverage."""
    seen: set[int] = set()
    for module in list(sys.modules.values()):
        if not module.__name__.startswith(("keyreeve_keyserver.", "keyreeve_common.")):
            continue
        for value in list(vars(module).values()):
            for found in (value, *(vars(value).values() if isinstance(value, type) else ())):
                function = getattr(found, "__func__", getattr(found, "fget", found))
                ours = isinstance(function, FunctionType) and function.__module__ == module.__name__
                if ours and id(function) not in seen and not module.__name__.startswith("keyreeve_common.v1"):
                    seen.add(id(function))
                    yield function
