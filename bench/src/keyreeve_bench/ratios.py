"""Signatures per processor second of the key server, held against `openssl speed` in slices that alternate.

Load and OpenSSL take turns, so that noise of the machine hits both; counts and processor seconds are added up before they are divided,
so that a long slice weighs more than a short one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from keyreeve_common.errors import Internal

from keyreeve_bench.generators import Generators
from keyreeve_bench.key_server import BenchKey
from keyreeve_bench.openssl_speed import NOTHING, SpeedSlice, run_speed
from keyreeve_bench.schemes import BenchScheme


@dataclass(frozen=True, slots=True)
class SchemeResult:
    """`wall_seconds` is the length of the loaded slices together."""

    name: str
    signatures: int
    refused: int
    server_cpu_seconds: float
    wall_seconds: float
    openssl: SpeedSlice

    @property
    def per_core(self) -> float:
        """Signatures per processor second of all processes of the key server. Raises: Internal when it used none."""
        if self.server_cpu_seconds <= 0:
            raise Internal(f"{self.name}: the key server used no processor time: the slice was too short")
        return self.signatures / self.server_cpu_seconds

    @property
    def ratio(self) -> float:
        return self.per_core / self.openssl.per_second

    def to_json(self) -> dict[str, float | int]:
        return {
            "signatures": self.signatures,
            "refused": self.refused,
            "signatures_per_second": round(self.signatures / self.wall_seconds, 1),
            "signatures_per_core_second": round(self.per_core, 1),
            "server_cpu_us_per_signature": round(1e6 / self.per_core, 2),
            "busy_server_cores": round(self.server_cpu_seconds / self.wall_seconds, 3),
            "openssl_per_core_second": round(self.openssl.per_second, 1),
            "ratio": round(self.ratio, 3),
        }


def measure_scheme(
    generators: Generators,
    scheme: BenchScheme,
    keys: Sequence[BenchKey],
    *,
    openssl: str,
    slices: int,
    slice_seconds: Callable[[], float],
    outstanding: int,
) -> SchemeResult:
    """OpenSSL, load, OpenSSL, ..., load, OpenSSL. `slice_seconds` is asked before each slice of load."""
    generators.warm(scheme, keys)
    server = generators.server
    local, signatures, refused, cpu, wall = NOTHING, 0, 0, 0.0, 0.0
    for _ in range(slices):
        local += run_speed(openssl, scheme.speed)
        before, began = server.cpu_seconds(), monotonic()
        load = generators.closed_loop(scheme, keys, seconds=slice_seconds(), outstanding=outstanding)
        cpu += server.cpu_seconds() - before
        wall += monotonic() - began
        signatures += load.signatures
        refused += load.refused
    local += run_speed(openssl, scheme.speed)
    return SchemeResult(scheme.name, signatures, refused, cpu, wall, local)
