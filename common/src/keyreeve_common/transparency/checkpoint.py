"""Checkpoints: signed tree heads of a log, and the cosignatures by which witnesses say that they saw them grow without a change.

Spec: C2SP tlog-checkpoint; C2SP tlog-cosignature (Ed25519, `cosignature/v1`).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass

from keyreeve_common.errors import InvalidRequest
from keyreeve_common.transparency.merkle import HASH_BYTES
from keyreeve_common.transparency.note import COSIGNATURE_V1, Note, NoteSignature, VerifierKey, parse_note, sign_note

MAX_TREE_SIZE = 2**63 - 1
_MAX_TIMESTAMP = 253_402_300_799  # the end of year 9999
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_TIMESTAMP_BYTES, _SIGNATURE_BYTES = 8, 64


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The head of a tree of `size` records. Ours have no extension lines, and none are taken."""

    origin: str
    size: int
    root: bytes

    def to_text(self) -> str:
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    def sign(self, key: VerifierKey, sign: Callable[[bytes], bytes]) -> bytes:
        """The checkpoint as it is published. `sign` is Ed25519 with the private key of `key`."""
        return sign_note(self.to_text(), key, sign).to_bytes()


def parse_checkpoint_text(text: str) -> Checkpoint:
    """Raises: InvalidRequest."""
    lines = text.split("\n")
    if len(lines) != 4 or lines[3] or not lines[0]:
        raise InvalidRequest("checkpoint is not the three lines origin, tree size, root hash")
    origin, size, encoded, _ = lines
    if _SIZE.fullmatch(size) is None or int(size) > MAX_TREE_SIZE:
        raise InvalidRequest("checkpoint has a tree size that is no number")
    try:
        root = base64.b64decode(encoded.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise InvalidRequest("checkpoint has a root hash that is not base64") from None
    if len(root) != HASH_BYTES or base64.b64encode(root).decode() != encoded:
        raise InvalidRequest(f"checkpoint has a root hash that is not {HASH_BYTES} bytes in base64")
    return Checkpoint(origin, int(size), root)


def verify_checkpoint(data: bytes, key: VerifierKey) -> tuple[Checkpoint, Note]:
    """The checkpoint in a note that the log's key signed under the log's name. Raises: InvalidRequest."""
    note = parse_note(data)
    note.verify(key)
    checkpoint = parse_checkpoint_text(note.text)
    if checkpoint.origin != key.name:
        raise InvalidRequest(f"checkpoint is of {checkpoint.origin[:128]!r}, the key is of {key.name!r}")
    return checkpoint, note


def cosign(note: Note, key: VerifierKey, *, timestamp: int, sign: Callable[[bytes], bytes]) -> Note:
    """The note with a witness's line added. `timestamp` is POSIX seconds."""
    if key.kind != COSIGNATURE_V1:
        raise InvalidRequest("a witness's key is of type 0x04")
    signature = timestamp.to_bytes(_TIMESTAMP_BYTES, "big") + sign(_cosigned(note.text, timestamp))
    return Note(note.text, (*note.signatures, NoteSignature(key.name, key.id, signature)))


def verify_cosignature(note: Note, key: VerifierKey) -> int:
    """When this witness cosigned the note (POSIX seconds); the latest time where it did so twice. Raises: InvalidRequest."""
    times: list[int] = []
    for line in note.signatures_of(key):
        if len(line.signature) != _TIMESTAMP_BYTES + _SIGNATURE_BYTES:
            raise InvalidRequest(f"the cosignature of {key.name} has the wrong length")
        timestamp = int.from_bytes(line.signature[:_TIMESTAMP_BYTES], "big")
        signature = line.signature[_TIMESTAMP_BYTES:]
        if timestamp > _MAX_TIMESTAMP or not key.verifies(signature, _cosigned(note.text, timestamp)):
            raise InvalidRequest(f"the cosignature of {key.name} does not verify")
        times.append(timestamp)
    if not times:
        raise InvalidRequest(f"no cosignature of {key.name} with key id {key.id.hex()}")
    return max(times)


def _cosigned(text: str, timestamp: int) -> bytes:
    return f"cosignature/v1\ntime {timestamp}\n{text}".encode()
