"""A witness: it cosigns a log's checkpoint only when the log grew from the one that it cosigned last, and remembers the new one first.

Its state is a file with the text of that checkpoint, for each log one. Whoever loses it may cosign a log that was put back.
Spec: C2SP tlog-cosignature; tlog-witness (the rule, not its HTTP API).
"""

from __future__ import annotations

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

    Raises: FailedPrecondition when the log did not only grow; NotFound, InvalidRequest when it cannot be read.
    """
    head, note = verify_checkpoint(log.read("checkpoint"), log_key)
    seen = _read_state(state, log_key.name)
    _require_growth(log, seen, head)
    write_atomic(state, head.to_text().encode(), mode=0o600)
    return witness.cosign(note, timestamp=timestamp)


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
