"""docs/configuration.md holds every key of every service, with its true default, and none besides."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from datetime import timedelta
from enum import StrEnum
from pathlib import Path

import pytest
from keyreeve_ca.config import CaConfig
from keyreeve_client.agent.config import AgentConfig
from keyreeve_common.config import parse_duration
from keyreeve_keyserver.config import KeyServerConfig
from keyreeve_keyserver.signer.config import SignerConfig

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
ROW = re.compile(r"^\| `([a-z0-9_.]+)` \| (.+?) \| .+ \|$", re.MULTILINE)
SECTIONS = {
    "keyserver.toml": KeyServerConfig,
    "signer.toml": SignerConfig,
    "ca.toml": CaConfig,
    "agent.toml": AgentConfig,
}


def keys_of(kind: type, prefix: str = "") -> Iterator[tuple[str, object]]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        wrapped = typing.get_origin(hint) in (tuple, types.UnionType, typing.Union)
        inner = typing.get_args(hint)[0] if wrapped else hint
        if isinstance(inner, type) and dataclasses.is_dataclass(inner) and inner.__module__.endswith("config"):
            yield from keys_of(inner, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field.default


def rows_of(section: str) -> dict[str, str]:
    text = PAGE.read_text()
    start = text.index(f"## {section}")
    end = text.find("\n## ", start + 1)
    return dict(ROW.findall(text[start : end if end > 0 else len(text)]))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_documented_and_no_other(section: str) -> None:
    assert set(rows_of(section)) == {name for name, _ in keys_of(SECTIONS[section])}


@pytest.mark.parametrize("section", SECTIONS)
def test_defaults_are_the_true_ones(section: str) -> None:
    rows = rows_of(section)
    wrong = {
        name: (rows[name], default) for name, default in keys_of(SECTIONS[section]) if not _says(rows[name], default)
    }
    assert wrong == {}


def _says(written: str, default: object) -> bool:
    if default is dataclasses.MISSING:
        return written == "required"
    if default in (None, "", ()):
        return written != "required"  # described in words
    if isinstance(default, bool):
        return written == f"`{str(default).lower()}`"
    if isinstance(default, timedelta):
        return parse_duration(written.strip("`")) == default
    return written == f"`{default.value if isinstance(default, StrEnum) else default}`"
