"""The KeyAdmin service: keys are made, looked at, disabled and destroyed. No call here can take a private key out."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from keyreeve_common.errors import (
    ApprovalInvalid,
    ApprovalRequired,
    Conflict,
    FailedPrecondition,
    InvalidRequest,
    KeyNotFound,
    KeyreeveError,
    StorageBusy,
    StorageFull,
    TokenPinIncorrect,
    Unavailable,
)
from keyreeve_common.grpc_edge import current_peer
from keyreeve_common.identity import TrustDomain
from keyreeve_common.key_attestation import check_nonce
from keyreeve_common.key_id import KeyId, parse_key_id
from keyreeve_common.purposes import KeyRole
from keyreeve_common.telemetry import log, log_warning
from keyreeve_common.transparency.records import Event
from keyreeve_common.v1 import keyserver_pb2, keyserver_pb2_grpc

from keyreeve_keyserver.catalog.catalog import Catalog
from keyreeve_keyserver.catalog.records import KeyEntry, NewKey
from keyreeve_keyserver.domain.keys import KeyState
from keyreeve_keyserver.frontend.access import Access, CatalogThreads
from keyreeve_keyserver.frontend.engine import SigningEngine
from keyreeve_keyserver.frontend.key_life import KeyLifeService
from keyreeve_keyserver.frontend.protos import (
    checked_request_id,
    key_to_proto,
    new_key_from_proto,
    time_from_proto,
    wait_from_proto,
)
from keyreeve_keyserver.frontend.signer_link import SignerLink

DEFAULT_PAGE, MAX_PAGE = 100, 1000


class KeyAdminServicer(keyserver_pb2_grpc.KeyAdminServicer):
    def __init__(
        self,
        *,
        threads: CatalogThreads,
        access: Access,
        link: SignerLink,
        engine: SigningEngine,
        life: KeyLifeService,
        trust_domain: TrustDomain,
        control_timeout: timedelta,
        clock: Callable[[], datetime],
    ) -> None:
        self._threads = threads
        self._access = access
        self._link = link
        self._engine = engine
        self._life = life
        self._trust_domain = trust_domain
        self._timeout_s = control_timeout.total_seconds()
        self._clock = clock
        self._creating: dict[str, asyncio.Task[KeyEntry]] = {}  # by request id: a key id may change on the way

    @property
    def _catalog(self) -> Catalog:
        return self._threads.catalog

    async def CreateKey(self, request: keyserver_pb2.CreateKeyRequest, context: Any) -> keyserver_pb2.Key:
        return self._shown(await self.make_key(new_key_from_proto(request, self._trust_domain), current_peer().name))

    async def make_key(self, new: NewKey, caller: str) -> KeyEntry:
        """The key that `new.request_id` stands for, made unless it was made before. Raises: what CreateKey raises."""
        self._link.capabilities  # noqa: B018 - no intent is recorded while there is no signer
        entry = await self._threads.run(self._catalog.begin_key, new, now=self._clock())
        if entry.state is None:
            entry = await self._create_once(new.request_id, entry)
            log("key_created", caller=caller, key_id=entry.key_id, backend=entry.backend)
            self._engine.trail.note(Event.KEY_CREATED, caller=caller, key_id=entry.key_id, label=entry.label)
        return entry

    async def GetKey(self, request: keyserver_pb2.GetKeyRequest, context: Any) -> keyserver_pb2.Key:
        return self._shown(await self._threads.run(self._catalog.key, parse_key_id(request.key_id)))

    async def ListKeys(self, request: keyserver_pb2.ListKeysRequest, context: Any) -> keyserver_pb2.ListKeysResponse:
        limit = page_size(request.page_size)
        after = parse_key_id(request.page_token) if request.page_token else ""
        found = await self._threads.run(self._catalog.list_keys, limit=limit + 1, after=after, label=request.label)
        more = found[limit - 1].key_id if len(found) > limit else ""
        return keyserver_pb2.ListKeysResponse(
            keys=[self._shown(entry) for entry in found[:limit]], next_page_token=more
        )

    async def DisableKey(self, request: keyserver_pb2.DisableKeyRequest, context: Any) -> keyserver_pb2.Key:
        entry = await self._move(parse_key_id(request.key_id), KeyState.DISABLED, KeyState.ENABLED)
        self._engine.trail.note(Event.KEY_DISABLED, caller=current_peer().name, key_id=entry.key_id)
        self._engine.forget(entry.key_id)
        return self._shown(entry)

    async def EnableKey(self, request: keyserver_pb2.EnableKeyRequest, context: Any) -> keyserver_pb2.Key:
        key_id = parse_key_id(request.key_id)
        async with self._engine.trail.recorded(Event.KEY_ENABLED, caller=current_peer().name, key_id=key_id):
            return self._shown(await self._move(key_id, KeyState.ENABLED, KeyState.DISABLED))

    async def DestroyKey(self, request: keyserver_pb2.DestroyKeyRequest, context: Any) -> keyserver_pb2.Key:
        return self._shown(await self._life.schedule_destruction(parse_key_id(request.key_id), after=None))

    async def ScheduleKeyDestruction(
        self, request: keyserver_pb2.ScheduleKeyDestructionRequest, context: Any
    ) -> keyserver_pb2.Key:
        after = wait_from_proto(request.after) if request.HasField("after") else None
        approvals = tuple(request.approvals)
        entry = await self._life.schedule_destruction(parse_key_id(request.key_id), after=after, approvals=approvals)
        return self._shown(entry)

    async def CancelKeyDestruction(
        self, request: keyserver_pb2.CancelKeyDestructionRequest, context: Any
    ) -> keyserver_pb2.Key:
        return self._shown(await self._life.cancel_destruction(parse_key_id(request.key_id)))

    async def RotateKey(self, request: keyserver_pb2.RotateKeyRequest, context: Any) -> keyserver_pb2.Key:
        """The grants come along in the transaction that makes the key known; this replica reads them at once."""
        before = await self._threads.run(self._catalog.key, parse_key_id(request.key_id))
        new = NewKey(
            request_id=checked_request_id(request.request_id),
            key_type=before.key_type,
            role=before.role,
            purposes=before.purposes,
            backend=before.backend,
            label=before.label,
            authority_profile=before.authority_profile,
            jwt_profile=before.jwt_profile,
            predecessor=before.key_id,
        )
        async with self._engine.trail.recorded("key_rotated", caller=current_peer().name, key_id=before.key_id):
            entry = await self.make_key(new, current_peer().name)  # its grants come with it
        log("key_rotated", caller=current_peer().name, key_id=before.key_id, successor=entry.key_id)
        with suppress(KeyreeveError):  # the next look at the catalog brings them too
            await self._access.refresh()
        return self._shown(entry)

    async def RetireKey(self, request: keyserver_pb2.RetireKeyRequest, context: Any) -> keyserver_pb2.Key:
        if not request.HasField("retire_at"):
            raise InvalidRequest("retire_at: is missing")
        at = time_from_proto(request.retire_at, "retire_at")
        return self._shown(await self._life.retire(parse_key_id(request.key_id), at=at))

    async def AttestKey(self, request: keyserver_pb2.AttestKeyRequest, context: Any) -> keyserver_pb2.AttestKeyResponse:
        text, public_key = await self._life.attest(parse_key_id(request.key_id), check_nonce(request.nonce))
        return keyserver_pb2.AttestKeyResponse(attestation=text, public_key_der=public_key)

    async def GetApprovalRequest(
        self, request: keyserver_pb2.GetApprovalRequestRequest, context: Any
    ) -> keyserver_pb2.ApprovalRequest:
        expires = time_from_proto(request.expires, "expires")
        if request.key_id:
            after = wait_from_proto(request.after) if request.HasField("after") else None
            built = await self._life.destruction_request(parse_key_id(request.key_id), after=after, expires=expires)
        else:
            built = await self._life.creation_request(request.request_id, expires=expires)
        return keyserver_pb2.ApprovalRequest(request=built.to_bytes().decode("ascii"))

    async def SubmitApprovals(
        self, request: keyserver_pb2.SubmitApprovalsRequest, context: Any
    ) -> keyserver_pb2.SubmitApprovalsResponse:
        request_id, approvers = await self._life.keep_approvals(tuple(request.approvals))
        return keyserver_pb2.SubmitApprovalsResponse(request_id=request_id, approvers=approvers)

    async def _move(self, key_id: KeyId, to: KeyState, origin: KeyState) -> KeyEntry:
        entry = await self._threads.run(self._catalog.change_state, key_id, to=to, from_states=(origin,))
        if entry is None:
            entry = await self._threads.run(self._catalog.key, key_id)
            if entry.state is not to:
                assert entry.state is not None  # noqa: S101 - `key` gives finished keys only
                raise FailedPrecondition(f"the key is {entry.state.value}; it must be {origin.value} for this")
        else:
            log("key_state_changed", caller=current_peer().name, key_id=key_id, state=to.value)
        self._access.apply_key(entry)
        return entry

    async def _create_once(self, request_id: str, entry: KeyEntry) -> KeyEntry:
        """The creation goes on when its caller gives up; a retry that comes meanwhile waits for the same one."""
        task = self._creating.get(request_id)
        if task is None:
            task = asyncio.create_task(self._create(entry, request_id))
            self._creating[request_id] = task
            task.add_done_callback(lambda done: self._created(request_id, entry.key_id, done))
        return await asyncio.shield(task)

    def _created(self, request_id: str, key_id: KeyId, task: asyncio.Task[KeyEntry]) -> None:
        self._creating.pop(request_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            detail = error.detail if isinstance(error, KeyreeveError) else type(error).__name__
            log_warning("key_creation_failed", key_id=key_id, detail=detail)

    async def _create(self, entry: KeyEntry, request_id: str) -> KeyEntry:
        backend = entry.backend or str(self._link.capabilities.get("default_backend", ""))
        arguments: dict[str, Any] = {
            "key_id": entry.key_id,
            "key_type": entry.key_type.value,
            "backend": backend,
            "role": entry.role.value,
            "purposes": sorted(purpose.label for purpose in entry.purposes),
            "label": entry.label,
        }
        if entry.authority_profile is not None:
            arguments["authority_profile"] = entry.authority_profile.to_json()
        if entry.jwt_profile is not None:
            arguments["jwt_profile"] = entry.jwt_profile.to_json()
        if entry.role is not KeyRole.HANDSHAKE and (
            approvals := await self._threads.run(self._catalog.approvals, request_id)
        ):
            arguments |= {"approvals": approvals, "request_id": request_id}
        try:
            made = await self._link.control("create_key", timeout=self._timeout_s, **arguments)
        except Conflict:
            return await self._create_renamed(entry, request_id)
        except ApprovalRequired as error:
            raise ApprovalRequired(f"{error.detail}; run: keyreeve approval request create {request_id}") from None
        except ApprovalInvalid as error:  # one that does not hold would stop this creation for ever
            await self._threads.run(self._catalog.drop_approvals, request_id)
            raise ApprovalInvalid(
                f"{error.detail}; what was kept for {request_id} is dropped: submit those that hold again"
            ) from None
        except (InvalidRequest, FailedPrecondition) as error:
            if not isinstance(error, TokenPinIncorrect):
                await self._threads.run(self._catalog.abandon_key, entry.key_id)
            raise
        if made.get("key_id", entry.key_id) != entry.key_id:
            raise Conflict("these approvals made another key already; ask for new ones")
        record = base64.b64decode(made["record"])
        try:
            done = await self._threads.run(
                self._catalog.complete_key,
                entry.key_id,
                backend=backend,
                sealed_record=record,
                spki_der=base64.b64decode(made["spki_der"]),
                attributes=made["attributes"],
            )
        except (StorageBusy, StorageFull):
            await self._destroy_quietly(entry.key_id, record)  # the retry makes it anew; no half-known key stays behind
            raise
        except KeyreeveError as error:
            # A commit whose answer was lost may stand, and then the catalog names this very key: only the retry can tell.
            log_warning("key_creation_in_doubt", key_id=entry.key_id, detail=error.detail)
            raise
        if done is None:
            await self._destroy_quietly(entry.key_id, record)
            return await self._made_elsewhere(entry.key_id)
        self._access.apply_key(done)
        return done

    async def _made_elsewhere(self, key_id: KeyId) -> KeyEntry:
        """Another replica works on the same request: its key, or Unavailable while it has none under this id."""
        try:
            return await self._threads.run(self._catalog.key, key_id)
        except KeyNotFound:
            raise Unavailable("another replica is making this key; retry with the same request_id") from None

    async def _create_renamed(self, entry: KeyEntry, request_id: str) -> KeyEntry:
        """An earlier creation was cut off after the token had made its key: that one was never given out and never will be."""
        log_warning(
            "unused_key_left_in_backend", key_id=entry.key_id, detail="creation was cut off; made under a new id"
        )
        renamed = await self._threads.run(self._catalog.rename_intent, entry.key_id)
        if renamed is None:
            return await self._made_elsewhere(entry.key_id)
        return await self._create(renamed, request_id)

    async def _destroy_quietly(self, key_id: KeyId, record: bytes) -> None:
        try:
            encoded = base64.b64encode(record).decode("ascii")
            await self._link.control("destroy_key", timeout=self._timeout_s, record=encoded)
        except KeyreeveError as error:
            log_warning("unused_key_left_in_backend", key_id=key_id, detail=error.detail)

    def _shown(self, entry: KeyEntry) -> keyserver_pb2.Key:
        return key_to_proto(entry, signatures=self._engine.signatures[entry.key_id])


def page_size(asked: int) -> int:
    """Raises: InvalidRequest."""
    if asked > MAX_PAGE:
        raise InvalidRequest(f"page_size: at most {MAX_PAGE}")
    return asked or DEFAULT_PAGE
