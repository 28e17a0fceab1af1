"""Signed notes: text with signature lines of named Ed25519 keys, and verifier keys (vkeys) as one line of text.

A verifier ignores lines of keys that it does not know, and refuses the whole note when a line of a known key does not verify.
Spec: C2SP signed-note.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from keyreeve_common.errors import InvalidRequest

ED25519: Final = 0x01
COSIGNATURE_V1: Final = 0x04
MAX_NOTE_BYTES = 65_536
MAX_SIGNATURES = 64
_KEY_BYTES, _ID_BYTES = 32, 4
_NAME = re.compile(r"[!-*,-~]{1,255}", re.ASCII)  # printable ASCII without space and plus
_DASH = "\N{EM DASH} "


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """`public` is the raw Ed25519 key, 32 bytes; `kind` the signature type of signed-note."""

    name: str
    public: bytes
    kind: int = ED25519

    def __post_init__(self) -> None:
        check_name(self.name)
        if len(self.public) != _KEY_BYTES or self.kind not in {ED25519, COSIGNATURE_V1}:
            raise InvalidRequest("vkey: neither an Ed25519 key of a log nor one of a witness")

    @property
    def id(self) -> bytes:
        return sha256(self.name.encode() + b"\n" + bytes((self.kind,)) + self.public).digest()[:_ID_BYTES]

    def __str__(self) -> str:
        return f"{self.name}+{self.id.hex()}+{base64.b64encode(bytes((self.kind,)) + self.public).decode()}"

    def verifies(self, signature: bytes, message: bytes) -> bool:
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, message)
        except InvalidSignature:
            return False
        return True


def check_name(name: str) -> str:
    """Raises: InvalidRequest."""
    if _NAME.fullmatch(name) is None:
        raise InvalidRequest("name of a log or witness is not 1 to 255 of printable ASCII without spaces and '+'")
    return name


def parse_vkey(line: str) -> VerifierKey:
    """The key of `name+id+base64`, with or without a line break at its end. Raises: InvalidRequest."""
    name, _, rest = line.removesuffix("\n").partition("+")
    key_id, _, encoded = rest.partition("+")
    data = _base64(encoded, "vkey")
    if len(data) != 1 + _KEY_BYTES:
        raise InvalidRequest("vkey: is not name+id+key of an Ed25519 key")
    key = VerifierKey(name, data[1:], data[0])
    if key.id.hex() != key_id:
        raise InvalidRequest("vkey: its id does not belong to its name and key")
    return key


@dataclass(frozen=True, slots=True)
class NoteSignature:
    """`signature` is what follows the key id: for a cosignature with its timestamp."""

    name: str
    key_id: bytes
    signature: bytes

    def __str__(self) -> str:
        return f"{_DASH}{self.name} {base64.b64encode(self.key_id + self.signature).decode()}\n"


@dataclass(frozen=True, slots=True)
class Note:
    """`text` ends in a line break and is what is signed."""

    text: str
    signatures: tuple[NoteSignature, ...]

    def to_bytes(self) -> bytes:
        return (self.text + "\n" + "".join(map(str, self.signatures))).encode()

    def signatures_of(self, key: VerifierKey) -> list[NoteSignature]:
        return [line for line in self.signatures if line.name == key.name and line.key_id == key.id]

    def verify(self, key: VerifierKey) -> None:
        """That this key signed the text. Raises: InvalidRequest."""
        lines = self.signatures_of(key)
        if not lines:
            raise InvalidRequest(f"no signature of {key.name} with key id {key.id.hex()}")
        if not all(key.verifies(line.signature, self.text.encode()) for line in lines):
            raise InvalidRequest(f"the signature of {key.name} does not verify")


def parse_note(data: bytes) -> Note:
    """Raises: InvalidRequest."""
    if len(data) > MAX_NOTE_BYTES:
        raise InvalidRequest(f"note has over {MAX_NOTE_BYTES} bytes")
    try:
        whole = data.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("note is not UTF-8") from None
    if any(character < " " and character != "\n" for character in whole):
        raise InvalidRequest("note holds control characters")
    at = whole.rfind("\n\n")
    if at < 0 or not whole.endswith("\n"):
        raise InvalidRequest("note has no signatures after an empty line, or is cut short")
    lines = whole[at + 2 :].split("\n")[:-1]
    if not 1 <= len(lines) <= MAX_SIGNATURES:
        raise InvalidRequest(f"note has {len(lines)} signatures, allowed are 1 to {MAX_SIGNATURES}")
    return Note(whole[: at + 1], tuple(map(_parse_signature, lines)))


def sign_note(text: str, key: VerifierKey, sign: Callable[[bytes], bytes]) -> Note:
    """The note with one signature, by the private key of `key`."""
    return Note(text, (NoteSignature(key.name, key.id, sign(text.encode())),))


def _parse_signature(line: str) -> NoteSignature:
    name, _, encoded = line.removeprefix(_DASH).partition(" ")
    if not line.startswith(_DASH) or not name or "+" in name or any(map(str.isspace, name)):
        raise InvalidRequest("note has a signature line that is not '— name base64'")
    data = _base64(encoded, "signature of a note")
    if len(data) <= _ID_BYTES:
        raise InvalidRequest("note has a signature that is too short")
    return NoteSignature(name, data[:_ID_BYTES], data[_ID_BYTES:])


def _base64(text: str, what: str) -> bytes:
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise InvalidRequest(f"{what} is not base64") from None
    if base64.b64encode(data).decode() != text:
        raise InvalidRequest(f"{what} is not in the one form of base64")
    return data
