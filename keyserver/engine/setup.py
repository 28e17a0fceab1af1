"""Builds the extension modules: each from native/<its name>/*.c and native/common/*.c, against libcrypto.

A module that needs crypto_mb is left out where that cannot be had (it comes for x86-64 Linux only); the package says so when it is asked.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).parent))
from crypto_mb import CryptoMb, find_crypto_mb

HERE = Path(__file__).parent
COMPILE = [
    "-std=gnu11", "-O2", "-g", "-fvisibility=hidden", "-fstack-protector-strong", "-fstack-clash-protection", "-U_FORTIFY_SOURCE",
    "-D_FORTIFY_SOURCE=2", "-Wall", "-Wextra", "-Werror",
]  # fmt: skip
LINK = ["-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack", "-Wl,--exclude-libs,ALL"]


def module(name: str, *, crypto_mb: bool = False) -> Extension | None:
    """The extension module `keyreeve_engine._<name>`; None where what it needs is not to be had."""
    found = find_crypto_mb() if crypto_mb else CryptoMb()
    if found is None:
        return None
    sources = [*(HERE / "native" / name).glob("*.c"), *(HERE / "native" / "common").glob("*.c")]
    headers = [*(HERE / "native" / name).glob("*.h"), *(HERE / "native" / "common").glob("*.h")]
    return Extension(
        f"keyreeve_engine._{name}",
        sorted(str(path.relative_to(HERE)) for path in sources),
        include_dirs=["native/common", *found.include_dirs],
        depends=sorted(str(path.relative_to(HERE)) for path in headers),
        define_macros=[("_GNU_SOURCE", None), ("PY_SSIZE_T_CLEAN", None)],
        extra_objects=found.archives,
        libraries=["crypto"],
        extra_compile_args=COMPILE,
        extra_link_args=LINK,
    )


MODULES = [
    module("multibuffer", crypto_mb=True),
    module("hashes"),
    module("asyncsign"),
]

setup(ext_modules=[each for each in MODULES if each is not None])
