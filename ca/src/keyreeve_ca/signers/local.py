"""A key cluster in this process: for development and tests only, since its keys are in the CA's own memory.

It behaves as the key server does at its edge (idempotent creation by request id, grants that stay revoked, states), under the same contract
suite. `ThrowAwayKeys` are the keys of lint certificates: they sign nothing that leaves the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keyreeve_client.key_admin import ClusterKey, Grant, KeyServerHealth, KeySpec, KeyState
from keyreeve_client.remote_key import RemoteKey, RemoteSigner, make_remote_key
from keyreeve_common.bundle import Bundle
from keyreeve_common.errors import (
    Conflict,
    FailedPrecondition,
    InvalidRequest,
    KeyDisabled,
    KeyNotFound,
    KeyreeveError,
    NotFound,
)
from keyreeve_common.identity import SpiffeId
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import HASHES, KeyFamily, KeyType, SignatureScheme
from keyreeve_common.verification import rsa_padding


def generate_key(key_type: KeyType) -> Any:
    match key_type.family:
        case KeyFamily.EC_P256:
            return ec.generate_private_key(ec.SECP256R1())
        case KeyFamily.EC_P384:
            return ec.generate_private_key(ec.SECP384R1())
        case KeyFamily.ED25519:
            return ed25519.Ed25519PrivateKey.generate()
        case KeyFamily.RSA:
            return rsa.generate_private_key(65537, key_type.rsa_bits)


class ThrowAwayKeys:
    """One key of each type for lint certificates, made at first use."""

    def __init__(self) -> None:
        self._keys: dict[KeyType, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, key_type: KeyType) -> Any:
        with self._lock:
            if key_type not in self._keys:
                self._keys[key_type] = generate_key(key_type)
            return self._keys[key_type]


@dataclass
class _Stored:
    spec: KeySpec
    key: ClusterKey
    private_key: Any = field(repr=False)


class InMemoryKeyCluster:
    """The port `keyreeve_ca.ports.KeyCluster`."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._keys: dict[str, _Stored] = {}
        self._by_request: dict[str, str] = {}
        self._grants: dict[tuple[str, str], Grant] = {}
        self._lock = threading.RLock()
        self.successors: dict[str, str] = {}
        self.retirements: dict[str, datetime] = {}  # told only: nothing here runs by itself

    def replicas(self) -> Sequence[InMemoryKeyServer]:
        return ()

    def create_key(self, spec: KeySpec) -> ClusterKey:
        with self._lock:
            known = self._by_request.get(spec.request_id)
            if known is not None:
                if self._keys[known].spec != spec:
                    raise Conflict("request_id was used for another key")
                return self._keys[known].key
            key_id = KeyId(f"local-{len(self._keys) + 1}")
            private_key = generate_key(spec.key_type)
            spki = private_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            key = ClusterKey(
                key_id, spec.key_type, spec.role, spec.purposes, KeyState.ENABLED, spki, spec.backend, spec.label
            )
            self._keys[key_id] = _Stored(spec, key, private_key)
            self._by_request[spec.request_id] = key_id
            return key

    def get_key(self, key_id: str) -> ClusterKey:
        with self._lock:
            return self._stored(key_id).key

    def disable_key(self, key_id: str) -> None:
        self._set_state(key_id, KeyState.DISABLED)

    def enable_key(self, key_id: str) -> None:
        self._set_state(key_id, KeyState.ENABLED)

    def rotate_key(self, key_id: str, *, request_id: str) -> ClusterKey:
        with self._lock:
            before = self._stored(key_id)
            if request_id not in self._by_request and key_id in self.successors:
                raise Conflict("the key is rotated by another request")
            if request_id not in self._by_request and before.key.state is not KeyState.ENABLED:
                raise FailedPrecondition("only an enabled key is rotated")
            fresh = self.create_key(replace(before.spec, request_id=request_id))
            if self.successors.setdefault(key_id, fresh.key_id) == fresh.key_id:
                for (key, holder), grant in list(self._grants.items()):
                    if key == key_id:
                        self._grants.setdefault((fresh.key_id, holder), replace(grant, key_id=fresh.key_id))
            return fresh

    def retire_key(self, key_id: str, *, at: datetime) -> None:
        with self._lock:
            if self._stored(key_id).key.state is not KeyState.ENABLED:
                raise FailedPrecondition("only an enabled key is retired")
            self.retirements[key_id] = at

    def destroy_key(self, key_id: str) -> None:
        self._set_state(key_id, KeyState.DESTROYED)

    def create_grant(
        self, key_id: str, holder: SpiffeId, *, purposes: frozenset[Purpose], expires_at: datetime | None
    ) -> Grant:
        now = self._clock()
        with self._lock:
            if not purposes or not purposes <= self._stored(key_id).key.purposes:
                raise InvalidRequest("the key does not have these purposes")
            if expires_at is not None and expires_at <= now:
                raise InvalidRequest("expires_at is not in the future")
            grant = Grant(KeyId(key_id), str(holder), purposes, expires_at, now)
            self._grants[key_id, str(holder)] = grant
            return grant

    def extend_grant(self, key_id: str, holder: SpiffeId, *, expires_at: datetime) -> Grant:
        with self._lock:
            grant = self._grant(key_id, holder)
            if grant.is_revoked or (grant.expires_at is not None and grant.expires_at <= self._clock()):
                raise FailedPrecondition("the grant is revoked or has expired; create it again")
            self._grants[key_id, str(holder)] = replace(grant, expires_at=expires_at)
            return self._grants[key_id, str(holder)]

    def revoke_grant(self, key_id: str, holder: SpiffeId) -> Grant:
        with self._lock:
            grant = self._grant(key_id, holder)
            if not grant.is_revoked:
                self._grants[key_id, str(holder)] = replace(grant, revoked_at=self._clock())
            return self._grants[key_id, str(holder)]

    def list_grants(self, *, key_id: str = "", holder: SpiffeId | None = None) -> list[Grant]:
        with self._lock:
            return [
                grant
                for (key, who), grant in sorted(self._grants.items())
                if key_id in ("", key) and (holder is None or str(holder) == who)
            ]

    def private_key(self, key_id: str, spki_der: bytes, *, purpose: Purpose = Purpose.X509_CERTIFICATE) -> RemoteKey:
        return make_remote_key(spki_der, RemoteSigner(key_id, purpose, self.sign))

    def sign_many(
        self, key_id: str, scheme: SignatureScheme, purpose: Purpose, *, messages: Sequence[bytes]
    ) -> list[bytes | KeyreeveError]:
        return [self._signed(key_id, scheme, purpose, message) for message in messages]

    def _signed(self, key_id: str, scheme: SignatureScheme, purpose: Purpose, message: bytes) -> bytes | KeyreeveError:
        try:
            return self.sign(key_id, scheme, purpose, message)
        except KeyreeveError as error:
            return error

    def sign(self, key_id: str, scheme: SignatureScheme, purpose: Purpose, message: bytes) -> bytes:
        stored = self._stored(key_id)
        if stored.key.state is not KeyState.ENABLED:
            raise KeyDisabled("the key is disabled")
        if purpose not in stored.key.purposes:
            raise InvalidRequest("the key does not have this purpose")
        facts = scheme.facts
        if facts.family is KeyFamily.ED25519:
            return bytes(stored.private_key.sign(message))
        chosen = HASHES[facts.hash_name]()
        if facts.family is KeyFamily.RSA:
            return bytes(stored.private_key.sign(message, rsa_padding(scheme), chosen))
        return bytes(stored.private_key.sign(message, ec.ECDSA(chosen)))

    def _set_state(self, key_id: str, state: KeyState) -> None:
        with self._lock:
            stored = self._stored(key_id)
            if stored.key.state is KeyState.DESTROYED and state is not KeyState.DESTROYED:
                raise FailedPrecondition("the key is destroyed")
            stored.key = replace(stored.key, state=state)

    def _stored(self, key_id: str) -> _Stored:
        if key_id not in self._keys:
            raise KeyNotFound
        return self._keys[key_id]

    def _grant(self, key_id: str, holder: SpiffeId) -> Grant:
        if (key_id, str(holder)) not in self._grants:
            raise NotFound("no such grant")
        return self._grants[key_id, str(holder)]


class InMemoryKeyServer:
    """The own identity of a key server in this process: it keeps what is installed."""

    def __init__(self, name: str, csr_of: Callable[[SpiffeId], bytes]) -> None:
        self._name = name
        self._csr_of = csr_of
        self.not_after: datetime | None = None

    @property
    def name(self) -> str:
        return self._name

    def check_health(self) -> KeyServerHealth:
        return KeyServerHealth(True, "local", "", self.not_after)

    def get_csr(self, spiffe_id: SpiffeId) -> bytes:
        return self._csr_of(spiffe_id)

    def install_svid(self, chain_der: Sequence[bytes], bundle: Bundle) -> datetime:
        self.not_after = x509.load_der_x509_certificate(chain_der[0]).not_valid_after_utc
        return self.not_after
