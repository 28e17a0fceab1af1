"""What becomes of keys by itself: destructions are scheduled, cancelled, and carried out when their time has come.

Every replica reaps. Which one ends a key is settled by one conditional UPDATE in the catalog; what a crash left half done any replica finishes.
The catalog says destroyed first, so that no replica uses the key; then the signer destroys it; last its record goes.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from hashlib import sha256
from time import monotonic

from keyreeve_common.approvals import ApprovalRequest, Operation, parse_approval
from keyreeve_common.errors import (
    ApprovalRequired,
    FailedPrecondition,
    InvalidRequest,
    KeyNotFound,
    KeyreeveError,
    NotFound,
)
from keyreeve_common.grpc_edge import current_peer
from keyreeve_common.key_id import KeyId
from keyreeve_common.telemetry import log, log_exception, log_warning
from keyreeve_common.transparency.records import Event

from keyreeve_keyserver.catalog.key_life import RETIRED, Doomed
from keyreeve_keyserver.catalog.records import KeyEntry
from keyreeve_keyserver.config import KeyServerConfig
from keyreeve_keyserver.domain.keys import KeyState
from keyreeve_keyserver.frontend.access import Access, CatalogThreads
from keyreeve_keyserver.frontend.engine import SigningEngine
from keyreeve_keyserver.frontend.signer_link import SignerLink

_SECOND = timedelta(seconds=1)
_JUMP = timedelta(minutes=1)
_SLEWED = 1.001  # a clock that is slewed runs up to 500 ppm fast


class SteadyClock:
    """Never ahead of a clock that runs on evenly since the first look: a clock that is stepped forward ends nothing early.

    One that was wrong before the first look cannot be told from a right one.
    """

    def __init__(self, monotonic_s: Callable[[], float] = monotonic) -> None:
        self._monotonic_s = monotonic_s
        self._first: tuple[datetime, float] | None = None
        self._warned = False

    def at_least(self, now: datetime) -> datetime:
        """For what begins now: `now`, or a later time where the clock went back since the first look."""
        expected = self._expected(now)
        return expected if expected - now > _JUMP else now

    def _expected(self, now: datetime) -> datetime:
        if self._first is None:
            self._first = now, self._monotonic_s()
        began, began_s = self._first
        return began + timedelta(seconds=self._monotonic_s() - began_s) * _SLEWED

    def __call__(self, now: datetime) -> datetime:
        latest = self._expected(now) + _SECOND
        if now > latest + _JUMP and not self._warned:
            self._warned = True
            log_warning("clock_went_ahead", detail="keys end by the clock as it ran before; set it right and restart")
        return min(now, latest)


class KeyLifeService:
    def __init__(
        self,
        *,
        threads: CatalogThreads,
        access: Access,
        link: SignerLink,
        engine: SigningEngine,
        config: KeyServerConfig,
        clock: Callable[[], datetime],
    ) -> None:
        self._threads = threads
        self._access = access
        self._link = link
        self._engine = engine
        self._wait = config.keys.destruction_wait
        self._destroys_retired = config.keys.destroy_retired
        self._timeout_s = config.limits.control_timeout.total_seconds()
        self._clock = clock
        self._steady = SteadyClock()
        self._failing: dict[str, str] = {}

    async def schedule_destruction(
        self, key_id: KeyId, *, after: timedelta | None, approvals: Sequence[str] = ()
    ) -> KeyEntry:
        """Raises: InvalidRequest for a wait below the configured one; FailedPrecondition for a key that is not disabled."""
        wait = self._wait if after is None else after
        if wait < self._wait:
            raise InvalidRequest(f"after: the shortest waiting time here is {int(self._wait / _SECOND)} s")
        entry = await self._threads.run(self._threads.catalog.key, key_id)
        if entry.state is KeyState.DISABLED:
            entry = await self._schedule(entry, wait, approvals, current_peer().name)
        if entry.state not in (KeyState.PENDING_DESTRUCTION, KeyState.DESTROYED):
            assert entry.state is not None  # noqa: S101 - `key` gives finished keys only
            raise FailedPrecondition(f"the key is {entry.state.value}; it must be disabled for this")
        if self._wait == timedelta(0):  # also to go on where an earlier call stopped
            await self._reap_due()
            entry = await self._threads.run(self._threads.catalog.key, key_id)
        return entry

    async def _schedule(self, entry: KeyEntry, wait: timedelta, approvals: Sequence[str], caller: str) -> KeyEntry:
        catalog = self._threads.catalog
        record = await self._threads.run(catalog.sealed_record, entry.key_id)
        if record is None:
            raise FailedPrecondition("the key's record is gone: it is destroyed")
        extra = {"approvals": list(approvals)} if approvals else {}
        answer = await self._link.control(
            "permit_destruction", timeout=self._timeout_s, record=_base64(record), wait_s=int(wait / _SECOND), **extra
        )
        now = await self._threads.run(catalog.database_time, self._clock())
        at = max(self._steady.at_least(now), entry.created_at) + wait  # a clock that went back shortens no waiting time
        permit = base64.b64decode(answer["permit"])
        done = await self._threads.run(catalog.schedule_destruction, entry.key_id, at=at, permit=permit)
        if done is None:  # another administrator was first
            return await self._threads.run(catalog.key, entry.key_id)
        log("key_destruction_scheduled", caller=caller, key_id=entry.key_id, destroy_at=at.isoformat())
        self._engine.trail.note(
            "key_destruction_scheduled", caller=caller, key_id=entry.key_id, destroy_at=at.isoformat()
        )
        self._access.apply_key(done)
        return done

    async def destruction_request(
        self, key_id: KeyId, *, after: timedelta | None, expires: datetime
    ) -> ApprovalRequest:
        """What approvers sign for the destruction of this key."""
        entry = await self._threads.run(self._threads.catalog.key, key_id)
        key = {
            "key_id": key_id,
            "spki_sha256": sha256(entry.spki_der).hexdigest(),
            "role": entry.role.value,
            "label": entry.label,
            "wait_s": int((self._wait if after is None else after) / _SECOND),
        }
        request_id = f"destroy-{secrets.token_hex(16)}"
        return ApprovalRequest(Operation.DESTROY_KEY, request_id, _whole_seconds(expires), key)

    async def creation_request(self, request_id: str, *, expires: datetime) -> ApprovalRequest:
        """What approvers sign for the key that this request id asked for. Raises: NotFound when no such creation waits."""
        intent = await self._threads.run(self._threads.catalog.intent, request_id)
        if intent is None:
            raise NotFound("no creation waits under this request id; ask for the key first")
        profile = intent.authority_profile
        key = {
            "key_type": intent.key_type.value,
            "role": intent.role.value,
            "purposes": sorted(purpose.label for purpose in intent.purposes),
            "backend": intent.backend or str(self._link.capabilities.get("default_backend", "")),
            "label": intent.label,
            "authority_profile": profile.to_json() if profile else None,
            "jwt_profile": intent.jwt_profile.to_json() if intent.jwt_profile else None,
        }
        return ApprovalRequest(Operation.CREATE_KEY, request_id, _whole_seconds(expires), key)

    async def keep_approvals(self, texts: Sequence[str]) -> tuple[str, list[str]]:
        """The request id, and all approvers whose approvals of this request are kept. Whether they hold, the signer says.

        Raises: ApprovalInvalid, InvalidRequest.
        """
        approvals = [parse_approval(text) for text in texts]
        if len({approval.request.digest for approval in approvals}) != 1:
            raise InvalidRequest("approvals: give one or more, all of the same request")
        request = approvals[0].request
        if request.operation is not Operation.CREATE_KEY:
            raise InvalidRequest("approvals of a destruction go with it: keyreeve key destroy --approval")
        now = self._clock()
        kept = await self._threads.run(self._threads.catalog.keep_approvals, approvals, now=now)
        log("approvals_kept", caller=current_peer().name, request_id=request.request_id, approvers=",".join(kept))
        return request.request_id, kept

    async def cancel_destruction(self, key_id: KeyId) -> KeyEntry:
        """Raises: FailedPrecondition when nothing is scheduled, or it is too late."""
        entry = await self._threads.run(self._threads.catalog.cancel_destruction, key_id)
        if entry is None:
            entry = await self._threads.run(self._threads.catalog.key, key_id)
            if entry.state is KeyState.DESTROYED:
                raise FailedPrecondition("the key is destroyed")
            return entry
        log("key_destruction_cancelled", caller=current_peer().name, key_id=key_id)
        self._engine.trail.note("key_destruction_cancelled", caller=current_peer().name, key_id=key_id)
        self._access.apply_key(entry)
        return entry

    async def retire(self, key_id: KeyId, *, at: datetime) -> KeyEntry:
        """Has an enabled key disabled at this time. Raises: FailedPrecondition."""
        entry = await self._threads.run(self._threads.catalog.set_retirement, key_id, at=at)
        if entry is None:
            entry = await self._threads.run(self._threads.catalog.key, key_id)
            assert entry.state is not None  # noqa: S101 - `key` gives finished keys only
            raise FailedPrecondition(f"the key is {entry.state.value}; only an enabled one is retired")
        self._engine.trail.note("key_retirement_set", caller=current_peer().name, key_id=key_id, at=at.isoformat())
        log("key_retirement_set", caller=current_peer().name, key_id=key_id, retire_at=at.isoformat())
        self._access.apply_key(entry)
        return entry

    async def attest(self, key_id: KeyId, nonce: bytes) -> tuple[str, bytes]:
        """The attestation, and the public key (SPKI, DER) that it verifies with. Raises: KeyNotFound, what the signer refuses with."""
        catalog = self._threads.catalog
        states = (KeyState.ENABLED, KeyState.DISABLED)
        record = await self._threads.run(catalog.sealed_record, key_id, states=states)
        if record is None:
            raise KeyNotFound("no such key, or it is destroyed")
        sealed = await self._threads.run(catalog.attestation_key)
        if sealed is None:
            made = await self._link.control("make_attestation_key", timeout=self._timeout_s)
            fresh = base64.b64decode(made["attestation_key"])
            sealed = await self._threads.run(catalog.keep_attestation_key, fresh)
        arguments = {"record": _base64(record), "nonce": _base64(nonce), "attestation_key": _base64(sealed)}
        answer = await self._link.control("attest_key", timeout=self._timeout_s, **arguments)
        self._engine.trail.note("key_attested", caller=current_peer().name, key_id=key_id)
        log("key_attested", caller=current_peer().name, key_id=key_id)
        return str(answer["attestation"]), base64.b64decode(answer["public_key"])

    async def reap(self, interval: timedelta) -> None:
        """Rounds until it is cancelled. What fails is tried again in the next one."""
        while True:
            try:
                await self._reap_due()
                self._failing.pop("", None)
            except KeyreeveError as error:
                self._complain("", error)
            except Exception:
                log_exception("reaping_failed")
            await asyncio.sleep(interval.total_seconds())

    async def _reap_due(self) -> None:
        catalog = self._threads.catalog
        now = self._steady(await self._threads.run(catalog.database_time, self._clock()))
        for entry in await self._threads.run(catalog.retire_due, now=now):
            self._engine.trail.note(Event.KEY_DISABLED, key_id=entry.key_id, reason=RETIRED)
            log("key_state_changed", caller="reaper", key_id=entry.key_id, state=KeyState.DISABLED.value)
            self._access.apply_key(entry)
            self._engine.forget(entry.key_id)
        if self._destroys_retired:
            await self._schedule_retired()
        for entry in await self._threads.run(catalog.begin_destructions, now=now):
            log("key_state_changed", caller="reaper", key_id=entry.key_id, state=KeyState.DESTROYED.value)
            self._access.apply_key(entry)
        page = await self._threads.run(catalog.unfinished_destructions)
        while page:
            for doomed in page:
                try:
                    await self._destroy(doomed)
                    self._failing.pop(doomed.key_id, None)
                except KeyreeveError as error:
                    self._complain(doomed.key_id, error)
            page = await self._threads.run(catalog.unfinished_destructions, after=page[-1].key_id)

    async def _schedule_retired(self) -> None:
        """Where approvals are asked for this waits for an administrator who has them."""
        for entry in await self._threads.run(self._threads.catalog.retired_keys):
            try:
                await self._schedule(entry, self._wait, (), "reaper")
                self._failing.pop(entry.key_id, None)
            except ApprovalRequired as error:
                self._complain(entry.key_id, error)
                return  # it will be of all others
            except KeyreeveError as error:
                self._complain(entry.key_id, error)

    async def _destroy(self, doomed: Doomed) -> None:
        permit = {"permit": _base64(doomed.permit)} if doomed.permit else {}
        await self._link.control("destroy_key", timeout=self._timeout_s, record=_base64(doomed.sealed_record), **permit)
        await self._threads.run(self._threads.catalog.wipe_record, doomed.key_id)

    def _complain(self, key_id: str, error: KeyreeveError) -> None:
        """Once for each kind of failure, not in every round."""
        if self._failing.get(key_id) != error.code.value:
            self._failing[key_id] = error.code.value
            log_warning("key_destruction_waits", key_id=key_id, code=error.code.value, detail=error.detail)


def _whole_seconds(time: datetime) -> datetime:
    return time.replace(microsecond=0)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
