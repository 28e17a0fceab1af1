"""A strict reader of DER: what X.509 parsers forgive, this one refuses.

Lengths are definite and minimal, booleans and integers have their one form, nothing stands behind the value, and nesting is bounded. It
knows no schema: it gives the places of the elements, and `cryptography` gives their meaning.
Spec: X.690 8.1, 10.1, 11.1; RFC 5280 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MAX_DEPTH = 24
BOOLEAN, INTEGER, BIT_STRING, OCTET_STRING, OID, SEQUENCE, SET = 0x01, 0x02, 0x03, 0x04, 0x06, 0x30, 0x31
_CONSTRUCTED = 0x20


class DerError(ValueError):
    """The bytes are not strict DER, or not of the shape asked for. The text is safe to show."""


@dataclass(frozen=True, slots=True)
class Element:
    """One TLV inside `data`: the identifier octet, and where it, its value and its end stand."""

    data: bytes
    tag: int
    start: int
    value_start: int
    end: int

    @property
    def value(self) -> bytes:
        return self.data[self.value_start : self.end]

    @property
    def encoded(self) -> bytes:
        return self.data[self.start : self.end]

    def children(self) -> list[Element]:
        return list(_elements(self.data, self.value_start, self.end))


def read_element(data: bytes, tag: int, what: str) -> Element:
    """The one element that `data` is, strict to its last byte. Raises: DerError."""
    element = _element_at(data, 0, len(data))
    if element.end != len(data):
        raise DerError(f"{len(data) - element.end} bytes stand after {what}")
    if element.tag != tag:
        raise DerError(f"{what} has tag 0x{element.tag:02x}, not 0x{tag:02x}")
    _check_strict(element, depth=0)
    return element


def check_name(data: bytes) -> None:
    """Holds that `data` is one Name: a SEQUENCE of SETs of attributes. Spec: RFC 5280 4.1.2.4. Raises: DerError."""
    for rdn in read_element(data, SEQUENCE, "Name").children():
        if rdn.tag != SET:
            raise DerError("Name holds something other than a SET")
        for attribute in rdn.children():
            parts = attribute.children() if attribute.tag == SEQUENCE else []
            if len(parts) != 2 or parts[0].tag != OID:
                raise DerError("Name holds something other than type and value")


def encode(tag: int, *values: bytes) -> bytes:
    """One TLV around the values."""
    body = b"".join(values)
    length = len(body)
    if length < 0x80:
        return bytes((tag, length)) + body
    octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(octets))) + octets + body


def _elements(data: bytes, at: int, end: int) -> Iterator[Element]:
    while at < end:
        element = _element_at(data, at, end)
        yield element
        at = element.end


def _element_at(data: bytes, at: int, end: int) -> Element:
    if at + 2 > end:
        raise DerError("element is cut short")
    tag, first = data[at], data[at + 1]
    if tag & 0x1F == 0x1F:
        raise DerError("element has a tag number above 30")
    value_start = at + 2
    length = first
    if first & 0x80:
        count = first & 0x7F
        if count == 0:
            raise DerError("length is indefinite")
        octets = data[value_start : min(value_start + count, end)]
        value_start += count
        if count > 4 or len(octets) != count:
            raise DerError("length is too long, or cut short")
        length = int.from_bytes(octets, "big")
        if length < 0x80 or octets[0] == 0:
            raise DerError("length is not in its shortest form")
    if value_start + length > end:
        raise DerError("element reaches past its end")
    return Element(data, tag, at, value_start, value_start + length)


def _check_strict(element: Element, *, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise DerError(f"nesting is deeper than {MAX_DEPTH}")
    if element.tag in (SEQUENCE & ~_CONSTRUCTED, SET & ~_CONSTRUCTED):
        raise DerError("SEQUENCE or SET is not constructed")
    if element.tag & _CONSTRUCTED:
        if not element.tag & 0xC0 and element.tag not in (SEQUENCE, SET):
            raise DerError("a primitive type is constructed")
        for child in _elements(element.data, element.value_start, element.end):
            _check_strict(child, depth=depth + 1)
    elif element.tag == BOOLEAN:
        if element.value not in (b"\x00", b"\xff"):
            raise DerError("BOOLEAN is neither 00 nor ff")
    elif element.tag == INTEGER:
        _check_integer(element.value)


def _check_integer(value: bytes) -> None:
    if not value:
        raise DerError("INTEGER is empty")
    if len(value) > 1 and ((value[0] == 0 and value[1] < 0x80) or (value[0] == 0xFF and value[1] >= 0x80)):
        raise DerError("INTEGER is not in its shortest form")
