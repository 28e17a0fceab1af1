"""Signs on a QAT card, through OpenSSL's `qatprovider` in ASYNC jobs (`keyreeve_engine._asyncsign`, a helper thread in C).

What the card does not sign, in time and right, is left to the next engine: a card that is missing, full, stuck or broken costs time, never a
signature. Faults in a row open a breaker; then the next engines have the work until a probe comes back. A signature that does not verify ends
the card's service until a restart. That the card signs is seen, not believed: a provider that finds none signs by itself, without
pausing its job, and that counts as a fault too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from keyreeve_common.errors import DeadlineExceeded, KeyreeveError, SealedRecordInvalid
from keyreeve_common.schemes import DEFAULT_SCHEMES, KeyType
from keyreeve_common.telemetry import log, log_error, log_warning
from keyreeve_common.verification import verify_signature

from keyreeve_keyserver.backends.engines import (
    EngineHealth,
    EngineUnusable,
    Handle,
    KeyUnsuited,
    Work,
)
from keyreeve_keyserver.backends.openssl_engine import PrivateKey
from keyreeve_keyserver.backends.ports import SignOutcome
from keyreeve_keyserver.backends.qat_devices import find_obstacle
from keyreeve_keyserver.domain.breaker import Breaker, BreakerPolicy, BreakerState, Ticket

try:
    from keyreeve_engine import asyncsign
except ImportError:  # the extra `engine` is not installed
    asyncsign = None

DEFAULT_PROVIDER = "qatprovider"
# What goes to the card, and how many of them a thread hands over at once. P-256 stays: a card's signature costs its round trip over the bus, and
# lanes or OpenSSL make one in 4 to 17 microseconds of a core; Intel's own default does the same. Ed25519 the provider does not offer.
PIECES: Mapping[KeyType, int] = {
    KeyType.EC_P384: 64,
    KeyType.RSA_2048: 64,
    KeyType.RSA_3072: 64,
    KeyType.RSA_4096: 64,
}
# A card answers in well under a millisecond, and with its queue full in some. What takes this long is a fault; the next engine still has time.
CARD_TIMEOUT_S = 0.25
CLOSE_TIMEOUT_S = 2.0
START_TIMEOUT_S = 30.0  # a card is reset and its firmware started meanwhile
JOBS = 128
_PREHASHED = 0x10000
_PROBE = b"keyreeve QAT self-test"
_PROVES = {
    KeyType.RSA_2048: (KeyType.RSA_2048, KeyType.RSA_3072, KeyType.RSA_4096),
    KeyType.EC_P384: (KeyType.EC_P384,),
}
_MAKERS: Mapping[KeyType, Callable[[], PrivateKey]] = {
    KeyType.RSA_2048: lambda: rsa.generate_private_key(65537, 2048),
    KeyType.EC_P384: lambda: ec.generate_private_key(ec.SECP384R1()),
}


class AsyncSigner(Protocol):
    """What this engine uses of `keyreeve_engine._asyncsign.Engine`."""

    def load(self, pkcs8: bytes, /) -> Any: ...
    def sign(
        self, keys: Sequence[Any], messages: Sequence[bytes], schemes: Sequence[int], timeout: float, /
    ) -> tuple[list[bytes | int], int]: ...
    def state(self) -> dict[str, int]: ...
    def close(self, timeout: float, /) -> bool: ...


class AsyncModule(Protocol):
    """What this engine uses of `keyreeve_engine._asyncsign`."""

    NotOffered: type[Exception]
    BAD_REQUEST: int
    BUSY: int
    CLOSED: int
    LATE: int
    MISMATCH: int


def open_qat(provider: str = DEFAULT_PROVIDER, *, root: Path = Path("/")) -> QatEngine:
    """`provider`: its name, or the path of its file. Raises: EngineUnusable, which says which step fails and what to do."""
    if asyncsign is None:
        raise EngineUnusable("keyreeve-engine is not installed: install keyreeve-keyserver[engine]")
    name, directory = _split(provider)
    try:
        core = asyncsign.open(name, directory, JOBS, START_TIMEOUT_S)
    except asyncsign.Unusable as failed:
        raise EngineUnusable(f"provider: {failed}{_host(root)}") from None
    engine = QatEngine(asyncsign, core)
    try:
        engine.test()
    except EngineUnusable as failed:
        engine.close()
        raise EngineUnusable(f"self-test: {failed}{_host(root)}") from None
    return engine


def _split(provider: str) -> tuple[str, str | None]:
    path = Path(provider)
    return (path.name.removesuffix(".so"), str(path.parent)) if path.is_absolute() else (provider, None)


def _host(root: Path) -> str:
    """What of the host explains it, for the end of an error."""
    obstacle = find_obstacle(root)
    return f" ({obstacle}; docs/qat.md)" if obstacle else " (docs/qat.md)"


class QatEngine:
    name = "qat"

    def __init__(
        self,
        module: AsyncModule,
        core: AsyncSigner,
        *,
        policy: BreakerPolicy = BreakerPolicy(),  # noqa: B008 - frozen
        timeout_s: float = CARD_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._module = module
        self._core = core
        self._said = {
            module.LATE: "no answer in time",
            module.BUSY: "its queue is full, or everything in it hangs",
            module.CLOSED: "closed",
            module.MISMATCH: "a signature that does not verify",
        }
        self._key_types = frozenset(PIECES)
        self._timeout_s = timeout_s
        self._clock = clock
        self._lock = threading.Lock()  # the breaker is asked by every signing thread
        self._breaker = Breaker(policy)
        self._last = ""
        self._condemned = ""

    def test(self) -> None:
        """Leaves the types that the card proves to sign. Raises: EngineUnusable where there are none."""
        reasons = {key_type: self._fails(key_type) for key_type in _PROVES}
        self._key_types = frozenset(
            proven for key_type, reason in reasons.items() if not reason for proven in _PROVES[key_type]
        )
        said = "; ".join(f"{key_type.value}: {reason}" for key_type, reason in reasons.items() if reason)
        if not self._key_types:
            raise EngineUnusable(said)
        log("qat_ready", key_types=",".join(sorted(self._key_types)), left_out=said)

    def _fails(self, key_type: KeyType) -> str:
        """Why the card does not sign with keys of this type; "" where it does."""
        key, scheme = _MAKERS[key_type](), DEFAULT_SCHEMES[key_type.family]
        pkcs8 = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        try:
            handle = self.load(key_type, pkcs8)
            (outcome,), with_card = self._core.sign([handle], [_PROBE], [int(scheme)], CLOSE_TIMEOUT_S)
            if not isinstance(outcome, bytes):
                return self._said.get(outcome, "the provider failed to sign")
            verify_signature(key.public_key(), scheme, _PROBE, signature=outcome)
        except KeyUnsuited as unsuited:
            return str(unsuited)
        except KeyreeveError as error:
            return error.detail
        return "" if with_card else "the provider signs without a card"

    def supports(self, key_type: KeyType) -> bool:
        return key_type in self._key_types

    def piece(self, key_type: KeyType, waiting: int) -> int:
        with self._lock:
            rests = bool(self._condemned) or bool(self._breaker.retry_after(self._clock()))
        return 0 if rests or key_type not in self._key_types else min(waiting, PIECES[key_type])

    def load(self, key_type: KeyType, pkcs8: bytes) -> Handle:
        try:
            return Handle(self._core.load(pkcs8))
        except self._module.NotOffered as refused:
            raise KeyUnsuited(str(refused)) from None
        except ValueError:
            raise SealedRecordInvalid("the sealed key is not PKCS#8") from None

    def sign(self, key_type: KeyType, work: Sequence[Work]) -> list[SignOutcome | None]:
        ticket = self._admit()
        if ticket is None:
            return [None] * len(work)
        patience_s = min(self._timeout_s, min(request.deadline for _, request in work) - self._clock())
        outcomes, with_card = self._core.sign(
            [handle for handle, _ in work],
            [request.message for _, request in work],
            [int(request.scheme) | (_PREHASHED if request.prehashed else 0) for _, request in work],
            max(patience_s, 0.0),
        )
        self._judge(ticket, outcomes, with_card, in_a_hurry=patience_s < self._timeout_s)
        now = self._clock()
        return [
            _outcome(outcome, request.deadline <= now) for (_, request), outcome in zip(work, outcomes, strict=True)
        ]

    def health(self) -> EngineHealth:
        with self._lock:
            if self._condemned:
                return EngineHealth(False, self._condemned)
            if self._breaker.state is BreakerState.CLOSED:
                return EngineHealth(True)
            return EngineHealth(False, f"the card rests after faults in a row; the last: {self._last}")

    def close(self) -> None:
        if not self._core.close(CLOSE_TIMEOUT_S):
            log_warning("qat_closed_with_work", **self._core.state())

    def _admit(self) -> Ticket | None:
        with self._lock:
            return None if self._condemned else self._breaker.admit(self._clock())

    def _judge(self, ticket: Ticket, outcomes: Sequence[bytes | int], with_card: int, *, in_a_hurry: bool) -> None:
        good = sum(isinstance(outcome, bytes) for outcome in outcomes)
        faults = [
            outcome for outcome in outcomes if not isinstance(outcome, bytes) and outcome != self._module.BAD_REQUEST
        ]
        with self._lock:
            if self._module.MISMATCH in faults:
                self._condemn()
            elif faults and in_a_hurry and all(outcome == self._module.LATE for outcome in faults):
                self._breaker.abandoned(ticket)  # it had less than its time
            elif faults:
                self._failed(ticket, self._said.get(faults[0], "the provider failed to sign"))
            elif with_card < good:
                self._failed(ticket, "the provider signs without a card")
            elif good:
                self._succeeded(ticket)
            else:
                self._breaker.abandoned(ticket)

    def _condemn(self) -> None:
        if not self._condemned:
            self._condemned = "the card gave a wrong signature, which was not released: not used until a restart"
            log_error("qat_signature_wrong", engine=self.name, detail=self._condemned)

    def _failed(self, ticket: Ticket, reason: str) -> None:
        before, self._last = self._breaker.state, reason
        self._breaker.failed(ticket, self._clock())
        if self._breaker.state is BreakerState.OPEN and before is not BreakerState.OPEN:
            pause_s = self._breaker.retry_after(self._clock()).total_seconds()
            log_warning("breaker_opened", engine=self.name, error=reason, retry_after_s=round(pause_s, 3))

    def _succeeded(self, ticket: Ticket) -> None:
        before = self._breaker.state
        self._breaker.succeeded(ticket)
        if self._breaker.state is BreakerState.CLOSED and before is not BreakerState.CLOSED:
            log("breaker_closed", engine=self.name)


def _outcome(outcome: bytes | int, is_over: bool) -> SignOutcome | None:
    """None leaves it to the next engine, which has no use for what is over."""
    if isinstance(outcome, bytes):
        return outcome
    return DeadlineExceeded("deadline passed while the card had the request") if is_over else None
