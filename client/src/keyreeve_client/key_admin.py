"""Administration of the key cluster, typed: keys, grants, the key server's own SVID, its health. Blocking; safe to share among threads.

Values are frozen dataclasses, times are aware UTC, errors are KeyreeveError. Nothing is retried here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, TypeVar

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from keyreeve_common.errors import Internal
from keyreeve_common.grpc_edge import error_from_rpc
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_common.v1 import keyserver_pb2, keyserver_pb2_grpc, types_pb2

ADMIN_TIMEOUT = timedelta(seconds=30)  # an RSA key made in a token takes its time
PAGE_SIZE = 500
R = TypeVar("R")
_NUMBER_OF_KEY_TYPE = {
    KeyType.EC_P256: types_pb2.KEY_TYPE_EC_P256,
    KeyType.EC_P384: types_pb2.KEY_TYPE_EC_P384,
    KeyType.ED25519: types_pb2.KEY_TYPE_ED25519,
    KeyType.RSA_2048: types_pb2.KEY_TYPE_RSA_2048,
    KeyType.RSA_3072: types_pb2.KEY_TYPE_RSA_3072,
    KeyType.RSA_4096: types_pb2.KEY_TYPE_RSA_4096,
}
_KEY_TYPE_OF_NUMBER = {int(number): key_type for key_type, number in _NUMBER_OF_KEY_TYPE.items()}
_NUMBER_OF_ROLE = {
    KeyRole.HANDSHAKE: keyserver_pb2.KEY_ROLE_HANDSHAKE,
    KeyRole.AUTHORITY: keyserver_pb2.KEY_ROLE_AUTHORITY,
    KeyRole.JWT_AUTHORITY: keyserver_pb2.KEY_ROLE_JWT_AUTHORITY,
}
_ROLE_OF_NUMBER = {int(number): role for role, number in _NUMBER_OF_ROLE.items()}


class KeyState(Enum):
    ENABLED = keyserver_pb2.KEY_STATE_ENABLED
    DISABLED = keyserver_pb2.KEY_STATE_DISABLED
    DESTROYED = keyserver_pb2.KEY_STATE_DESTROYED
    PENDING_DESTRUCTION = keyserver_pb2.KEY_STATE_PENDING_DESTRUCTION


class AuthorityKind(Enum):
    ROOT = keyserver_pb2.AuthorityProfile.KIND_ROOT
    ISSUING = keyserver_pb2.AuthorityProfile.KIND_ISSUING


def key_type_to_proto(key_type: KeyType) -> Any:
    return _NUMBER_OF_KEY_TYPE[key_type]


def key_type_from_proto(number: int) -> KeyType | None:
    """None for UNSPECIFIED and for numbers that this version does not know."""
    return _KEY_TYPE_OF_NUMBER.get(number)


@dataclass(frozen=True, slots=True)
class AuthorityProfile:
    """What an authority key may certify; the key cluster holds it and never changes it."""

    trust_domain: TrustDomain
    kind: AuthorityKind
    subject_der: bytes
    max_validity: timedelta
    max_backdate: timedelta
    max_path_length: int = 0


@dataclass(frozen=True, slots=True)
class JwtProfile:
    """What a JWT authority's key may sign; the key cluster holds it and never changes it."""

    trust_domain: TrustDomain
    max_ttl: timedelta


@dataclass(frozen=True, slots=True)
class KeySpec:
    """A key to make. The same `request_id` gives the same key again."""

    request_id: str
    key_type: KeyType
    role: KeyRole
    purposes: frozenset[Purpose]
    label: str = ""
    backend: str = ""
    authority_profile: AuthorityProfile | None = None
    jwt_profile: JwtProfile | None = None


@dataclass(frozen=True, slots=True)
class ClusterKey:
    key_id: KeyId
    key_type: KeyType
    role: KeyRole
    purposes: frozenset[Purpose]
    state: KeyState
    spki_der: bytes
    backend: str = ""
    label: str = ""
    schemes: tuple[SignatureScheme, ...] = ()
    token: str = ""
    extractable: bool = False
    created_at: datetime | None = None
    signatures: int = 0


@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket that holds `burst` tokens and gains `per_second` of them, at each replica."""

    per_second: float
    burst: int


@dataclass(frozen=True, slots=True)
class Grant:
    key_id: KeyId
    holder: str
    purposes: frozenset[Purpose]
    expires_at: datetime | None = None
    created_at: datetime | None = None
    revoked_at: datetime | None = None
    rate: Rate | None = None

    @property
    def is_revoked(self) -> bool:
        return self.revoked_at is not None


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A holder that may not sign, whatever its grants say. `cause` is `operator`, or what a replica counted."""

    holder: str
    cause: str
    reason: str
    set_by: str
    since: datetime | None = None
    until: datetime | None = None
    lifted_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class BackendHealth:
    name: str
    serving: bool
    detail: str
    custody: str


@dataclass(frozen=True, slots=True)
class KeyServerHealth:
    serving: bool
    version: str
    detail: str
    svid_not_after: datetime | None
    catalog_staleness_s: float = 0.0
    serving_from_cache: bool = False
    backends: tuple[BackendHealth, ...] = field(default=())


class KeyAdminClient:
    """All administrative services of one key server over one channel."""

    def __init__(self, channel: grpc.Channel, *, timeout: timedelta = ADMIN_TIMEOUT) -> None:
        self._keys = keyserver_pb2_grpc.KeyAdminStub(channel)
        self._grants = keyserver_pb2_grpc.GrantsStub(channel)
        self._quarantines = keyserver_pb2_grpc.QuarantinesStub(channel)
        self._identity = keyserver_pb2_grpc.ServiceIdentityStub(channel)
        self._health = keyserver_pb2_grpc.HealthStub(channel)
        self._timeout = timeout.total_seconds()

    def create_key(self, spec: KeySpec) -> ClusterKey:
        request = keyserver_pb2.CreateKeyRequest(
            request_id=spec.request_id,
            key_type=_NUMBER_OF_KEY_TYPE[spec.key_type],
            role=_NUMBER_OF_ROLE[spec.role],
            purposes=_purposes_to_proto(spec.purposes),
            backend=spec.backend,
            label=spec.label,
            authority_profile=_profile_to_proto(spec.authority_profile),
            jwt_profile=jwt_profile_to_proto(spec.jwt_profile),
        )
        return _key(self._call(self._keys.CreateKey, request))

    def get_key(self, key_id: str) -> ClusterKey:
        return _key(self._call(self._keys.GetKey, keyserver_pb2.GetKeyRequest(key_id=key_id)))

    def list_keys(self, *, label: str = "") -> Iterator[ClusterKey]:
        token = ""
        while True:
            request = keyserver_pb2.ListKeysRequest(page_size=PAGE_SIZE, page_token=token, label=label)
            page = self._call(self._keys.ListKeys, request)
            yield from map(_key, page.keys)
            token = page.next_page_token
            if not token:
                return

    def disable_key(self, key_id: str) -> ClusterKey:
        return _key(self._call(self._keys.DisableKey, keyserver_pb2.DisableKeyRequest(key_id=key_id)))

    def enable_key(self, key_id: str) -> ClusterKey:
        return _key(self._call(self._keys.EnableKey, keyserver_pb2.EnableKeyRequest(key_id=key_id)))

    def rotate_key(self, key_id: str, *, request_id: str) -> ClusterKey:
        """The next generation of an enabled key, with its grants; the same `request_id` gives the same key again."""
        request = keyserver_pb2.RotateKeyRequest(key_id=key_id, request_id=request_id)
        return _key(self._call(self._keys.RotateKey, request))

    def retire_key(self, key_id: str, *, at: datetime) -> ClusterKey:
        """Has the key disabled at this time."""
        request = keyserver_pb2.RetireKeyRequest(key_id=key_id, retire_at=_timestamp(at))
        return _key(self._call(self._keys.RetireKey, request))

    def destroy_key(self, key_id: str) -> ClusterKey:
        """Only for a disabled key: after the server's waiting time it is destroyed, unless that is cancelled before."""
        return _key(self._call(self._keys.DestroyKey, keyserver_pb2.DestroyKeyRequest(key_id=key_id)))

    def create_grant(
        self,
        key_id: str,
        holder: SpiffeId,
        *,
        purposes: frozenset[Purpose],
        expires_at: datetime | None,
        rate: Rate | None = None,
    ) -> Grant:
        """Makes or replaces the grant, its rate too; a revoked one works again. Without a rate the key server's own limits hold."""
        request = keyserver_pb2.CreateGrantRequest(
            key_id=key_id,
            holder=str(holder),
            purposes=_purposes_to_proto(purposes),
            expires_at=_timestamp(expires_at),
            rate=None if rate is None else keyserver_pb2.Rate(per_second=rate.per_second, burst=rate.burst),
        )
        return _grant(self._call(self._grants.CreateGrant, request))

    def extend_grant(self, key_id: str, holder: SpiffeId, *, expires_at: datetime) -> Grant:
        """Moves the expiry of a live grant; a revoked one stays revoked and is an error."""
        request = keyserver_pb2.ExtendGrantRequest(key_id=key_id, holder=str(holder), expires_at=_timestamp(expires_at))
        return _grant(self._call(self._grants.ExtendGrant, request))

    def revoke_grant(self, key_id: str, holder: SpiffeId) -> Grant:
        request = keyserver_pb2.RevokeGrantRequest(key_id=key_id, holder=str(holder))
        return _grant(self._call(self._grants.RevokeGrant, request))

    def list_grants(self, *, key_id: str = "", holder: SpiffeId | None = None) -> Iterator[Grant]:
        """Revoked ones too."""
        token = ""
        while True:
            request = keyserver_pb2.ListGrantsRequest(
                key_id=key_id, holder=str(holder) if holder else "", page_size=PAGE_SIZE, page_token=token
            )
            page = self._call(self._grants.ListGrants, request)
            yield from map(_grant, page.grants)
            token = page.next_page_token
            if not token:
                return

    def add_quarantine(self, holder: SpiffeId, *, reason: str, until: datetime | None = None) -> Quarantine:
        """Only through the admin socket. Replaces the one that the holder has."""
        request = keyserver_pb2.AddQuarantineRequest(holder=str(holder), reason=reason, until=_timestamp(until))
        return _quarantine(self._call(self._quarantines.AddQuarantine, request))

    def lift_quarantine(self, holder: SpiffeId) -> Quarantine:
        """Only through the admin socket."""
        request = keyserver_pb2.LiftQuarantineRequest(holder=str(holder))
        return _quarantine(self._call(self._quarantines.LiftQuarantine, request))

    def list_quarantines(self, *, include_ended: bool = False) -> Iterator[Quarantine]:
        token = ""
        while True:
            request = keyserver_pb2.ListQuarantinesRequest(
                page_size=PAGE_SIZE, page_token=token, include_ended=include_ended
            )
            page = self._call(self._quarantines.ListQuarantines, request)
            yield from map(_quarantine, page.quarantines)
            token = page.next_page_token
            if not token:
                return

    def get_csr(self, spiffe_id: SpiffeId) -> bytes:
        """A certificate request for the key server's own TLS key."""
        request = keyserver_pb2.GetCsrRequest(spiffe_id=str(spiffe_id))
        return bytes(self._call(self._identity.GetCsr, request).csr_der)

    def install_svid(self, chain_der: Sequence[bytes], bundle: types_pb2.Bundle) -> datetime:
        """Gives the key server its own SVID (leaf first); when it ends."""
        request = keyserver_pb2.InstallSvidRequest(chain_der=list(chain_der), bundle=bundle)
        not_after = _time(self._call(self._identity.InstallSvid, request), "not_after")
        if not_after is None:
            raise Internal("key server did not say until when its SVID is valid")
        return not_after

    def check_health(self) -> KeyServerHealth:
        answer = self._call(self._health.Check, keyserver_pb2.HealthRequest())
        backends = tuple(BackendHealth(each.name, each.serving, each.detail, each.custody) for each in answer.backends)
        return KeyServerHealth(
            answer.serving,
            answer.version,
            answer.detail,
            _time(answer, "svid_not_after"),
            answer.catalog_staleness_s,
            answer.serving_from_cache,
            backends,
        )

    def _call(self, method: Callable[..., R], request: object) -> R:
        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error


def _purposes_to_proto(purposes: frozenset[Purpose]) -> Any:
    return sorted(int(purpose) for purpose in purposes)


def _purposes_from_proto(numbers: Sequence[int]) -> frozenset[Purpose]:
    known = {int(purpose) for purpose in Purpose}
    return frozenset(Purpose(number) for number in numbers if number in known)


def _profile_to_proto(profile: AuthorityProfile | None) -> keyserver_pb2.AuthorityProfile | None:
    if profile is None:
        return None
    message = keyserver_pb2.AuthorityProfile(
        trust_domain=profile.trust_domain.name,
        kind=profile.kind.value,
        subject_der=profile.subject_der,
        max_path_length=profile.max_path_length,
    )
    message.max_validity.FromTimedelta(profile.max_validity)
    message.max_backdate.FromTimedelta(profile.max_backdate)
    return message


def jwt_profile_to_proto(profile: JwtProfile | None) -> keyserver_pb2.JwtProfile | None:
    if profile is None:
        return None
    message = keyserver_pb2.JwtProfile(trust_domain=profile.trust_domain.name)
    message.max_ttl.FromTimedelta(profile.max_ttl)
    return message


def _timestamp(time: datetime | None) -> Timestamp | None:
    if time is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp


def _time(message: Any, name: str) -> datetime | None:
    return getattr(message, name).ToDatetime(tzinfo=UTC) if message.HasField(name) else None


def _key(message: keyserver_pb2.Key) -> ClusterKey:
    key_type, role = _KEY_TYPE_OF_NUMBER.get(message.key_type), _ROLE_OF_NUMBER.get(message.role)
    if key_type is None or role is None or message.state not in {state.value for state in KeyState}:
        raise Internal("key server described a key of a kind that this program does not know")
    known = {int(scheme) for scheme in SignatureScheme}
    return ClusterKey(
        key_id=KeyId(message.key_id),
        key_type=key_type,
        role=role,
        purposes=_purposes_from_proto(message.purposes),
        state=KeyState(message.state),
        spki_der=bytes(message.spki_der),
        backend=message.backend,
        label=message.label,
        schemes=tuple(SignatureScheme(number) for number in message.schemes if number in known),
        token=message.attributes.token,
        extractable=message.attributes.extractable,
        created_at=_time(message, "created_at"),
        signatures=message.signatures,
    )


def _grant(message: keyserver_pb2.Grant) -> Grant:
    return Grant(
        key_id=KeyId(message.key_id),
        holder=message.holder,
        purposes=_purposes_from_proto(message.purposes),
        expires_at=_time(message, "expires_at"),
        created_at=_time(message, "created_at"),
        revoked_at=_time(message, "revoked_at"),
        rate=Rate(message.rate.per_second, message.rate.burst) if message.HasField("rate") else None,
    )


def _quarantine(message: keyserver_pb2.Quarantine) -> Quarantine:
    known = keyserver_pb2.QuarantineCause.values()
    name = keyserver_pb2.QuarantineCause.Name(message.cause) if message.cause in known else "unknown"
    return Quarantine(
        holder=message.holder,
        cause=name.removeprefix("QUARANTINE_CAUSE_").lower(),
        reason=message.reason,
        set_by=message.set_by,
        since=_time(message, "since"),
        until=_time(message, "until"),
        lifted_at=_time(message, "lifted_at"),
    )
