"""Software keys: in this process's memory while loaded, sealed outside it otherwise. Signs with `cryptography` in worker threads, which the
types of key share fairly: P-256 does not wait for a queue of RSA-4096.

Spec: RFC 8017 (RSA results are verified before release, against faults in CRT), RFC 6979 is not used: OpenSSL takes nonces from the
operating system's generator.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar, cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
)
from keyreeve_common.errors import (
    DeadlineExceeded,
    Internal,
    KeyNotFound,
    KeyreeveError,
    KeySelfTestFailed,
    SchemeNotSupported,
    SealedRecordInvalid,
)
from keyreeve_common.key_id import KeyId
from keyreeve_common.schemes import KeyFamily, KeyType, SignatureScheme, check_scheme_fits
from keyreeve_common.verification import hash_algorithm, rsa_padding

from keyreeve_keyserver.backends.lane_pool import LanePool
from keyreeve_keyserver.backends.ports import (
    BackendHealth,
    BackendState,
    Capabilities,
    CreatedKey,
    SignatureMismatch,
    SignOutcome,
    SignRequest,
)
from keyreeve_keyserver.domain.keys import Custody, KeyRecord
from keyreeve_keyserver.domain.secret import Secret

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
_GENERATORS: dict[KeyType, Callable[[], PrivateKey]] = {
    KeyType.EC_P256: lambda: ec.generate_private_key(ec.SECP256R1()),
    KeyType.EC_P384: lambda: ec.generate_private_key(ec.SECP384R1()),
    KeyType.ED25519: ed25519.Ed25519PrivateKey.generate,
    KeyType.RSA_2048: lambda: rsa.generate_private_key(65537, 2048),
    KeyType.RSA_3072: lambda: rsa.generate_private_key(65537, 3072),
    KeyType.RSA_4096: lambda: rsa.generate_private_key(65537, 4096),
}
# How many requests one thread takes at a time: enough to make the hand-over cheap, few enough to spread a batch over the threads. No piece takes
# much over two milliseconds, since that is what work of another type may have to wait for.
_CHUNKS = {
    KeyType.EC_P256: 32,
    KeyType.EC_P384: 8,
    KeyType.ED25519: 32,
    KeyType.RSA_2048: 4,
    KeyType.RSA_3072: 1,
    KeyType.RSA_4096: 1,
}
# Shares of processor time while all types have work: a flood of large keys leaves most of it to handshakes with small ones.
_WEIGHTS = {
    KeyType.EC_P256: 8.0,
    KeyType.EC_P384: 4.0,
    KeyType.ED25519: 8.0,
    KeyType.RSA_2048: 4.0,
    KeyType.RSA_3072: 1.0,
    KeyType.RSA_4096: 1.0,
}
_EXPRESS = (KeyType.EC_P256, KeyType.ED25519)
# What is true of every software key: it was in this process's memory from the first.
_ATTRIBUTES: dict[str, str | bool] = {
    "token": "",
    "object_label": "",
    "extractable": True,
    "sensitive": False,
    "generated_in_token": False,
}
_T = TypeVar("_T")
_Work = list[tuple[int, SignRequest]]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """`spki_der` stands in one sealed record only, so it says which record the key was loaded by."""

    spki_der: bytes
    key: PrivateKey = field(repr=False)


class SoftwareBackend:
    def __init__(self, name: str, *, threads: int = 0) -> None:
        self._name = name
        self._keys: dict[KeyId, _Loaded] = {}
        self._threads = threads or len(os.sched_getaffinity(0))
        self._lanes = LanePool(self._threads, _WEIGHTS, name=f"sign-{name}", express=_EXPRESS)
        # Making an RSA key takes seconds: not in a thread that signs.
        self._making = ThreadPoolExecutor(1, thread_name_prefix=f"make-{name}")
        # Nor in the one that loads keys, which handshakes wait for.
        self._loading = ThreadPoolExecutor(1, thread_name_prefix=f"load-{name}")
        self._waiting = 0

    @property
    def name(self) -> str:
        return self._name

    async def start(self) -> None:
        return

    async def close(self) -> None:
        self._keys.clear()
        for executor in (self._making, self._loading):
            executor.shutdown(wait=True, cancel_futures=True)
        await asyncio.to_thread(self._lanes.close)

    def capabilities(self) -> Capabilities:
        return Capabilities(Custody.SEALED_SOFTWARE, tuple(KeyType), tuple(sorted(SignatureScheme)))

    def health(self) -> BackendHealth:
        return BackendHealth(BackendState.UP, workers=self._threads, configured=self._threads, waiting=self._waiting)

    async def create(self, key_id: KeyId, key_type: KeyType) -> CreatedKey:
        executor = self._making if key_type.family is KeyFamily.RSA else self._loading
        key = await self._run(executor, _GENERATORS[key_type])
        pkcs8 = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        spki_der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return CreatedKey(spki_der, key_id, Secret(pkcs8), dict(_ATTRIBUTES))

    async def inspect(self, record: KeyRecord, secret: Secret | None) -> dict[str, str | bool]:
        return dict(_ATTRIBUTES)

    async def load(self, record: KeyRecord, secret: Secret | None) -> None:
        if not secret:
            raise SealedRecordInvalid("record of a software key holds no key")
        pkcs8 = secret.reveal()
        key = await self._run(
            self._loading, lambda: load_der_private_key(pkcs8, None, unsafe_skip_rsa_key_validation=True)
        )
        spki_der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if spki_der != record.spki_der:
            raise KeySelfTestFailed("the sealed key is not the one of the record's header")
        self._keys[record.key_id] = _Loaded(record.spki_der, cast("PrivateKey", key))

    def forget(self, key_id: KeyId) -> None:
        self._keys.pop(key_id, None)

    async def destroy(self, record: KeyRecord) -> None:
        """The sealed record is the only copy: who destroys the key erases that."""
        self.forget(record.key_id)

    async def sign(self, requests: Sequence[SignRequest]) -> list[SignOutcome]:
        outcomes: list[SignOutcome] = [Internal("request was not reached")] * len(requests)
        self._waiting += len(requests)
        try:
            jobs = [
                asyncio.wrap_future(self._lanes.submit(key_type, partial(self._sign_chunk, chunk)))
                for key_type, chunk in _chunks(requests)
            ]
            for done in await asyncio.gather(*jobs):
                for index, outcome in done:
                    outcomes[index] = outcome
        finally:
            self._waiting -= len(requests)
        return outcomes

    def _sign_chunk(self, chunk: _Work) -> list[tuple[int, SignOutcome]]:
        return [(index, self._sign_one(request)) for index, request in chunk]

    def _sign_one(self, request: SignRequest) -> SignOutcome:
        if time.monotonic() >= request.deadline:
            return DeadlineExceeded("deadline passed before the key was reached")
        loaded = self._keys.get(request.record.key_id)
        # Another record of this id may have been loaded since the request was judged: it was not judged by that one.
        if loaded is None or loaded.spki_der != request.record.spki_der:
            return KeyNotFound()
        try:
            check_scheme_fits(request.scheme, request.record.key_type)
            return _SIGNERS[request.record.key_type.family](loaded.key, request)
        except KeyreeveError as error:
            return error
        except InvalidSignature:
            return SignatureMismatch("the software key gave a signature that does not verify")
        except (ValueError, TypeError):
            return Internal("the software key failed to sign")

    @staticmethod
    async def _run(executor: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(executor, work)


def _chunks(requests: Sequence[SignRequest]) -> list[tuple[KeyType, _Work]]:
    """The requests by type of key, cut into the pieces that one thread signs at a time."""
    lanes: dict[KeyType, _Work] = {}
    for index, request in enumerate(requests):
        lanes.setdefault(request.record.key_type, []).append((index, request))
    return [
        (key_type, lane[at : at + _CHUNKS[key_type]])
        for key_type, lane in lanes.items()
        for at in range(0, len(lane), _CHUNKS[key_type])
    ]


def _hash(request: SignRequest) -> hashes.HashAlgorithm | Prehashed:
    return hash_algorithm(request.scheme, prehashed=request.prehashed)


def _sign_ec(key: PrivateKey, request: SignRequest) -> bytes:
    return cast("ec.EllipticCurvePrivateKey", key).sign(request.message, ec.ECDSA(_hash(request)))


def _sign_ed25519(key: PrivateKey, request: SignRequest) -> bytes:
    if request.prehashed:
        raise SchemeNotSupported("ed25519 takes the message whole, never a digest")
    return cast("ed25519.Ed25519PrivateKey", key).sign(request.message)


def _sign_rsa(key: PrivateKey, request: SignRequest) -> bytes:
    """Verified before release: a fault in one half of the CRT would give the key away."""
    private_key = cast("rsa.RSAPrivateKey", key)
    algorithm, form = _hash(request), rsa_padding(request.scheme)
    signature = private_key.sign(request.message, form, algorithm)
    private_key.public_key().verify(signature, request.message, form, algorithm)
    return signature


_SIGNERS: dict[KeyFamily, Callable[[PrivateKey, SignRequest], bytes]] = {
    KeyFamily.EC_P256: _sign_ec,
    KeyFamily.EC_P384: _sign_ec,
    KeyFamily.ED25519: _sign_ed25519,
    KeyFamily.RSA: _sign_rsa,
}
