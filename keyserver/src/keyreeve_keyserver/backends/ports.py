"""What the signer needs of a backend. Messages that reach a backend have been judged; it hashes and signs them.

Every method raises our errors only, and one failed request never fails its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import NamedTuple, Protocol

from keyreeve_common.errors import Internal, KeyreeveError
from keyreeve_common.key_id import KeyId
from keyreeve_common.schemes import KeyType, SignatureScheme

from keyreeve_keyserver.domain.keys import Custody, KeyRecord
from keyreeve_keyserver.domain.secret import Secret


class BackendState(StrEnum):
    UP = "up"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What this backend can do now; empty while it is down and nothing is known."""

    custody: Custody
    key_types: tuple[KeyType, ...]
    schemes: tuple[SignatureScheme, ...]


@dataclass(frozen=True, slots=True)
class BackendHealth:
    """`detail` says what to do when it is down. `workers` of `configured` can sign now, `waiting` are the requests not yet begun.

    `protections` are those of a worker process: "on", or why not, by name. `engine` is what a software backend prefers to sign with;
    `engine_detail` why it is not a better one, `by_engine` how many requests each was given.
    """

    state: BackendState
    detail: str = ""
    workers: int = 0
    configured: int = 0
    waiting: int = 0
    protections: Mapping[str, str] = field(default_factory=dict)
    engine: str = ""
    engine_detail: str = ""
    by_engine: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CreatedKey:
    """`secret` is the PKCS#8 of a software key, to be sealed; None where the private half stays in a token."""

    spki_der: bytes
    backend_ref: str
    secret: Secret | None
    attributes: dict[str, str | bool]


OnStep = Callable[[str, int, int], None]


class SignRequest(NamedTuple):
    """`deadline` is a time of `time.monotonic`; `prehashed`: `message` is the digest, by the scheme's hash, of what is signed.

    `on_step` is there for requests that are traced: it hears of a step's name, begin and end (Unix microseconds). A tuple and no dataclass,
    since there is one for each signature.
    """

    record: KeyRecord
    scheme: SignatureScheme
    message: bytes
    deadline: float
    prehashed: bool = False
    on_step: OnStep | None = None

    def __repr__(self) -> str:
        """Without the message."""
        return f"SignRequest(key_id={self.record.key_id!r}, scheme={self.scheme.name}, deadline={self.deadline})"


# As the class' own call, in half the time.
new_request: Callable[[tuple[KeyRecord, SignatureScheme, bytes, float, bool, OnStep | None]], SignRequest] = partial(
    tuple.__new__, SignRequest
)
SignOutcome = bytes | KeyreeveError


class SignatureMismatch(Internal):
    """The backend signed, and the result does not verify with the key's public half: it is not released."""


class Backend(Protocol):
    @property
    def name(self) -> str: ...

    async def start(self) -> None:
        """Raises: TokenPinIncorrect only; any other fault shows in `health`, and the backend goes on trying."""

    async def close(self) -> None: ...

    def capabilities(self) -> Capabilities: ...

    def health(self) -> BackendHealth: ...

    async def create(self, key_id: KeyId, key_type: KeyType) -> CreatedKey:
        """Raises: KeyTypeNotSupported, Conflict, TokenUnavailable, StorageFull."""

    async def load(self, record: KeyRecord, secret: Secret | None) -> None:
        """Makes the key ready to sign. Raises: KeyNotFound, TokenUnavailable, SealedRecordInvalid, KeySelfTestFailed."""

    async def inspect(self, record: KeyRecord, secret: Secret | None) -> dict[str, str | bool]:
        """What the backend says now of the key, read anew. Raises: KeyNotFound, TokenUnavailable, SealedRecordInvalid."""

    def forget(self, key_id: KeyId) -> None:
        """Drops what is in memory of the key; a key that is not loaded is no error."""

    async def sign(self, requests: Sequence[SignRequest]) -> list[SignOutcome]:
        """One outcome per request, in their order; ECDSA signatures are DER. Raises nothing."""

    async def destroy(self, record: KeyRecord) -> None:
        """Ends the key; one that is gone already is no error. Raises: TokenUnavailable."""


class SealingToken(Protocol):
    """A token that encrypts with AES-256-GCM under a key of its own; `label` names the key, which is made on its first use."""

    async def encrypt(self, label: str, nonce: bytes, associated: bytes, data: bytes) -> bytes:
        """Raises: TokenUnavailable, StorageFull."""

    async def decrypt(self, label: str, nonce: bytes, associated: bytes, box: bytes) -> bytes:
        """Raises: SealedRecordInvalid, TokenUnavailable."""
