"""Which engines a software backend signs with here: what is configured, what is installed, what the processor can do and what proves itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from keyreeve_common.errors import ConfigInvalid

from keyreeve_keyserver.backends.engines import EngineChoice, EngineUnusable, KeyEngine
from keyreeve_keyserver.backends.multibuffer_engine import open_multibuffer
from keyreeve_keyserver.backends.openssl_engine import OpenSslEngine
from keyreeve_keyserver.backends.qat_engine import DEFAULT_PROVIDER, open_qat


def _nothing() -> None:
    return


@dataclass(frozen=True, slots=True)
class Engines:
    """In order of preference; the last takes everything. `fallback` says why a better one is missing, "" where none is.

    `close` ends what the engines have begun; it is called once, after the last signature.
    """

    engines: Sequence[KeyEngine]
    fallback: str = ""
    close: Callable[[], None] = _nothing


def choose_engines(choice: EngineChoice, *, qat_provider: str = DEFAULT_PROVIDER) -> Engines:
    """Raises: ConfigInvalid where multibuffer is asked for by name and cannot sign here. A card that cannot is no reason not to start."""
    if choice is EngineChoice.OPENSSL:
        return Engines([OpenSslEngine()])
    if choice is EngineChoice.QAT:
        return _with_card(qat_provider)
    try:
        return Engines([open_multibuffer(), OpenSslEngine()])
    except EngineUnusable as missing:
        if choice is EngineChoice.MULTIBUFFER:
            raise ConfigInvalid(f"engine = multibuffer: {missing}") from None
        return Engines([OpenSslEngine()], fallback=f"no multibuffer: {missing}")


def _with_card(provider: str) -> Engines:
    without = choose_engines(EngineChoice.AUTO)
    try:
        card = open_qat(provider)
    except EngineUnusable as missing:
        reasons = [f"no qat: {missing}", without.fallback]
        return Engines(without.engines, fallback="; ".join(reason for reason in reasons if reason))
    return Engines([card, *without.engines], fallback=without.fallback, close=card.close)
