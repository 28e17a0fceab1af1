"""Checkpoints, verifier keys, entry bundles and the journal of an audit log: nothing but InvalidRequest comes out, and each has one form."""

from __future__ import annotations

import sys

from harness import main
from keyreeve_common.errors import InvalidRequest
from keyreeve_common.transparency.checkpoint import parse_checkpoint_text, verify_cosignature
from keyreeve_common.transparency.journal import read_groups
from keyreeve_common.transparency.note import COSIGNATURE_V1, VerifierKey, parse_note, parse_vkey
from keyreeve_common.transparency.tiles import join_entries, split_entries

_WITNESS = VerifierKey("example.org/witness", bytes(32), COSIGNATURE_V1)


def target(data: bytes) -> str:
    return " / ".join((_note(data), _vkey(data), _entries(data), _journal(data)))


def _note(data: bytes) -> str:
    try:
        note = parse_note(data)
        if note.to_bytes() != data:
            raise AssertionError("a note has two encodings")
        checkpoint = parse_checkpoint_text(note.text)
        if checkpoint.to_text() != note.text:
            raise AssertionError("a checkpoint has two encodings")
    except InvalidRequest as error:
        return error.detail[:50]
    try:
        verify_cosignature(note, _WITNESS)
    except InvalidRequest as error:
        return f"accepted, {error.detail[:30]}"
    raise AssertionError("nobody has this witness's key")


def _vkey(data: bytes) -> str:
    try:
        line = data.decode("ascii")
        key = parse_vkey(line)
    except (InvalidRequest, UnicodeDecodeError):
        return "no vkey"
    if str(key) != line.removesuffix("\n"):
        raise AssertionError("a vkey has two encodings")
    return "vkey accepted"


def _entries(data: bytes) -> str:
    try:
        entries = split_entries(data)
    except InvalidRequest:
        return "no bundle"
    if join_entries(entries) != data:
        raise AssertionError("a bundle has two encodings")
    return "bundle accepted"


def _journal(data: bytes) -> str:
    content = read_groups(data, 7)
    if not 0 <= content.good <= len(data) or bool(content.good) != bool(content.entries):
        raise AssertionError("a journal is longer than it is")
    return f"journal {'accepted' if content.entries else 'empty'}"


if __name__ == "__main__":
    sys.exit(main(target, "checkpoint"))
