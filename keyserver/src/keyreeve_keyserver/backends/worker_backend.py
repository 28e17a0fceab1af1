"""Keys that live elsewhere (a PKCS#11 token, Vault Transit), reached through worker processes: the signer never sees module, PIN or network.

What the kinds differ in is their worker program and its settings; requests, deadlines and the check before release are one.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import load_der_public_key
from keyreeve_common.errors import (
    Internal,
    KeyNotFound,
    KeyreeveError,
    KeyTypeNotSupported,
    SchemeNotSupported,
    SealedRecordInvalid,
    TokenUnavailable,
)
from keyreeve_common.key_id import KeyId
from keyreeve_common.schemes import KeyFamily, KeyType, SignatureScheme
from keyreeve_common.verification import verify_signature

from keyreeve_keyserver.backends import worker_frames as frames
from keyreeve_keyserver.backends.launch import WorkerSpec
from keyreeve_keyserver.backends.launcher_link import LauncherLink
from keyreeve_keyserver.backends.ports import (
    BackendHealth,
    BackendState,
    Capabilities,
    CreatedKey,
    SignatureMismatch,
    SignOutcome,
    SignRequest,
)
from keyreeve_keyserver.backends.worker_place import PoolPolicy
from keyreeve_keyserver.backends.worker_pool import WorkerPool
from keyreeve_keyserver.backends.worker_queue import Job, Lane
from keyreeve_keyserver.domain.keys import Custody, KeyRecord
from keyreeve_keyserver.domain.secret import Secret
from keyreeve_keyserver.domain.wrapped_key import MAX_BLOB_BYTES

WORKER_STEP = "backend.token"  # the span of a worker's call into its token or service
# Requests of one lane go to one worker in one question; all of a lane are of one key family.
_LANES = {
    KeyFamily.EC_P256: Lane(KeyFamily.EC_P256, most=32),
    KeyFamily.EC_P384: Lane(KeyFamily.EC_P384, most=32),
    KeyFamily.ED25519: Lane(KeyFamily.ED25519, most=32),
    KeyFamily.RSA: Lane(KeyFamily.RSA, most=8),
}
_REF_BYTES = 16
# One wrong result beside a right one of the same message gives the key away: of RSA by its CRT, of Ed25519 since its nonce is the message's.
_VERIFIED = (rsa.RSAPublicKey, ed25519.Ed25519PublicKey)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """`ref` stands in one sealed record only. `public_key` is there where results are verified, `wrapped` for a key outside the token."""

    ref: str
    public_key: PublicKeyTypes | None
    wrapped: bytes = field(repr=False)


class WorkerBackend:
    """`worker` says how to start its workers. Without a launcher in `start` it starts one for itself.

    `ref_form` says how a key's reference is written around its random part. `verifies_all`: ECDSA results too are verified before release.
    """

    def __init__(
        self,
        worker: WorkerSpec,
        *,
        custody: Custody,
        workers: int,
        policy: PoolPolicy,
        ref_form: str = "{}",
        verifies_all: bool = False,
        loads_wrapped: bool = False,
    ) -> None:
        self.worker = worker
        self._name = worker.backend
        self._custody = custody
        self._size = workers
        self._policy = policy
        self._ref_form = ref_form
        self._verifies_all = verifies_all
        self._loads_wrapped = loads_wrapped
        self._first_wrapped = asyncio.Lock()
        self._loaded: dict[KeyId, _Loaded] = {}
        self._launcher: LauncherLink | None = None
        self._started: WorkerPool | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def _pool(self) -> WorkerPool:
        if self._started is None:
            raise TokenUnavailable("the backend was not started")
        return self._started

    @property
    def worker_pids(self) -> tuple[int, ...]:
        return self._pool.pids

    async def start(self, launcher: LauncherLink | None = None) -> None:
        if launcher is None:
            launcher = self._launcher = await LauncherLink.start([self.worker])
        self._started = WorkerPool(self._name, launcher, workers=self._size, policy=self._policy)
        await self._started.start()

    async def close(self) -> None:
        self._loaded.clear()
        if self._started is not None:
            await self._started.close()
        if self._launcher is not None:
            self._launcher.close()

    def capabilities(self) -> Capabilities:
        offered = self._pool.description
        return Capabilities(
            self._custody,
            tuple(KeyType(name) for name in offered.get("key_types", ())),
            tuple(SignatureScheme(number) for number in offered.get("schemes", ())),
        )

    def health(self) -> BackendHealth:
        fault = self._pool.fault
        return BackendHealth(
            state=BackendState.UP if fault is None else BackendState.DOWN,
            detail=self._pool.remark if fault is None else fault.detail,
            workers=len(self._pool.pids),
            configured=self._pool.size,
            protections=cast("dict[str, str]", self._pool.description.get("protections", {})),
            waiting=self._pool.waiting,
        )

    async def create(self, key_id: KeyId, key_type: KeyType) -> CreatedKey:
        if self._pool.fault is None and key_type not in self.capabilities().key_types:
            raise KeyTypeNotSupported(f"backend {self._name} has no keys of type {key_type.value}")
        # Key ids are the front end's to choose; the reference is ours and never comes back, so that the record of a destroyed key
        # cannot be loaded over a later key of the same id.
        ref = self._ref_form.format(secrets.token_hex(_REF_BYTES))
        if self._custody is Custody.TOKEN_WRAPPED:
            async with self._first_wrapped:  # two workers must not both make the wrapping key
                answer = await self._done(frames.Create(ref, key_id, key_type))
        else:
            answer = await self._done(frames.Create(ref, key_id, key_type))
        try:
            wrapped = bytes.fromhex(cast("str", answer.get("wrapped", "")))
            spki_der = bytes.fromhex(cast("str", answer["spki_der"]))
            attributes = dict(cast("dict[str, str | bool]", answer["attributes"]))
        except (KeyError, ValueError, TypeError):
            raise Internal("the worker's answer to a creation cannot be read") from None
        return CreatedKey(spki_der, ref, Secret(wrapped) if wrapped else None, attributes)

    async def load(self, record: KeyRecord, secret: Secret | None) -> None:
        if secret and not self._loads_wrapped:
            raise SealedRecordInvalid("record of a token key holds a software key")
        wrapped = secret.reveal() if secret else b""
        if len(wrapped) > MAX_BLOB_BYTES:
            raise SealedRecordInvalid("record of a token key holds what is no wrapped key")
        found = await self._done(frames.Find(record.backend_ref, wrapped))
        if found.get("spki_der", record.spki_der.hex()) != record.spki_der.hex():
            raise SealedRecordInvalid("the key that is found under the record's reference is not the record's")
        public_key = load_der_public_key(record.spki_der)
        verified = self._verifies_all or isinstance(public_key, _VERIFIED)
        self._loaded[record.key_id] = _Loaded(record.backend_ref, public_key if verified else None, wrapped)

    async def inspect(self, record: KeyRecord, secret: Secret | None) -> dict[str, str | bool]:
        answer = await self._done(frames.Inspect(record.backend_ref, secret.reveal() if secret else b""))
        attributes = answer.get("attributes")
        if not isinstance(attributes, dict) or not all(isinstance(each, str | bool) for each in attributes.values()):
            raise Internal("the worker's answer about a key cannot be read")
        return attributes

    def forget(self, key_id: KeyId) -> None:
        self._loaded.pop(key_id, None)

    async def destroy(self, record: KeyRecord) -> None:
        self.forget(record.key_id)
        await self._done(frames.Destroy(record.backend_ref))
        if self._loads_wrapped:
            await self._pool.tell_all(frames.Destroy(record.backend_ref), within=2 * self._policy.call_timeout)

    async def sign(self, requests: Sequence[SignRequest]) -> list[SignOutcome]:
        outcomes: list[SignOutcome] = [KeyNotFound()] * len(requests)
        asked: list[tuple[Job, list[int]]] = []
        for lane, indexes in self._lanes(requests, outcomes).items():
            size = self._pool.share(lane, len(indexes))
            for at in range(0, len(indexes), size):
                self._ask(requests, outcomes, asked, lane, indexes[at : at + size])
        for job, indexes in asked:
            self._take(await job.answer, requests, outcomes, indexes)
            _tell([requests[index] for index in indexes], job.taken_us)
        return outcomes

    def _lanes(self, requests: Sequence[SignRequest], outcomes: list[SignOutcome]) -> dict[Lane, list[int]]:
        lanes: dict[Lane, list[int]] = {}
        for index, request in enumerate(requests):
            if _is_digest_of_ed25519(request):
                outcomes[index] = SchemeNotSupported(
                    f"scheme {request.scheme.iana_name} takes the message whole, never a digest"
                )
            elif self._loaded_by(request) is None:
                outcomes[index] = KeyNotFound()
            else:
                lanes.setdefault(self._lane_of(request), []).append(index)
        return lanes

    def _lane_of(self, request: SignRequest) -> Lane:
        return _LANES[request.record.key_type.family]

    def _ask(
        self,
        requests: Sequence[SignRequest],
        outcomes: list[SignOutcome],
        asked: list[tuple[Job, list[int]]],
        lane: Lane,
        indexes: list[int],
    ) -> None:
        items, deadline = [], 0.0
        for index in indexes:
            request = requests[index]
            deadline = max(deadline, request.deadline)
            items.append(
                frames.TokenSignItem(
                    request.record.backend_ref,
                    request.scheme,
                    max(int(request.deadline * 1_000_000), 0),
                    request.message,
                    request.prehashed,
                    self._wrapped_of(request),
                )
            )
        try:
            asked.append((self._pool.submit(frames.TokenSign(tuple(items)), deadline=deadline, lane=lane), indexes))
        except KeyreeveError as error:
            for index in indexes:
                outcomes[index] = error

    def _take(
        self, answer: frames.Answer, requests: Sequence[SignRequest], outcomes: list[SignOutcome], indexes: list[int]
    ) -> None:
        if isinstance(answer, frames.TokenSigned) and len(answer.outcomes) == len(indexes):
            for index, outcome in zip(indexes, answer.outcomes, strict=True):
                outcomes[index] = self._verified(requests[index], outcome)
            return
        error = (
            answer.error
            if isinstance(answer, frames.Failed)
            else TokenUnavailable("the worker gave an answer to another question")
        )
        for index in indexes:
            outcomes[index] = error

    def _loaded_by(self, request: SignRequest) -> _Loaded | None:
        """The key, if it is the one of the record that the request was judged by."""
        loaded = self._loaded.get(request.record.key_id)
        return loaded if loaded is not None and loaded.ref == request.record.backend_ref else None

    def _wrapped_of(self, request: SignRequest) -> bytes:
        """Nothing for a key that rests in the token, or was forgotten meanwhile: then the worker does not find it either."""
        loaded = self._loaded_by(request)
        return loaded.wrapped if loaded is not None else b""

    def _verified(self, request: SignRequest, outcome: SignOutcome) -> SignOutcome:
        """RSA and Ed25519 results are verified before release, and all of a service; a key that was forgotten meanwhile releases nothing."""
        if isinstance(outcome, KeyreeveError):
            return outcome
        loaded = self._loaded_by(request)
        if loaded is None:
            return KeyNotFound()
        public_key = loaded.public_key
        if public_key is None:
            return outcome
        try:
            verify_signature(
                public_key, request.scheme, request.message, signature=outcome, prehashed=request.prehashed
            )
        except KeyreeveError:
            return SignatureMismatch("the token gave a signature that does not verify")
        return outcome

    async def encrypt(self, label: str, nonce: bytes, associated: bytes, data: bytes) -> bytes:
        return await self._box(frames.Box(decrypt=False, label=label, nonce=nonce, associated=associated, data=data))

    async def decrypt(self, label: str, nonce: bytes, associated: bytes, box: bytes) -> bytes:
        return await self._box(frames.Box(decrypt=True, label=label, nonce=nonce, associated=associated, data=box))

    async def _box(self, box: frames.Box) -> bytes:
        answer = await self._pool.ask(box, within=self._policy.call_timeout)
        if not isinstance(answer, frames.Boxed):
            raise Internal("the worker gave an answer to another question")
        return answer.data

    async def _done(self, question: frames.Question) -> dict[str, object]:
        answer = await self._pool.ask(question, within=self._policy.call_timeout)
        if not isinstance(answer, frames.Done):
            raise Internal("the worker gave an answer to another question")
        return answer.answer


def _tell(requests: list[SignRequest], taken_us: int) -> None:
    """Tells the requests that are traced when their worker had them."""
    steps = [request.on_step for request in requests if request.on_step is not None]
    if steps and taken_us:
        now_us = time.time_ns() // 1000
        for on_step in steps:
            on_step(WORKER_STEP, min(taken_us, now_us), now_us)


def _is_digest_of_ed25519(request: SignRequest) -> bool:
    """Some tokens would sign it, and what they sign is another algorithm (Ed25519ph)."""
    return request.prehashed and not request.scheme.facts.hash_name
