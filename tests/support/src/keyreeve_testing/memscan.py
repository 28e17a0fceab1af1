"""Looks for a private key in the memory of running processes, in every form in which software keeps one.

A process whose memory cannot be read is an error, never a clean result. Needs root, or the right to trace the process.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
CHUNK_BYTES = 8 << 20
MIN_NEEDLE_BYTES = 16
MIN_SECRET_BYTES = 8
PEM_LINE_BYTES = 48
_PYTHON_DIGIT_BITS = 30
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+\s*(.*)")
_UNREADABLE = ("[vvar]", "[vvar_vclock]", "[vsyscall]")


@dataclass(frozen=True, slots=True)
class Needle:
    """One form of one secret number; its repr does not show it."""

    form: str
    data: bytes

    def __repr__(self) -> str:
        return f"Needle({self.form!r}, {len(self.data)} bytes)"


@dataclass(frozen=True, slots=True)
class Hit:
    form: str
    address: int
    mapping: str


@dataclass(frozen=True, slots=True)
class Scan:
    """What one process's memory held."""

    pid: int
    name: str
    scanned_bytes: int
    mappings: int
    hits: tuple[Hit, ...]

    @property
    def forms(self) -> tuple[str, ...]:
        return tuple(sorted({hit.form for hit in self.hits}))


def needles_of(key: PrivateKey) -> list[Needle]:
    """Every form of the key's secret numbers, and its usual encodings as a whole."""
    needles = [needle for name, number, size in _secrets_of(key) for needle in _forms(name, number, size)]
    needles += _encodings(key)
    return [needle for needle in needles if len(needle.data) >= MIN_NEEDLE_BYTES]


def _secrets_of(key: PrivateKey) -> list[tuple[str, int, int]]:
    """Name, number and length in bytes."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return [("scalar", key.private_numbers().private_value, (key.curve.key_size + 7) // 8)]
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return [("seed", int.from_bytes(key.private_bytes_raw(), "big"), 32)]
    numbers = key.private_numbers()
    half = key.key_size // 16
    return [("p", numbers.p, half), ("q", numbers.q, half), ("d", numbers.d, key.key_size // 8)]


def _forms(name: str, number: int, size: int) -> Iterator[Needle]:
    data = number.to_bytes(size, "big")
    yield Needle(f"{name}, big endian", data)
    yield Needle(f"{name}, little endian limbs", data[::-1])
    yield Needle(f"{name}, 32-bit words, high first", b"".join(data[at : at + 4][::-1] for at in range(0, size, 4)))
    yield Needle(f"{name}, Python integer", _python_integer(number))
    yield Needle(f"{name}, hex", binascii.hexlify(data))
    yield Needle(f"{name}, HEX", binascii.hexlify(data).upper())
    yield Needle(f"{name}, hex with colons", binascii.hexlify(data, ":"))
    yield Needle(f"{name}, decimal", str(number).encode())
    for shift in range(3):
        text = _base64_inside(data, shift)
        yield Needle(f"{name}, base64 at {shift}", text)
        yield Needle(f"{name}, base64url at {shift}", text.translate(bytes.maketrans(b"+/", b"-_")))


def _python_integer(number: int) -> bytes:
    """The digits of a CPython int: 30 bits each, lowest first, in 32-bit words."""
    digits = []
    while number:
        digits.append((number & ((1 << _PYTHON_DIGIT_BITS) - 1)).to_bytes(4, "little"))
        number >>= _PYTHON_DIGIT_BITS
    return b"".join(digits)


def _base64_inside(data: bytes, shift: int) -> bytes:
    """What `data` looks like within longer base64, when `shift` bytes (modulo 3) stand before it: only characters that it alone decides."""
    text = base64.b64encode(b"\0" * shift + data)
    first = -(-shift * 8 // 6)
    last = (shift + len(data)) * 8 // 6
    return text[first:last]


def _encodings(key: PrivateKey) -> Iterator[Needle]:
    formats = [("PKCS#8", PrivateFormat.PKCS8)]
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        formats.append(
            ("SEC1" if isinstance(key, ec.EllipticCurvePrivateKey) else "PKCS#1", PrivateFormat.TraditionalOpenSSL)
        )
    for name, form in formats:
        der = key.private_bytes(Encoding.DER, form, NoEncryption())
        yield Needle(f"{name} DER", der)
        secret = _secret_offsets(key, der)
        for at in range(0, len(der), PEM_LINE_BYTES):
            # A line of nothing but public key would be found in every process that has the certificate.
            if len(secret.intersection(range(at, at + PEM_LINE_BYTES))) >= MIN_SECRET_BYTES:
                yield Needle(f"{name} PEM line", base64.b64encode(der[at : at + PEM_LINE_BYTES]).rstrip(b"="))


def _secret_offsets(key: PrivateKey, der: bytes) -> set[int]:
    """Which bytes of the encoding are secret."""
    found: set[int] = set()
    for _, number, _ in _secrets_of(key):
        shortest = number.to_bytes((number.bit_length() + 7) // 8, "big")  # DER leaves out an INTEGER's leading zeros
        at = der.index(shortest)
        found.update(range(at, at + len(shortest)))
    return found


def scan_process(pid: int, needles: Iterable[Needle], name: str = "") -> Scan:
    """Reads all of a process's readable memory. Raises: PermissionError, ProcessLookupError when that is not possible."""
    wanted = list(needles)
    overlap = max(len(needle.data) for needle in wanted) - 1
    hits: set[Hit] = set()
    scanned = mappings = 0
    try:
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        maps = Path(f"/proc/{pid}/maps").read_text()
    except FileNotFoundError:
        raise ProcessLookupError(f"process {pid} is gone") from None
    try:
        for start, end, mapping in _readable(maps):
            mappings += 1
            for address, data in _chunks(memory, start, end, overlap):
                scanned += len(data)
                hits.update(_find(wanted, data, address, mapping))
    finally:
        os.close(memory)
    if scanned == 0:
        raise PermissionError(f"nothing of process {pid} could be read")
    return Scan(pid, name or _name_of(pid), scanned, mappings, tuple(sorted(hits, key=lambda hit: hit.address)))


def _readable(maps: str) -> Iterator[tuple[int, int, str]]:
    for line in maps.splitlines():
        match = _MAPPING.fullmatch(line)
        if match and match[3].startswith("r") and match[4] not in _UNREADABLE:
            yield int(match[1], 16), int(match[2], 16), match[4] or "anonymous"


def _chunks(memory: int, start: int, end: int, overlap: int) -> Iterator[tuple[int, bytes]]:
    address = start
    tail = b""
    while address < end:
        data = b""
        with suppress(OSError):  # a page of a shortened file, or a mapping that has gone since
            data = os.pread(memory, min(CHUNK_BYTES, end - address), address)
        if not data:
            return
        yield address - len(tail), tail + data
        tail = (tail + data)[-overlap:]
        address += len(data)


def _find(needles: list[Needle], data: bytes, address: int, mapping: str) -> Iterator[Hit]:
    for needle in needles:
        at = data.find(needle.data)
        while at >= 0:
            yield Hit(needle.form, address + at, mapping)
            at = data.find(needle.data, at + 1)


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return str(pid)
