"""The key cluster over gRPC: the port `keyreeve_ca.ports.KeyCluster`. Each call goes to the first replica that is available.

Every call here may be repeated safely: keys are made by request id, grants and states are set, a second signature harms nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

import grpc
from keyreeve_client.channel import SvidFiles, open_sync_channel, open_sync_local_channel
from keyreeve_client.key_admin import ClusterKey, Grant, KeyAdminClient, KeyServerHealth, KeySpec
from keyreeve_client.remote_key import RemoteKey, RemoteSigner, make_remote_key
from keyreeve_client.sign_batch import sign_batch
from keyreeve_client.sign_client import SignClient
from keyreeve_common.bundle import Bundle
from keyreeve_common.errors import KeyreeveError, Unavailable
from keyreeve_common.identity import SpiffeId
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.telemetry import log_warning

R = TypeVar("R")
SIGN_DEADLINE = timedelta(seconds=15)
ADMIN_TIMEOUT = timedelta(seconds=15)
_Stamp = tuple[tuple[int, int, int], ...]


@dataclass
class Replica:
    """One key server. `files` is None for its local admin socket; else its channel follows our own SVID."""

    name: str
    open: Callable[[], grpc.Channel]
    files: SvidFiles | None = None
    _channel: grpc.Channel | None = None
    _retired: grpc.Channel | None = None
    _stamp: _Stamp = ()
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def channel(self) -> grpc.Channel:
        """Raises: FailedPrecondition, SvidInvalid when our own SVID cannot be used."""
        with self._lock:
            stamp = self.files.stamp() if self.files else ()
            if self._channel is None or stamp != self._stamp:
                self._replace(stamp)
            assert self._channel is not None  # noqa: S101 - _replace sets it or raises
            return self._channel

    def _replace(self, stamp: _Stamp) -> None:
        try:
            fresh = self.open()
        except KeyreeveError as error:
            if self._channel is None:
                raise
            log_warning("svid_reload_failed", target=self.name, detail=error.detail)
            return
        if self._retired is not None:
            self._retired.close()
        # The one before serves the calls that began on it until the next renewal.
        self._retired, self._channel, self._stamp = self._channel, fresh, stamp

    def close(self) -> None:
        for channel in (self._channel, self._retired):
            if channel is not None:
                channel.close()
        self._channel = self._retired = None

    @property
    def admin(self) -> KeyAdminClient:
        return KeyAdminClient(self.channel(), timeout=ADMIN_TIMEOUT)

    @property
    def signing(self) -> SignClient:
        return SignClient(self.channel())

    def check_health(self) -> KeyServerHealth:
        return self.admin.check_health()

    def get_csr(self, spiffe_id: SpiffeId) -> bytes:
        return self.admin.get_csr(spiffe_id)

    def install_svid(self, chain_der: Sequence[bytes], bundle: Bundle) -> datetime:
        return self.admin.install_svid(chain_der, bundle.to_proto())


def remote_replica(address: str, files: SvidFiles, server_id: SpiffeId) -> Replica:
    """A key server by mutual TLS, as whoever the SVID in `files` says we are."""
    return Replica(address, lambda: open_sync_channel(address, files.read(), server_id=server_id), files)


def local_replica(socket: Path) -> Replica:
    """A key server by its local admin socket: whoever may open it is an operator."""
    return Replica(f"unix:{socket}", lambda: open_sync_local_channel(socket))


class GrpcKeyCluster:
    """Safe to share among threads."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = tuple(replicas)

    def replicas(self) -> Sequence[Replica]:
        return self._replicas

    def create_key(self, spec: KeySpec) -> ClusterKey:
        return self._first(lambda replica: replica.admin.create_key(spec))

    def get_key(self, key_id: str) -> ClusterKey:
        return self._first(lambda replica: replica.admin.get_key(key_id))

    def disable_key(self, key_id: str) -> None:
        self._first(lambda replica: replica.admin.disable_key(key_id))

    def enable_key(self, key_id: str) -> None:
        self._first(lambda replica: replica.admin.enable_key(key_id))

    def rotate_key(self, key_id: str, *, request_id: str) -> ClusterKey:
        return self._first(lambda replica: replica.admin.rotate_key(key_id, request_id=request_id))

    def retire_key(self, key_id: str, *, at: datetime) -> None:
        self._first(lambda replica: replica.admin.retire_key(key_id, at=at))

    def create_grant(
        self, key_id: str, holder: SpiffeId, *, purposes: frozenset[Purpose], expires_at: datetime | None
    ) -> Grant:
        return self._first(
            lambda replica: replica.admin.create_grant(key_id, holder, purposes=purposes, expires_at=expires_at)
        )

    def extend_grant(self, key_id: str, holder: SpiffeId, *, expires_at: datetime) -> Grant:
        return self._first(lambda replica: replica.admin.extend_grant(key_id, holder, expires_at=expires_at))

    def revoke_grant(self, key_id: str, holder: SpiffeId) -> Grant:
        return self._first(lambda replica: replica.admin.revoke_grant(key_id, holder))

    def list_grants(self, *, key_id: str = "", holder: SpiffeId | None = None) -> list[Grant]:
        return self._first(lambda replica: list(replica.admin.list_grants(key_id=key_id, holder=holder)))

    def private_key(self, key_id: str, spki_der: bytes, *, purpose: Purpose = Purpose.X509_CERTIFICATE) -> RemoteKey:
        return make_remote_key(spki_der, RemoteSigner(key_id, purpose, self._sign))

    def sign_many(
        self, key_id: str, scheme: SignatureScheme, purpose: Purpose, *, messages: Sequence[bytes]
    ) -> list[bytes | KeyreeveError]:
        """What one replica could not answer is asked of the next."""
        results: list[bytes | KeyreeveError] = [Unavailable("no key server is configured")] * len(messages)
        open_numbers = list(range(len(messages)))
        for replica in self._replicas:
            if not open_numbers:
                break
            asked = [messages[number] for number in open_numbers]
            for number, result in zip(
                open_numbers, _sign_at(replica, key_id, scheme, purpose, messages=asked), strict=True
            ):
                results[number] = result
            open_numbers = [number for number in open_numbers if isinstance(results[number], Unavailable)]
        return results

    def close(self) -> None:
        for replica in self._replicas:
            replica.close()

    def _sign(self, key_id: str, scheme: SignatureScheme, purpose: Purpose, message: bytes) -> bytes:
        return self._first(
            lambda replica: replica.signing.sign(key_id, scheme, purpose, message=message, deadline=SIGN_DEADLINE)
        )

    def _first(self, call: Callable[[Replica], R]) -> R:
        failure: KeyreeveError = Unavailable("no key server is configured")
        for replica in self._replicas:
            try:
                return call(replica)
            except Unavailable as error:
                failure = error
        raise failure


def _sign_at(
    replica: Replica, key_id: str, scheme: SignatureScheme, purpose: Purpose, *, messages: Sequence[bytes]
) -> Sequence[bytes | KeyreeveError]:
    try:
        channel = replica.channel()
    except KeyreeveError as error:  # our own SVID cannot be used
        return [error] * len(messages)
    if len(messages) == 1:  # a stream costs more than it spares
        return [_signed(SignClient(channel), key_id, scheme, purpose, messages[0])]
    return sign_batch(channel, key_id, scheme, purpose, messages=messages, deadline=SIGN_DEADLINE)


def _signed(
    client: SignClient, key_id: str, scheme: SignatureScheme, purpose: Purpose, message: bytes
) -> bytes | KeyreeveError:
    try:
        return client.sign(key_id, scheme, purpose, message=message, deadline=SIGN_DEADLINE)
    except KeyreeveError as error:
        return error
