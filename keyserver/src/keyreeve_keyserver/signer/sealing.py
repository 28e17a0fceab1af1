"""Sealed key records: a header in the clear, and a box whose associated data is that header.

Layout: `KRV1` `bytes32 header` `nonce (12)` `box`. The box is AES-256-GCM over the PKCS#8 of a software key, or over nothing for a token
key: then its tag alone proves that this key cluster wrote the header. Nonces are random: 2^32 records under one key are far beyond reach.
Spec: NIST SP 800-38D 8.2.2; RFC 7914 (scrypt).
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from keyreeve_common.errors import ConfigInvalid, KeyreeveError, MalformedFrame, SealedRecordInvalid
from keyreeve_common.files import sync_directory
from keyreeve_common.strict_json import canonical_json
from keyreeve_common.wire import Reader, bytes32

from keyreeve_keyserver.backends.ports import SealingToken
from keyreeve_keyserver.domain.keys import KeyRecord, parse_record_header
from keyreeve_keyserver.domain.secret import Secret

MAGIC = b"KRV1"
NOTE_MAGIC = b"KRN1"  # begins the associated data too, where a record's has its header's brace
NONCE_BYTES = 12
TAG_BYTES = 16
MAX_HEADER_BYTES = 65_536
MAX_NOTE_BYTES = 4_096  # with its magic, what a worker takes as associated data
MAX_BOX_BYTES = 65_536
MIN_PASSPHRASE_BYTES = 16
_CHANGED = "record was changed, or sealed under another key-encryption key"


class KeyEncryptionKey(Protocol):
    async def encrypt(self, nonce: bytes, associated: bytes, data: bytes) -> bytes:
        """Raises: TokenUnavailable."""

    async def decrypt(self, nonce: bytes, associated: bytes, box: bytes) -> bytes:
        """Raises: SealedRecordInvalid, TokenUnavailable."""


class Sealer:
    """Writes and opens sealed records. `random` gives nonces."""

    def __init__(self, key: KeyEncryptionKey, *, random: Callable[[int], bytes] = secrets.token_bytes) -> None:
        self._key = key
        self._random = random

    async def seal(self, record: KeyRecord, secret: Secret | None) -> bytes:
        header, nonce = record.to_header(), self._random(NONCE_BYTES)
        box = await self._key.encrypt(nonce, header, secret.reveal() if secret else b"")
        return MAGIC + bytes32(header) + nonce + box

    async def open(self, sealed: bytes) -> tuple[KeyRecord, Secret | None]:
        """Raises: SealedRecordInvalid, TokenUnavailable."""
        header, nonce, box = _split(sealed)
        data = await self._key.decrypt(nonce, header, box)
        try:
            return parse_record_header(header), Secret(data) if data else None
        except KeyreeveError as error:
            raise SealedRecordInvalid(f"record header: {error.detail}") from None

    async def seal_note(self, note: bytes, secret: Secret | None = None) -> bytes:
        """A text of ours, in the clear, for somebody else to keep: it comes back as it was, or not at all. Never a key record's form."""
        nonce = self._random(NONCE_BYTES)
        box = await self._key.encrypt(nonce, NOTE_MAGIC + note, secret.reveal() if secret else b"")
        return NOTE_MAGIC + bytes32(note) + nonce + box

    async def open_note(self, sealed: bytes) -> bytes:
        """Raises: SealedRecordInvalid, TokenUnavailable."""
        note, secret = await self.open_secret_note(sealed)
        if secret is not None:
            raise SealedRecordInvalid("this note has an empty box")
        return note

    async def open_secret_note(self, sealed: bytes) -> tuple[bytes, Secret | None]:
        """Raises: SealedRecordInvalid, TokenUnavailable."""
        note, nonce, box = _split(sealed, NOTE_MAGIC, MAX_NOTE_BYTES)
        data = await self._key.decrypt(nonce, NOTE_MAGIC + note, box)
        return note, Secret(data) if data else None


def _split(sealed: bytes, magic: bytes = MAGIC, high: int = MAX_HEADER_BYTES) -> tuple[bytes, bytes, bytes]:
    reader = Reader(sealed)
    try:
        if reader.take(len(magic), "magic") != magic:
            raise SealedRecordInvalid(f"record does not begin with {magic.decode('ascii')}")
        header = reader.bytes32("header", low=2, high=high)
        nonce = reader.take(NONCE_BYTES, "nonce")
    except MalformedFrame:
        raise SealedRecordInvalid("record is cut short") from None
    box = sealed[len(MAGIC) + 4 + len(header) + NONCE_BYTES :]
    if not TAG_BYTES <= len(box) <= MAX_BOX_BYTES:
        raise SealedRecordInvalid("record is cut short, or too long")
    return header, nonce, box


class PassphraseKey:
    """A key-encryption key in memory, derived from a passphrase."""

    def __init__(self, key: Secret) -> None:
        self._gcm = AESGCM(key.reveal())

    async def encrypt(self, nonce: bytes, associated: bytes, data: bytes) -> bytes:
        return self._gcm.encrypt(nonce, data, associated)

    async def decrypt(self, nonce: bytes, associated: bytes, box: bytes) -> bytes:
        try:
            return self._gcm.decrypt(nonce, box, associated)
        except InvalidTag:
            raise SealedRecordInvalid(_CHANGED) from None


class TokenKey:
    """A key-encryption key that never leaves a PKCS#11 token. One at a time encrypts, so that two workers never both make the key."""

    def __init__(self, token: SealingToken, label: str) -> None:
        self._token = token
        self._label = label
        self._encrypting = asyncio.Lock()

    async def encrypt(self, nonce: bytes, associated: bytes, data: bytes) -> bytes:
        async with self._encrypting:
            return await self._token.encrypt(self._label, nonce, associated, data)

    async def decrypt(self, nonce: bytes, associated: bytes, box: bytes) -> bytes:
        return await self._token.decrypt(self._label, nonce, associated, box)


@dataclass(frozen=True, slots=True)
class KdfParameters:
    """Parameters of scrypt. They are no secret, and without them the passphrase opens nothing: back them up with the catalog."""

    salt: str
    n: int = 131_072
    r: int = 8
    p: int = 1
    kdf: str = "scrypt"
    version: int = 1

    def __post_init__(self) -> None:
        known = self.version == 1 and self.kdf == "scrypt"
        costs = self.n in {2**power for power in range(14, 22)} and 8 <= self.r <= 32 and 1 <= self.p <= 16
        if not (known and costs and len(bytes.fromhex(self.salt)) >= 16):
            raise ValueError("parameters out of range")

    def derive(self, passphrase: Secret) -> Secret:
        kdf = Scrypt(salt=bytes.fromhex(self.salt), length=32, n=self.n, r=self.r, p=self.p)
        return Secret(kdf.derive(passphrase.reveal()))


def load_kdf_parameters(path: Path) -> KdfParameters:
    """The parameters at `path`; on the first start they are made, with a random salt. Raises: ConfigInvalid."""
    try:
        _create_once(path, canonical_json(asdict(KdfParameters(salt=secrets.token_hex(32)))) + b"\n")
        fields = json.loads(path.read_bytes())
        if not isinstance(fields, dict) or not all(type(value) in (int, str) for value in fields.values()):
            raise ValueError("not an object of plain values")
        return KdfParameters(**fields)
    except OSError as error:
        raise ConfigInvalid(f"kdf_file {path} cannot be read or made: {error.strerror}") from None
    except (ValueError, TypeError):
        raise ConfigInvalid(
            f"kdf_file {path} does not hold the parameters of scrypt: restore it from a backup"
        ) from None


def check_passphrase(passphrase: bytes) -> Secret:
    """Raises: ConfigInvalid."""
    if len(passphrase) < MIN_PASSPHRASE_BYTES:
        raise ConfigInvalid(f"passphrase_file holds fewer than {MIN_PASSPHRASE_BYTES} bytes: use a long random one")
    return Secret(passphrase)


def _create_once(path: Path, content: bytes) -> None:
    """Makes the file whole or not at all: a crash in between must not leave parameters that later open nothing."""
    if path.exists():
        return
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if not path.exists():
            os.link(draft, path)
        sync_directory(path.parent)
    except FileExistsError:
        pass
    finally:
        draft.unlink(missing_ok=True)
