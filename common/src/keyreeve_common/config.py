"""Configuration: one TOML file per service, read once into frozen dataclasses. Unknown keys are errors; durations carry units ("90s").

A service declares a frozen dataclass; `load_config` reads a file into it. Supported field types: str, int, bool, Path, timedelta, SpiffeId,
TrustDomain, StrEnum classes, nested dataclasses, tuple[T, ...] of these, and `T | None`. Relative paths are relative to the file.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
import typing
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from keyreeve_common.errors import ConfigInvalid, InvalidSpiffeId
from keyreeve_common.identity import SpiffeId, TrustDomain

T = TypeVar("T")
_DURATION = re.compile(r"(\d{1,9})(ms|s|m|h|d)", re.ASCII)
_UNITS = {
    "ms": timedelta(milliseconds=1),
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
}


def parse_duration(text: str) -> timedelta:
    """A whole number and a unit: ms, s, m, h or d. Raises: ConfigInvalid."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ConfigInvalid(f"{text[:32]!r} is not a duration such as '90s', '10m' or '24h'")
    return int(match.group(1)) * _UNITS[match.group(2)]


def load_config(kind: type[T], path: Path) -> T:
    """The configuration in the TOML file at `path`. Raises: ConfigInvalid, which names the file and the key."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigInvalid(f"{path}: no such file; give the path of the service's TOML file with --config") from None
    except OSError as error:
        raise ConfigInvalid(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{path}: not TOML: {error}") from error
    try:
        return _build(kind, raw, "", path.resolve().parent)
    except ConfigInvalid as error:
        raise ConfigInvalid(f"{path}: {error.detail}") from error


def _build(kind: type[T], raw: object, where: str, base: Path) -> T:
    if not isinstance(raw, dict):
        raise ConfigInvalid(f"{where}: a table is expected")
    assert dataclasses.is_dataclass(kind)  # noqa: S101 - a bug in the service's declaration, not in the file
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    for name in raw:
        if name not in fields:
            known = ", ".join(sorted(fields))
            raise ConfigInvalid(f"{prefix}{name}: unknown key; known keys here: {known}")
    values: dict[str, object] = {}
    for name, field in fields.items():
        if name in raw:
            values[name] = _value(hints[name], raw[name], prefix + name, base)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigInvalid(f"{prefix}{name}: missing")
    try:
        return typing.cast("T", kind(**values))
    except ConfigInvalid as error:
        raise ConfigInvalid(f"{prefix or 'file'}: {error.detail}") from error


def _value(hint: object, raw: object, where: str, base: Path) -> object:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        (inner,) = [option for option in typing.get_args(hint) if option is not type(None)]
        return _value(inner, raw, where, base)
    if origin is tuple:
        if not isinstance(raw, list):
            raise ConfigInvalid(f"{where}: a list is expected")
        item = typing.get_args(hint)[0]
        return tuple(_value(item, entry, f"{where}[{index}]", base) for index, entry in enumerate(raw))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint not in _TEXT_TYPES:
        return _build(hint, raw, where, base)
    return _scalar(hint, raw, where, base)


_TEXT_TYPES: dict[object, typing.Callable[[str], object]] = {
    str: str,
    timedelta: parse_duration,
    SpiffeId: SpiffeId.parse,
    TrustDomain: TrustDomain,
}


def _scalar(hint: object, raw: object, where: str, base: Path) -> object:
    if hint in (int, bool):
        if type(raw) is not hint:
            raise ConfigInvalid(f"{where}: {'a whole number' if hint is int else 'true or false'} is expected")
        return raw
    if not isinstance(raw, str):
        raise ConfigInvalid(f"{where}: a string is expected")
    if hint is Path:
        return base / raw
    try:
        if isinstance(hint, type) and issubclass(hint, StrEnum):
            return hint(raw)
        return _TEXT_TYPES[hint](raw)
    except (ConfigInvalid, InvalidSpiffeId) as error:
        raise ConfigInvalid(f"{where}: {error.detail}") from error
    except ValueError:
        options = ", ".join(member.value for member in typing.cast("type[StrEnum]", hint))
        raise ConfigInvalid(f"{where}: {raw[:64]!r} is not one of: {options}") from None
