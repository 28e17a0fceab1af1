"""gRPC channels to SPIFFE services: mutual TLS with X.509-SVIDs, and local Unix sockets.

A gRPC client can check only DNS names, so the server's SPIFFE ID is checked through the DNS name that stands for it (`tls_name_of`): the key
cluster signs that name into certificates of that SPIFFE ID and no other. An SVID that was renewed needs a new channel; `ReloadingChannel`
makes it when the files change.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from keyreeve_common.errors import FailedPrecondition, KeyreeveError, SvidInvalid
from keyreeve_common.grpc_edge import KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS, MAX_MESSAGE_BYTES
from keyreeve_common.identity import SpiffeId
from keyreeve_common.telemetry import log, log_warning
from keyreeve_common.x509_svid import load_chain_pem, tls_name_of

CLOSE_GRACE_SECONDS = 10.0
_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),  # a renewed SVID must not reuse the connection of the old one
    ("grpc.enable_retries", 0),  # callers know what may be repeated
)
# Setting a keepalive at all also sets TCP_USER_TIMEOUT: a peer that does not acknowledge data is given up after `keepalive_timeout_ms`.
_PING_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),  # what a ping is waited for; 60 seconds when left alone
    ("grpc.http2.max_pings_without_data", 0),  # else the third ping of a stream that only listens is never sent
)


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """Who we are, and whom we trust. Without key and chain we are nobody (a node that has no SVID yet)."""

    bundle_pem: bytes
    chain_pem: bytes | None = None
    key_pem: bytes | None = field(default=None, repr=False)

    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            root_certificates=self.bundle_pem, private_key=self.key_pem, certificate_chain=self.chain_pem
        )


@dataclass(frozen=True, slots=True)
class SvidFiles:
    """Where a process's own SVID and its bundle stand, as PEM; key and chain may be one file."""

    key: Path
    chain: Path
    bundle: Path

    def read(self) -> TlsIdentity:
        """The identity in the files. Raises: FailedPrecondition, SvidInvalid when they do not belong together yet."""
        try:
            key_pem, chain_pem, bundle_pem = (path.read_bytes() for path in (self.key, self.chain, self.bundle))
        except OSError as error:
            raise FailedPrecondition(f"{error.filename}: cannot be read: {error.strerror}") from error
        _check_pair(key_pem, chain_pem)
        load_chain_pem(bundle_pem)
        return TlsIdentity(bundle_pem, chain_pem, key_pem)

    def stamp(self) -> tuple[tuple[int, int, int], ...]:
        """Changes whenever a file is replaced or written; a missing file counts as (0, 0, 0)."""
        return tuple(_stamp(path) for path in (self.key, self.chain, self.bundle))


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (status.st_ino, status.st_mtime_ns, status.st_size)


def _check_pair(key_pem: bytes, chain_pem: bytes) -> None:
    leaf = load_chain_pem(chain_pem)[0]
    try:
        public_key = load_pem_private_key(key_pem, password=None).public_key()
    except (ValueError, TypeError) as error:
        raise SvidInvalid("key file holds no PEM private key, or is cut short") from error
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if public_key.public_bytes(*form) != leaf.public_key().public_bytes(*form):
        raise SvidInvalid("key and chain do not belong together")


def _options(server_id: SpiffeId, keepalive_ms: int) -> list[tuple[str, int | str]]:
    return [
        *_OPTIONS,
        *_PING_OPTIONS,
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.ssl_target_name_override", tls_name_of(server_id)),
    ]


def open_channel(
    target: str, identity: TlsIdentity, *, server_id: SpiffeId, keepalive_ms: int = KEEPALIVE_MS
) -> grpc.aio.Channel:
    """An asyncio channel to `target` ("host:port"), which must prove to be `server_id`."""
    return grpc.aio.secure_channel(target, identity.credentials(), options=_options(server_id, keepalive_ms))


def open_sync_channel(
    target: str, identity: TlsIdentity, *, server_id: SpiffeId, keepalive_ms: int = KEEPALIVE_MS
) -> grpc.Channel:
    """A blocking channel to `target` ("host:port"), which must prove to be `server_id`."""
    return grpc.secure_channel(target, identity.credentials(), options=_options(server_id, keepalive_ms))


def open_local_channel(socket: Path) -> grpc.aio.Channel:
    """An asyncio channel to a service's own Unix socket; the file's permissions say who may use it."""
    return grpc.aio.insecure_channel(f"unix:{socket.absolute()}", options=_local_options())


def open_sync_local_channel(socket: Path) -> grpc.Channel:
    """A blocking channel to a service's own Unix socket."""
    return grpc.insecure_channel(f"unix:{socket.absolute()}", options=_local_options())


def _local_options() -> list[tuple[str, int | str]]:
    return [*_OPTIONS, ("grpc.default_authority", "localhost")]


class ReloadingChannel:
    """The asyncio channel to one service, replaced when the SVID files change. Belongs to one event loop.

    A channel that was replaced serves the calls it has for a grace time; `current` never hands it out again. While the files are being
    replaced one by one they do not match: the old channel serves until they do.
    """

    def __init__(self, target: str, files: SvidFiles, *, server_id: SpiffeId, keepalive_ms: int = KEEPALIVE_MS) -> None:
        self.target = target
        self._files = files
        self._server_id = server_id
        self._keepalive_ms = keepalive_ms
        self._channel: grpc.aio.Channel | None = None
        self._stamp: tuple[tuple[int, int, int], ...] = ()
        self._unusable: tuple[tuple[int, int, int], ...] = ()  # files that were read, and said to be no use, already
        self._closed = False
        self._retiring: set[asyncio.Task[None]] = set()

    async def current(self) -> grpc.aio.Channel:
        """Raises: FailedPrecondition, SvidInvalid when there is no channel yet and the files do not allow one."""
        if self._closed:
            raise FailedPrecondition(f"channel to {self.target} is closed")
        stamp = self._files.stamp()
        if self._channel is not None and stamp in (self._stamp, self._unusable):
            return self._channel
        old = self._channel
        try:
            identity = self._files.read()
        except KeyreeveError as error:
            if old is None:
                raise
            log_warning("svid_reload_failed", target=self.target, detail=error.detail)
            self._unusable = stamp
            return old
        self._channel = open_channel(self.target, identity, server_id=self._server_id, keepalive_ms=self._keepalive_ms)
        self._stamp = stamp
        if old is not None:
            log("svid_reloaded", target=self.target)
            self._retire(old)
        return self._channel

    async def close(self) -> None:
        self._closed = True
        if self._channel is not None:
            await self._channel.close()
            self._channel = None
        for task in list(self._retiring):
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)

    def _retire(self, channel: grpc.aio.Channel) -> None:
        task = asyncio.ensure_future(channel.close(grace=CLOSE_GRACE_SECONDS))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
