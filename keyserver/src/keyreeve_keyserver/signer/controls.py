"""Control operations: create, load, forget and destroy keys, and say how the signer is. One table from `op` to its function."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from weakref import WeakValueDictionary

from keyreeve_common.approvals import ApprovalRequest, Operation
from keyreeve_common.errors import (
    ApprovalInvalid,
    ApprovalRequired,
    Conflict,
    InvalidRequest,
    KeyreeveError,
    SealedRecordInvalid,
    TokenUnavailable,
)
from keyreeve_common.key_attestation import check_nonce
from keyreeve_common.key_id import KeyId, parse_key_id
from keyreeve_common.metrics import samples_to_json
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType
from keyreeve_common.telemetry import log, log_warning
from keyreeve_common.transparency.records import Event, microseconds

from keyreeve_keyserver.audit.events import front_end_records, key_record
from keyreeve_keyserver.audit.ports import AuditLog, NullAuditLog
from keyreeve_keyserver.backends.ports import Backend, CreatedKey
from keyreeve_keyserver.domain.keys import (
    AuthorityProfile,
    JwtProfile,
    KeyRecord,
    check_label,
    check_purposes,
    parse_authority_profile,
    parse_jwt_profile,
    parse_purposes,
)
from keyreeve_keyserver.domain.secret import Secret
from keyreeve_keyserver.frames import Control, JsonObject
from keyreeve_keyserver.hardening.lockdown import Protections
from keyreeve_keyserver.signer.approvals import (
    Approvals,
    is_made_with_approval,
    key_to_create,
    key_to_destroy,
)
from keyreeve_keyserver.signer.attestation import (
    attest,
    make_attestation_key,
    open_attestation_key,
    public_key_of,
)
from keyreeve_keyserver.signer.destruction import MAX_WAIT_SECONDS, DestructionPermit
from keyreeve_keyserver.signer.judging import KeyTable
from keyreeve_keyserver.signer.metrics import SignerMetrics
from keyreeve_keyserver.signer.sealing import Sealer
from keyreeve_keyserver.signer.self_test import check_signs, load_tested

_REQUIRED = frozenset({"key_id", "key_type", "role", "purposes"})
_OPTIONAL = frozenset({"backend", "label", "authority_profile", "jwt_profile", "approvals", "request_id"})
_FRESH = timedelta(minutes=15)  # how long a key that was never loaded may be destroyed by whoever had it made


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A key to make, as the arguments say it."""

    key_id: KeyId
    key_type: KeyType
    role: KeyRole
    purposes: frozenset[Purpose]
    label: str
    backend: Backend
    profile: AuthorityProfile | None
    jwt_profile: JwtProfile | None


class ControlService:
    def __init__(
        self,
        backends: dict[str, Backend],
        keys: KeyTable,
        sealer: Sealer,
        *,
        default_backend: str,
        now: Callable[[], datetime],
        audit: AuditLog | None = None,
        approvals: Approvals | None = None,
        metrics: SignerMetrics | None = None,
        protections: Protections | None = None,
    ) -> None:
        self._protections = protections or Protections()
        self._metrics = metrics or SignerMetrics()
        self._backends = backends
        self._keys = keys
        self._sealer = sealer
        self._default = default_backend
        self._now = now
        self._audit = audit or NullAuditLog()
        self._approvals = approvals or Approvals()
        self._approving = asyncio.Lock()
        self._turns: WeakValueDictionary[KeyId, asyncio.Lock] = WeakValueDictionary()  # see _turn
        self._fresh: dict[bytes, datetime] = {}  # by public key: when it was made here
        self._operations: dict[str, Callable[[JsonObject], Awaitable[JsonObject]]] = {
            "capabilities": self._capabilities,
            "health": self._health,
            "metrics": self._show_metrics,
            "create_key": self._create_key,
            "load_key": self._load_key,
            "forget_key": self._forget_key,
            "permit_destruction": self._permit_destruction,
            "destroy_key": self._destroy_key,
            "make_attestation_key": self._make_attestation_key,
            "attest_key": self._attest_key,
            "record": self._record,
        }

    async def run(self, control: Control) -> JsonObject:
        """Raises: any of our errors; InvalidRequest for an operation or member that is not known."""
        operation = self._operations.get(control.op)
        if operation is None:
            raise InvalidRequest(f"control operation {control.op} is not known")
        return await operation(control.arguments)

    async def _capabilities(self, arguments: JsonObject) -> JsonObject:
        _members(arguments)
        return {
            "backends": [_describe(backend) for backend in self._backends.values()],
            "default_backend": self._default,
            "audit": self._audit.enabled,
        }

    async def _health(self, arguments: JsonObject) -> JsonObject:
        _members(arguments)
        states = [(backend.name, backend.health()) for backend in self._backends.values()]
        return {
            "backends": [
                {
                    "name": name,
                    "state": health.state.value,
                    "detail": health.detail,
                    "workers": health.workers,
                    "configured": health.configured,
                    "waiting": health.waiting,
                    "protections": dict(health.protections),
                    "engine": health.engine,
                    "engine_detail": health.engine_detail,
                }
                for name, health in states
            ],
            "keys_loaded": len(self._keys),
            "protections": dict(self._protections.describe()),
            "audit": asdict(self._audit.status()),
        }

    async def _show_metrics(self, arguments: JsonObject) -> JsonObject:
        _members(arguments)
        return {"samples": samples_to_json(self._metrics.snapshot())}

    async def _create_key(self, arguments: JsonObject) -> JsonObject:
        """The key is made, sealed and handed out; it is not loaded. What approvals were used for once is only told again."""
        _members(arguments, required=_REQUIRED, optional=_OPTIONAL)
        role, purposes = _choice(KeyRole, arguments, "role"), parse_purposes(arguments["purposes"])
        given, given_jwt = arguments.get("authority_profile"), arguments.get("jwt_profile")
        wanted = _Wanted(
            key_id=parse_key_id(_text(arguments, "key_id")),
            key_type=_choice(KeyType, arguments, "key_type"),
            role=role,
            purposes=purposes,
            label=_text(arguments, "label") if arguments.get("label") is not None else "",
            backend=self._backend(_text(arguments, "backend") if arguments.get("backend") else self._default),
            profile=None if given is None else parse_authority_profile(given),
            jwt_profile=None if given_jwt is None else parse_jwt_profile(given_jwt),
        )
        check_purposes(role, purposes, wanted.profile, wanted.jwt_profile, key_type=wanted.key_type)
        check_label(wanted.label)
        if not is_made_with_approval(role):
            return await self._make_key(wanted)
        async with self._approving:  # two at once would both find the approvals unused
            approved = self._approved_creation(arguments, wanted)
            if (kept := self._approvals.answer_of(approved, self._now())) is not None:
                return kept
            answer = await self._make_key(wanted)
            self._approvals.keep_answer(approved, answer)
            return answer

    async def _make_key(self, wanted: _Wanted) -> JsonObject:
        key_id, backend = wanted.key_id, wanted.backend
        if self._keys.get(key_id) is not None:
            raise Conflict("a key with this id is loaded")
        created = await backend.create(key_id, wanted.key_type)
        record = KeyRecord(
            key_id=key_id,
            key_type=wanted.key_type,
            role=wanted.role,
            purposes=wanted.purposes,
            backend=backend.name,
            backend_ref=created.backend_ref,
            spki_der=created.spki_der,
            label=wanted.label,
            created=self._now().astimezone(UTC).replace(microsecond=0),
            authority_profile=wanted.profile,
            jwt_profile=wanted.jwt_profile,
        )
        sealed = await self._seal_or_destroy(record, created, backend)
        await self._record_or_destroy(record, backend)
        if Purpose.DIGEST in wanted.purposes:
            log_warning(
                "digest_key_created", key_id=key_id, detail="whoever may use this purpose has the key sign anything"
            )
        log(
            "key_created",
            key_id=key_id,
            key_type=wanted.key_type.value,
            role=wanted.role.value,
            backend=backend.name,
        )
        self._fresh[record.spki_der] = now = self._now()
        while (
            now - next(iter(self._fresh.values())) >= _FRESH
        ):  # keys that other replicas load would be kept here for ever
            del self._fresh[next(iter(self._fresh))]
        return {
            "key_id": key_id,
            "record": base64.b64encode(sealed).decode("ascii"),
            "spki_der": base64.b64encode(created.spki_der).decode("ascii"),
            "attributes": created.attributes,
        }

    def _approved_creation(self, arguments: JsonObject, wanted: _Wanted) -> ApprovalRequest | None:
        """Raises: ApprovalRequired, ApprovalInvalid."""
        key = key_to_create(
            key_type=wanted.key_type.value,
            role=wanted.role.value,
            purposes=[purpose.label for purpose in wanted.purposes],
            backend=wanted.backend.name,
            label=wanted.label,
            authority_profile=wanted.profile.to_json() if wanted.profile else None,
            jwt_profile=wanted.jwt_profile.to_json() if wanted.jwt_profile else None,
        )
        given = _list(arguments, "approvals")
        request = self._approvals.require(given, operation=Operation.CREATE_KEY, key=key, now=self._now())
        if request is not None and request.request_id != arguments.get("request_id"):
            raise ApprovalInvalid("the approvals are for a creation with another request_id")
        return request

    async def _seal_or_destroy(self, record: KeyRecord, created: CreatedKey, backend: Backend) -> bytes:
        """A key that no record names would stay in its token for ever."""
        try:
            return await self._sealer.seal(record, created.secret)
        except KeyreeveError:
            with suppress(KeyreeveError):
                await backend.destroy(record)
            raise

    async def _record_or_destroy(self, record: KeyRecord, backend: Backend) -> None:
        """A key that is not on record is not given out."""
        try:
            await self._audit.append([self._key_record(Event.KEY_CREATED, record)])
        except KeyreeveError:
            with suppress(KeyreeveError):
                await backend.destroy(record)
            raise

    async def _load_key(self, arguments: JsonObject) -> JsonObject:
        _members(arguments, required=frozenset({"record"}))
        record, secret = await self._open(_text(arguments, "record"))
        async with self._turn(record.key_id):
            if not self._is_loaded(record):
                self._fresh.pop(record.spki_der, None)
                await load_tested(self._backend(record.backend), record, secret)
                self._keys.put(record)
        return {"key_id": record.key_id}

    async def _forget_key(self, arguments: JsonObject) -> JsonObject:
        _members(arguments, required=frozenset({"key_id"}))
        """At once, and once more behind a load that is under way: no key is loaded by what came before this."""
        key_id = parse_key_id(_text(arguments, "key_id"))
        self._forget(key_id)
        async with self._turn(key_id):
            self._forget(key_id)
        return {}

    async def _permit_destruction(self, arguments: JsonObject) -> JsonObject:
        """What `destroy_key` takes when the waiting time is over; where approvals are configured, it takes nothing else."""
        _members(arguments, required=frozenset({"record", "wait_s"}), optional=frozenset({"approvals"}))
        record, _ = await self._open(_text(arguments, "record"))
        wait_s, now = _whole(arguments, "wait_s", high=MAX_WAIT_SECONDS), self._now()
        key, given = key_to_destroy(record, wait_s), _list(arguments, "approvals")
        approved = self._approvals.require(given, operation=Operation.DESTROY_KEY, key=key, now=now)
        if (kept := self._approvals.answer_of(approved, now)) is not None:
            return kept
        permit = DestructionPermit.of(record, not_before=now + timedelta(seconds=wait_s))
        log("destruction_permitted", key_id=record.key_id, not_before=permit.not_before.isoformat())
        sealed = await self._sealer.seal_note(permit.to_bytes())
        answer: JsonObject = {"permit": base64.b64encode(sealed).decode("ascii")}
        self._approvals.keep_answer(approved, answer)
        return answer

    async def _destroy_key(self, arguments: JsonObject) -> JsonObject:
        _members(arguments, required=frozenset({"record"}), optional=frozenset({"permit"}))
        record, _ = await self._open(_text(arguments, "record"))
        if arguments.get("permit") is not None:
            note = await self._sealer.open_note(_base64(_text(arguments, "permit"), "permit"))
            DestructionPermit.parse(note).check(record, now=self._now())
        elif self._approvals.are_asked_for and not self._is_fresh(record):
            raise ApprovalRequired("destroying this key needs approvals: keyreeve approval request destroy")
        backend = self._backend(record.backend)
        self._forget(record.key_id)
        async with self._turn(record.key_id):
            self._forget(record.key_id)
            self._approvals.forget_key(record.key_id)
            await self._audit.append([self._key_record(Event.KEY_DESTROY_REQUESTED, record)])
            await backend.destroy(record)
        await self._audit.append([self._key_record(Event.KEY_DESTROYED, record)])
        log("key_destroyed", key_id=record.key_id, backend=record.backend)
        return {}

    def _is_fresh(self, record: KeyRecord) -> bool:
        """Made by this process a short while ago and never loaded, so it never signed: what a creation that failed half way leaves."""
        now, made = self._now(), self._fresh.get(record.spki_der)
        return made is not None and now - _FRESH < made <= now

    async def _make_attestation_key(self, arguments: JsonObject) -> JsonObject:
        _members(arguments)
        sealed = await make_attestation_key(self._sealer)
        log("attestation_key_made")
        return {"attestation_key": base64.b64encode(sealed).decode("ascii")}

    async def _attest_key(self, arguments: JsonObject) -> JsonObject:
        """The key signs its test message first, so that what the token says is said of the record's key."""
        _members(arguments, required=frozenset({"record", "nonce", "attestation_key"}))
        record, secret = await self._open(_text(arguments, "record"))
        nonce = check_nonce(_base64(_text(arguments, "nonce"), "nonce"))
        key = await open_attestation_key(self._sealer, _base64(_text(arguments, "attestation_key"), "attestation_key"))
        backend = self._backend(record.backend)
        async with self._turn(record.key_id):
            if self._is_loaded(record):
                await check_signs(backend, record)
            else:
                await load_tested(backend, record, secret)
            try:
                attestation = await attest(backend, record, secret, nonce=nonce, now=self._now(), key=key)
            finally:
                if self._keys.get(record.key_id) is None:
                    backend.forget(record.key_id)
        log("key_attested", key_id=record.key_id)
        return {
            "attestation": attestation.to_text(),
            "public_key": base64.b64encode(public_key_of(key)).decode("ascii"),
        }

    async def _record(self, arguments: JsonObject) -> JsonObject:
        """Records what the front end saw or decided, marked as its word."""
        _members(arguments, required=frozenset({"events"}))
        records = front_end_records(arguments["events"], time_us=microseconds(self._now()))
        await self._audit.append([record.to_bytes() for record in records])
        return {"recorded": len(records) if self._audit.enabled else 0}

    def _key_record(self, event: Event, record: KeyRecord) -> bytes:
        return key_record(event, record, time_us=microseconds(self._now())).to_bytes()

    def _turn(self, key_id: KeyId) -> asyncio.Lock:
        """What loads a key, or lets it go, does so alone, in the order it came: table and backend say the same of it afterwards."""
        return self._turns.setdefault(key_id, asyncio.Lock())

    def _is_loaded(self, record: KeyRecord) -> bool:
        """Raises: Conflict where another record of its key id is."""
        loaded = self._keys.get(record.key_id)
        if loaded is not None and loaded != record:
            raise Conflict("another record of this key id is loaded: forget that first")
        return loaded is not None

    def _forget(self, key_id: KeyId) -> None:
        record = self._keys.remove(key_id)
        if record is not None and record.backend in self._backends:
            self._backends[record.backend].forget(key_id)

    async def _open(self, encoded: str) -> tuple[KeyRecord, Secret | None]:
        return await self._sealer.open(_base64(encoded, "record"))

    def _backend(self, name: str) -> Backend:
        backend = self._backends.get(name)
        if backend is None:
            raise TokenUnavailable(f"this signer has no backend {name}")
        return backend


def _describe(backend: Backend) -> JsonObject:
    offered, health = backend.capabilities(), backend.health()
    return {
        "name": backend.name,
        "custody": offered.custody.value,
        "key_types": [key_type.value for key_type in offered.key_types],
        "schemes": [int(scheme) for scheme in offered.schemes],
        "state": health.state.value,
        "detail": health.detail,
    }


def _members(
    arguments: JsonObject, *, required: frozenset[str] = frozenset(), optional: frozenset[str] = frozenset()
) -> None:
    missing = sorted(required - arguments.keys())
    unknown = sorted(arguments.keys() - required - optional)
    if missing or unknown:
        raise InvalidRequest(f"members missing: {missing}; unknown: {[name[:64] for name in unknown[:8]]}")


def _text(arguments: JsonObject, name: str) -> str:
    value = arguments[name]
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is not a string")
    return value


def _list(arguments: JsonObject, name: str) -> list[object]:
    value = arguments.get(name)
    if value is not None and not isinstance(value, list):
        raise InvalidRequest(f"{name} is not a list")
    return value or []


def _whole(arguments: JsonObject, name: str, *, high: int) -> int:
    value = arguments[name]
    if type(value) is not int or not 0 <= value <= high:
        raise InvalidRequest(f"{name} is not a whole number from 0 to {high}")
    return value


def _base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise SealedRecordInvalid(f"{name} is not base64") from None


def _choice(kind: Any, arguments: JsonObject, name: str) -> Any:
    try:
        return kind(_text(arguments, name))
    except ValueError:
        raise InvalidRequest(f"{name} is none of: {', '.join(member.value for member in kind)}") from None
