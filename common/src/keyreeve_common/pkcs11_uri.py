"""PKCS#11 URIs that name a token, and the match of one against what a token says of itself. Pure.

A `Pkcs11Uri` that exists names at most one value for each attribute, holds no PIN, and names no object: keys are found by the sealed record.
Formatting gives one canonical spelling, which parses to the same URI.
Spec: RFC 7512 2.3 (grammar), 2.4 (matching; an unknown path attribute matches nothing, an unknown query attribute is ignored).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from urllib.parse import quote, unquote_to_bytes

from keyreeve_common.errors import ConfigInvalid

SCHEME = "pkcs11:"
MAX_URI_BYTES = 4_096
_UNRESERVED_PATH = ":[]@!$'()*+,=&"
_UNRESERVED_QUERY = ":[]@!$'()*+,=/?|"
_CHARACTERS = r"(?:[A-Za-z0-9\-._~{extra}]|%[0-9A-Fa-f]{{2}})*"
_PATH_VALUE = re.compile(_CHARACTERS.format(extra=re.escape(_UNRESERVED_PATH)), re.ASCII)
_QUERY_VALUE = re.compile(_CHARACTERS.format(extra=re.escape(_UNRESERVED_QUERY)), re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9\-_]+", re.ASCII)
_SLOT_ID = re.compile(r"[0-9]{1,20}", re.ASCII)
_LIBRARY_VERSION = re.compile(r"([0-9]{1,3})(?:\.([0-9]{1,3}))?", re.ASCII)
_OBJECT_ATTRIBUTES = frozenset({"object", "type", "id"})
_QUERY_ATTRIBUTES = frozenset({"pin-source", "pin-value", "module-name", "module-path"})


@dataclass(frozen=True, slots=True)
class TokenIdentity:
    """What a token, its slot and its module say of themselves; the padding blanks of PKCS#11 are taken off."""

    token: str = ""
    manufacturer: str = ""
    model: str = ""
    serial: str = ""
    slot_id: int = 0
    slot_description: str = ""
    slot_manufacturer: str = ""
    library_manufacturer: str = ""
    library_description: str = ""
    library_version: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Pkcs11Uri:
    """None is an attribute that the URI does not have: it matches all. `module_path` and `pin_source` are absolute paths.

    The fields up to `slot_id` are the path attributes of the RFC, in the order in which they are written.
    """

    token: str | None = None
    manufacturer: str | None = None
    model: str | None = None
    serial: str | None = None
    library_manufacturer: str | None = None
    library_description: str | None = None
    library_version: tuple[int, int] | None = None
    slot_description: str | None = None
    slot_manufacturer: str | None = None
    slot_id: int | None = None
    module_path: PurePosixPath | None = None
    pin_source: PurePosixPath | None = None

    def __str__(self) -> str:
        path = [f"{_uri_name(name)}={_format(value, _UNRESERVED_PATH)}" for name, value in self._named()]
        paths = {"module-path": self.module_path, "pin-source": self.pin_source}
        query = [f"{name}={_format(str(path), _UNRESERVED_QUERY)}" for name, path in paths.items() if path is not None]
        return SCHEME + ";".join(path) + ("?" + "&".join(query) if query else "")

    @property
    def selector(self) -> Pkcs11Uri:
        """The URI without its query: which token, and not how to reach it."""
        return Pkcs11Uri(**dict(self._named()))  # type: ignore[arg-type]  # each value goes back to its own field

    def matches(self, identity: TokenIdentity) -> bool:
        """Whether every attribute that the URI has is the token's. Spec: RFC 7512 2.4."""
        return all(getattr(identity, name) == value for name, value in self._named())

    def _named(self) -> list[tuple[str, object]]:
        """The path attributes that the URI has."""
        values = [(field.name, getattr(self, field.name)) for field in fields(self)[:_PATH_FIELDS]]
        return [(name, value) for name, value in values if value is not None]


_PATH_FIELDS = 10
_PATH_ATTRIBUTES = frozenset(field.name.replace("_", "-") for field in fields(Pkcs11Uri)[:_PATH_FIELDS])


def parse_pkcs11_uri(text: str) -> Pkcs11Uri:
    """The URI of a token. Raises: ConfigInvalid; its detail shows no value, since one could be a PIN."""
    _require(len(text) <= MAX_URI_BYTES, f"it is longer than {MAX_URI_BYTES} characters")
    _require(text[: len(SCHEME)].lower() == SCHEME, "it does not begin with pkcs11:")
    path, mark, query = text[len(SCHEME) :].partition("?")
    _require(bool(query) or not mark, "a '?' is followed by nothing")
    values: dict[str, object] = {}
    for name, value in _pairs(path.split(";") if path else (), _PATH_VALUE):
        _require(name not in _OBJECT_ATTRIBUTES, f"{name} names an object: the URI of a backend names its token only")
        _require(name in _PATH_ATTRIBUTES, f"path attribute {name[:64]} is not known")
        _require(name not in values, f"{name} stands twice")
        values[name] = _READERS.get(name, _text)(name, value)
    # RFC 7512 2.4: an unknown query attribute is ignored; one that we know stands once.
    for name, value in _pairs(query.split("&") if query else (), _QUERY_VALUE):
        _require(
            name != "pin-value", "pin-value is refused: no secret stands in a configuration; name a file by pin-source"
        )
        _require(name != "module-name", "module-name is refused: name the whole path of the module by module-path")
        if name in _QUERY_ATTRIBUTES:
            _require(name not in values, f"{name} stands twice")
            values[name] = _file(name, _text(name, value))
    return Pkcs11Uri(**{name.replace("-", "_"): value for name, value in values.items()})  # type: ignore[arg-type]  # by _READERS


def _pairs(attributes: Iterable[str], allowed: re.Pattern[str]) -> Iterable[tuple[str, str]]:
    for attribute in attributes:
        name, equals, value = attribute.partition("=")
        _require(_NAME.fullmatch(name) is not None and equals == "=", "an attribute is not of the form name=value")
        _require(allowed.fullmatch(value) is not None, f"{name[:64]} holds a character that must be percent-encoded")
        yield name, value


def _text(name: str, value: str) -> str:
    try:
        text = unquote_to_bytes(value).decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigInvalid(f"PKCS#11 URI: {name} is not UTF-8") from None
    _require("\x00" not in text, f"{name} holds a zero byte")
    return text


def _slot_id(name: str, value: str) -> int:
    _require(_SLOT_ID.fullmatch(value) is not None and int(value) < 2**64, f"{name} is not a slot number")
    return int(value)


def _library_version(name: str, value: str) -> tuple[int, int]:
    match = _LIBRARY_VERSION.fullmatch(value)
    numbers = (int(match[1]), int(match[2] or 0)) if match else (256, 0)
    _require(max(numbers) < 256, f"{name} is not of the form 3.1")
    return numbers


def _file(name: str, value: str) -> PurePosixPath:
    """An absolute path, or the same as a `file:` URI. Spec: RFC 7512 2.4 (pin-source: a command after `|` is not offered)."""
    path = value
    if value.startswith("file:"):
        path = "/" + value.removeprefix("file:").removeprefix("//").lstrip("/")
    _require(path.startswith("/") and "|" not in path[:1], f"{name} is not the absolute path of a file")
    return PurePosixPath(path)


_READERS = {"slot-id": _slot_id, "library-version": _library_version}


def _uri_name(field: str) -> str:
    return field.replace("_", "-")


def _format(value: object, allowed: str) -> str:
    if isinstance(value, tuple):
        return ".".join(str(number) for number in value)
    return quote(str(value), safe=allowed)


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ConfigInvalid(f"PKCS#11 URI: {rule}")
