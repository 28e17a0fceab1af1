"""What commands print: text for people, or JSON whose names and forms are stable. Data goes to stdout, errors as one line to stderr.

JSON follows the protos: field names as they are, every plain field present, enum values in lower case without prefix (`ec-p256`,
`tls13_server_verify`), times as RFC 3339 in UTC, durations in seconds with unit ("600s"), bytes in base64. A list is an array.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from enum import StrEnum
from typing import Annotated, cast

import typer
from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table
from rich.text import Text

Json = str | int | float | bool | None | Sequence["Json"] | Mapping[str, "Json"]
Row = Mapping[str, Json]


class OutputFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


Output = Annotated[
    OutputFormat | None, typer.Option("--output", "-o", help="text for people, json for programs.", show_default=False)
]
_default: ContextVar[OutputFormat] = ContextVar("keyreeve_output", default=OutputFormat.TEXT)


def set_default_output(output: OutputFormat) -> None:
    """What commands use that were not told otherwise (the option before the command's name)."""
    _default.set(output)


def wants_json(output: OutputFormat | None) -> bool:
    return (output or _default.get()) is OutputFormat.JSON


def show_json(value: Json) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=True) + "\n")


def show_text(line: str) -> None:
    sys.stdout.write(line + "\n")


def show_list(messages: Sequence[Message], columns: Sequence[str], output: OutputFormat | None) -> None:
    """A table with these fields of each message as columns, or all of them as a JSON array."""
    rows = [to_json(message) for message in messages]
    if wants_json(output):
        show_json(rows)
    else:
        show_table(rows, columns)


def show_one(message: Message, output: OutputFormat | None) -> None:
    """One field a line, or a JSON object."""
    show_row(to_json(message), output)


def show_row(row: Row, output: OutputFormat | None) -> None:
    """One field a line, or a JSON object."""
    if wants_json(output):
        show_json(row)
        return
    width = max((len(name) for name in row), default=0)
    for name, value in row.items():
        show_text(f"{name:<{width}}  {text_of(value)}")


def show_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.upper().replace("_", " "), overflow="fold")
    for row in rows:
        # Text, not str: what comes from a server is never markup.
        table.add_row(*(Text(text_of(row.get(column))) for column in columns))
    # Nobody reads a pipe by its width: there a row is a line.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 1000, highlight=False).print(table)


def text_of(value: Json) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        if value.keys() == {"type", "value"}:  # a selector, as it is written on the command line
            return f"{value['type']}:{value['value']}"
        if value.keys() == {"per_second", "burst"}:  # a rate
            return f"{value['per_second']:g}/s, burst {value['burst']}"
        return " ".join(f"{name}={text_of(inner)}" for name, inner in value.items() if inner not in ("", [], None))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(text_of(item) for item in value) or "-"
    return str(value) if value != "" else "-"


def to_json(message: Message) -> dict[str, Json]:
    """The message as a JSON object; fields with presence are null when absent."""
    return {field.name: _field(message, cast("FieldDescriptor", field)) for field in message.DESCRIPTOR.fields}


def _field(message: Message, field: FieldDescriptor) -> Json:
    value = getattr(message, field.name)
    if field.is_repeated:
        return [_value(item, field) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _value(value, field)


def _value(value: object, field: FieldDescriptor) -> Json:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Duration):
        return value.ToJsonString()
    if isinstance(value, Message):
        return to_json(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if field.enum_type is not None and isinstance(value, int):
        return enum_name(field.enum_type, value)
    assert isinstance(value, str | int | float | bool)  # noqa: S101 - protobuf has no other kinds
    return value


def enum_name(enum: EnumDescriptor, number: int) -> str:
    """`KEY_TYPE_EC_P256` of enum `KeyType` is `ec-p256` (as in configuration), other enums keep their underscores."""
    value = enum.values_by_number.get(number)
    if value is None:
        return str(number)
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper() + "_"
    name = value.name.removeprefix(prefix).lower()
    return name.replace("_", "-") if enum.name == "KeyType" else name
