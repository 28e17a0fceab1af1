"""Which engines a software backend signs with here: what is configured, what is installed, what the processor can do and what proves itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keyreeve_common.errors import ConfigInvalid

from keyreeve_keyserver.backends.engines import EngineChoice, KeyEngine
from keyreeve_keyserver.backends.multibuffer_engine import EngineUnusable, open_multibuffer
from keyreeve_keyserver.backends.openssl_engine import OpenSslEngine


@dataclass(frozen=True, slots=True)
class Engines:
    """In order of preference; the last takes everything. `fallback` says why a better one is missing, "" where none is."""

    engines: Sequence[KeyEngine]
    fallback: str = ""


def choose_engines(choice: EngineChoice) -> Engines:
    """Raises: ConfigInvalid where the engine that is asked for by name cannot sign here."""
    if choice is EngineChoice.OPENSSL:
        return Engines([OpenSslEngine()])
    try:
        return Engines([open_multibuffer(), OpenSslEngine()])
    except EngineUnusable as missing:
        if choice is EngineChoice.MULTIBUFFER:
            raise ConfigInvalid(f"engine = multibuffer: {missing}") from None
        return Engines([OpenSslEngine()], fallback=f"no multibuffer: {missing}")
