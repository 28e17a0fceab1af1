"""Where the installed packages ipp-crypto-static and ipp-crypto-include have put crypto_mb. As a program: flags for the Makefile."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

_ARCHIVE, _HEADER = "libcrypto_mb.a", "crypto_mb/rsa.h"


@dataclass(frozen=True, slots=True)
class CryptoMb:
    archives: list[str] = field(default_factory=list)
    include_dirs: list[str] = field(default_factory=list)


def find_crypto_mb() -> CryptoMb | None:
    archive, header = _installed("ipp-crypto-static", _ARCHIVE), _installed("ipp-crypto-include", _HEADER)
    if archive is None or header is None:
        return None
    return CryptoMb([str(archive)], [str(header.parent.parent)])


def _installed(distribution: str, ending: str) -> Path | None:
    try:
        found = files(distribution) or []
    except PackageNotFoundError:
        return None
    paths = [Path(str(path.locate())).resolve() for path in found if str(path).endswith(ending)]
    return paths[0] if paths else None


if __name__ == "__main__":
    crypto_mb = find_crypto_mb()
    if crypto_mb is None:
        sys.exit("ipp-crypto-static and ipp-crypto-include are not installed")
    what = {"archives": crypto_mb.archives, "includes": [f"-isystem{path}" for path in crypto_mb.include_dirs]}
    sys.stdout.write(" ".join(what[sys.argv[1]]) + "\n")
