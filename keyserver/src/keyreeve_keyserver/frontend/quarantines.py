"""The Quarantines service: which holders may not sign. Only operators on a key host set and lift: an owned CA must not let itself out."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from keyreeve_common.errors import InvalidRequest
from keyreeve_common.grpc_edge import current_peer
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.telemetry import log_warning
from keyreeve_common.v1 import keyserver_pb2, keyserver_pb2_grpc

from keyreeve_keyserver.catalog.records import QuarantineEntry
from keyreeve_keyserver.domain.policy import check_expiry
from keyreeve_keyserver.domain.quarantine import MAX_REASON_BYTES, Cause, Quarantine
from keyreeve_keyserver.frontend.access import Access, CatalogThreads
from keyreeve_keyserver.frontend.audit_trail import AuditTrail
from keyreeve_keyserver.frontend.key_admin import page_size
from keyreeve_keyserver.frontend.protos import time_from_proto, time_to_proto

_CAUSES = {cause: keyserver_pb2.QuarantineCause.Value(f"QUARANTINE_CAUSE_{cause.name}") for cause in Cause}


class QuarantinesServicer(keyserver_pb2_grpc.QuarantinesServicer):
    def __init__(
        self,
        *,
        threads: CatalogThreads,
        access: Access,
        trust_domain: TrustDomain,
        clock: Callable[[], datetime],
        trail: AuditTrail | None = None,
    ) -> None:
        self._threads = threads
        self._access = access
        self._trust_domain = trust_domain
        self._clock = clock
        self._trail = trail or AuditTrail()

    async def AddQuarantine(
        self, request: keyserver_pb2.AddQuarantineRequest, context: Any
    ) -> keyserver_pb2.Quarantine:
        now = self._clock()
        until = time_from_proto(request.until, "until") if request.HasField("until") else None
        check_expiry(until, now)
        reason = request.reason.strip()
        if not reason or not reason.isprintable() or len(reason.encode()) > MAX_REASON_BYTES:
            raise InvalidRequest(f"reason: 1 to {MAX_REASON_BYTES} bytes, printable")
        new = Quarantine(self._holder(request.holder), Cause.OPERATOR, reason, current_peer().name, now, until)
        entry = await self._threads.run(self._threads.catalog.put_quarantine, new)
        self._access.apply_quarantine(entry)
        log_warning("holder_quarantined", caller=new.set_by, holder=new.holder, cause=new.cause.value, reason=reason)
        self._trail.note(
            "holder_quarantined", caller=new.set_by, holder=new.holder, cause=new.cause.value, reason=reason
        )
        return _to_proto(entry)

    async def LiftQuarantine(
        self, request: keyserver_pb2.LiftQuarantineRequest, context: Any
    ) -> keyserver_pb2.Quarantine:
        holder = self._holder(request.holder)
        async with self._trail.recorded("quarantine_lifted", caller=current_peer().name, holder=holder):
            entry = await self._threads.run(self._threads.catalog.lift_quarantine, holder, now=self._clock())
        self._access.apply_quarantine(entry)
        log_warning("quarantine_lifted", caller=current_peer().name, holder=holder)
        return _to_proto(entry)

    async def ListQuarantines(
        self, request: keyserver_pb2.ListQuarantinesRequest, context: Any
    ) -> keyserver_pb2.ListQuarantinesResponse:
        limit = page_size(request.page_size)
        found = await self._threads.run(
            self._threads.catalog.list_quarantines,
            limit=limit + 1,
            after=str(SpiffeId.parse(request.page_token)) if request.page_token else "",
            holding_at=None if request.include_ended else self._clock(),
        )
        more = found[limit - 1].quarantine.holder if len(found) > limit else ""
        return keyserver_pb2.ListQuarantinesResponse(
            quarantines=[_to_proto(entry) for entry in found[:limit]], next_page_token=more
        )

    def _holder(self, text: str) -> str:
        spiffe_id = SpiffeId.parse(text)
        if not spiffe_id.member_of(self._trust_domain) or spiffe_id.is_trust_domain_id:
            raise InvalidRequest(f"holder: is not a SPIFFE ID with a path in trust domain {self._trust_domain}")
        return str(spiffe_id)


def _to_proto(entry: QuarantineEntry) -> keyserver_pb2.Quarantine:
    quarantine = entry.quarantine
    return keyserver_pb2.Quarantine(
        holder=quarantine.holder,
        cause=_CAUSES[quarantine.cause],
        reason=quarantine.reason,
        set_by=quarantine.set_by,
        since=time_to_proto(quarantine.since),
        until=time_to_proto(quarantine.until),
        lifted_at=time_to_proto(quarantine.lifted_at),
    )
