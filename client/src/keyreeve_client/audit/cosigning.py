"""A witness: it cosigns a log's checkpoint only when the log grew from the one that it cosigned last, and remembers the new one first.

Its state is a file with the text of that checkpoint, for each log one, and beside it `<state>.vkey` with the log's key as it was at the first
time: whoever can write the log's directory must not have it cosign under a key of his own. The latter is also the lock: one at a time looks and
remembers. Whoever loses the state may cosign a log that was put back.
Spec: C2SP tlog-cosignature; tlog-witness (the rule, not its HTTP API).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from keyreeve_common.errors import ConfigInvalid, FailedPrecondition, InvalidRequest
from keyreeve_common.files import read_secret, write_atomic
from keyreeve_common.transparency.checkpoint import (
    Checkpoint,
    cosign,
    parse_checkpoint_text,
    verify_checkpoint,
)
from keyreeve_common.transparency.merkle import EMPTY_ROOT, consistency_proof, verify_consistency
from keyreeve_common.transparency.note import COSIGNATURE_V1, Note, VerifierKey

from keyreeve_client.audit.log_directory import LogDirectory

_MAX_VKEY_BYTES = 4_096


class WitnessKey:
    """A witness's private key with its name."""

    def __init__(self, name: str, key: Ed25519PrivateKey) -> None:
        self.vkey = VerifierKey(name, key.public_key().public_bytes_raw(), COSIGNATURE_V1)
        self._key = key

    def cosign(self, note: Note, *, timestamp: int) -> Note:
        return cosign(note, self.vkey, timestamp=timestamp, sign=self._key.sign)


def read_witness_key(path: Path, name: str) -> WitnessKey:
    """An Ed25519 key in PEM (PKCS#8, not encrypted), in a file that only its owner reads. Raises: ConfigInvalid, InvalidRequest."""
    try:
        key = load_pem_private_key(read_secret(path), None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigInvalid(
            f"{path}: is no Ed25519 private key in PEM; make one with: openssl genpkey -algorithm ed25519"
        )
    return WitnessKey(name, key)


def cosign_log(log: LogDirectory, log_key: VerifierKey, witness: WitnessKey, state: Path, *, timestamp: int) -> Note:
    """The log's checkpoint with this witness's cosignature, after its tree was proved to hold the one that was cosigned before.

    Raises: FailedPrecondition when the log did not only grow, or has another key than before; NotFound, InvalidRequest when it cannot be read;
    StorageFull, ConfigInvalid for a state that cannot be written.
    """
    with _state_lock(state) as pinned:
        known = os.pread(pinned, _MAX_VKEY_BYTES, 0).decode(errors="replace")
        if known and known != f"{log_key}\n":
            raise FailedPrecondition(
                f"the log's key is {log_key}, {known.strip()} was cosigned before: somebody put another log or key there"
            )
        head, note = verify_checkpoint(log.read("checkpoint"), log_key)
        _require_growth(log, _read_state(state, log_key.name), head)
        if not known:
            os.pwrite(pinned, f"{log_key}\n".encode(), 0)
            os.fsync(pinned)
        write_atomic(state, head.to_text().encode(), mode=0o600)
        return witness.cosign(note, timestamp=timestamp)


@contextmanager
def _state_lock(state: Path) -> Iterator[int]:
    """The file of the log's key, held. Raises: ConfigInvalid."""
    path = state.with_name(f"{state.name}.vkey")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigInvalid(f"{path}: cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _require_growth(log: LogDirectory, seen: Checkpoint, head: Checkpoint) -> None:
    if head.size < seen.size:
        raise FailedPrecondition(
            f"the log has {head.size} records, {seen.size} were cosigned before: records were cut off, or an old state put back"
        )
    try:
        subtree = log.subtree(head.size)
        if head.size and subtree(0, head.size) != head.root:
            raise InvalidRequest("its tiles do not lead to the root that its checkpoint signs")
        verify_consistency(seen.size, head.size, seen.root, head.root, consistency_proof(subtree, seen.size, head.size))
    except InvalidRequest as error:
        raise FailedPrecondition(
            f"the log did not grow from the {seen.size} records cosigned before: {error.detail}"
        ) from None


def _read_state(path: Path, origin: str) -> Checkpoint:
    try:
        seen = parse_checkpoint_text(path.read_text())
    except FileNotFoundError:
        return Checkpoint(origin, 0, EMPTY_ROOT)
    except (InvalidRequest, UnicodeDecodeError):
        raise FailedPrecondition(f"{path}: is no state of a witness: restore it from a backup") from None
    if seen.origin != origin:
        raise FailedPrecondition(f"{path}: is the state for {seen.origin[:128]!r}, not for {origin!r}")
    return seen
