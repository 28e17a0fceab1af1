"""The key that signs checkpoints: Ed25519, made by the signer at the log's first start, sealed beside the log under the key-encryption key.

File `checkpoint.key`: `KRAK` `nonce (12)` `box`; the box is AES-256-GCM over the 32 bytes of the private key, its associated data names the log.
Who has the directory and not the key-encryption key can sign no checkpoint, and seal no group of the journal: a key for that is derived from it.
Spec: docs/protocol/audit-log.md "Checkpoint key"; NIST SP 800-38D 8.2.2; RFC 2104 (HMAC).
"""

from __future__ import annotations

import hmac
import secrets
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from keyreeve_common.errors import FailedPrecondition, InvalidRequest, SealedRecordInvalid
from keyreeve_common.transparency.checkpoint import Checkpoint
from keyreeve_common.transparency.note import VerifierKey, parse_vkey

from keyreeve_keyserver.audit.publication import replace_file

KEY_FILE = "checkpoint.key"
VKEY_FILE = "log.vkey"
_MAGIC = b"KRAK"
_NONCE_BYTES, _KEY_BYTES, _TAG_BYTES = 12, 32, 16


class KeyEncryption(Protocol):
    """What seals the key: the signer's key-encryption key."""

    async def encrypt(self, nonce: bytes, associated: bytes, data: bytes) -> bytes: ...

    async def decrypt(self, nonce: bytes, associated: bytes, box: bytes) -> bytes: ...


class CheckpointKey:
    def __init__(self, origin: str, key: Ed25519PrivateKey) -> None:
        self._key = key
        self._journal_key = hmac.digest(key.private_bytes_raw(), b"keyreeve audit journal 1", "sha256")
        self.vkey = VerifierKey(origin, key.public_key().public_bytes_raw())

    def seal_group(self, covered: bytes) -> bytes:
        """The seal of a group of the journal: who cannot sign a checkpoint cannot put a record on its way into one."""
        return hmac.digest(self._journal_key, covered, "sha256")

    def sign(self, size: int, root: bytes) -> bytes:
        """The checkpoint of a tree, as it is published."""
        return Checkpoint(self.vkey.name, size, root).sign(self.vkey, self._key.sign)


async def load_checkpoint_key(directory: Path, origin: str, kek: KeyEncryption) -> CheckpointKey:
    """The log's key; on the first start it is made.

    Raises: FailedPrecondition when it is missing or not this log's; Unavailable while the key-encryption key is away; OSError.
    """
    path = directory / KEY_FILE
    if not path.exists():
        if (directory / "checkpoint").exists() or (directory / "tile").exists():
            raise FailedPrecondition(
                f"{path}: the key of this log's checkpoints is gone; restore it, or move the directory away to begin a new log"
            )
        await _make(path, origin, kek)
    key = await _open(path, path.read_bytes(), origin, kek)
    vkey = f"{key.vkey}\n".encode()
    vkey_path = directory / VKEY_FILE
    if not vkey_path.exists() or vkey_path.read_bytes() != vkey:
        replace_file(vkey_path, vkey)
    return key


def recorded_origin(directory: Path) -> str | None:
    """The name under which the log in this directory runs; None where there is none, or nobody can tell."""
    try:
        return parse_vkey((directory / VKEY_FILE).read_text()).name
    except (FileNotFoundError, InvalidRequest, UnicodeDecodeError):
        return None


async def _make(path: Path, origin: str, kek: KeyEncryption) -> None:
    nonce = secrets.token_bytes(_NONCE_BYTES)
    private = Ed25519PrivateKey.generate().private_bytes_raw()
    replace_file(path, _MAGIC + nonce + await kek.encrypt(nonce, _associated(origin), private), mode=0o600)


async def _open(path: Path, data: bytes, origin: str, kek: KeyEncryption) -> CheckpointKey:
    if not data.startswith(_MAGIC) or len(data) != len(_MAGIC) + _NONCE_BYTES + _KEY_BYTES + _TAG_BYTES:
        raise FailedPrecondition(f"{path}: is not the sealed key of a log: restore it from a backup")
    start = len(_MAGIC) + _NONCE_BYTES
    try:
        private = await kek.decrypt(data[len(_MAGIC) : start], _associated(origin), data[start:])
    except SealedRecordInvalid:
        raise FailedPrecondition(
            f"{path}: does not open: it is of another log than {origin}, or sealed under another key-encryption key"
        ) from None
    return CheckpointKey(origin, Ed25519PrivateKey.from_private_bytes(private))


def _associated(origin: str) -> bytes:
    return f"keyreeve audit checkpoint key 1\n{origin}\n".encode()
