"""The Grants service: who may use which key. A change is in force here when its call returns, and at other replicas within a second."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from keyreeve_common.errors import InvalidRequest
from keyreeve_common.grpc_edge import current_peer
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.key_id import parse_key_id
from keyreeve_common.telemetry import log
from keyreeve_common.transparency.records import Event
from keyreeve_common.v1 import keyserver_pb2, keyserver_pb2_grpc

from keyreeve_keyserver.catalog.records import GrantEntry
from keyreeve_keyserver.domain.policy import Grant, check_expiry, check_grantable
from keyreeve_keyserver.frontend.access import Access, CatalogThreads
from keyreeve_keyserver.frontend.audit_trail import AuditTrail
from keyreeve_keyserver.frontend.key_admin import page_size
from keyreeve_keyserver.frontend.protos import grant_to_proto, purposes_from_proto, rate_from_proto, time_from_proto


class GrantsServicer(keyserver_pb2_grpc.GrantsServicer):
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

    async def CreateGrant(self, request: keyserver_pb2.CreateGrantRequest, context: Any) -> keyserver_pb2.Grant:
        now = self._clock()
        key_id = parse_key_id(request.key_id)
        holder = self._holder(request.holder)
        purposes = purposes_from_proto(request.purposes)
        expires_at = time_from_proto(request.expires_at, "expires_at") if request.HasField("expires_at") else None
        rate = rate_from_proto(request.rate) if request.HasField("rate") else None
        key = await self._threads.run(self._threads.catalog.key, key_id)
        check_grantable(key.facts, purposes, expires_at, now)
        grant = Grant(key_id, holder, purposes, created_at=now, expires_at=expires_at, rate=rate)
        # The CA makes grants anew by itself: that does not undo an operator's limit.
        keep_rate = not current_peer().local
        async with self._trail.recorded(Event.GRANT_CREATED, **_facts(grant)):
            entry = await self._threads.run(self._threads.catalog.put_grant, grant, keep_rate=keep_rate)
        self._access.apply_key(key)
        return self._done("grant_created", entry)

    async def ExtendGrant(self, request: keyserver_pb2.ExtendGrantRequest, context: Any) -> keyserver_pb2.Grant:
        if not request.HasField("expires_at"):
            raise InvalidRequest("expires_at: is missing")
        now = self._clock()
        expires_at = time_from_proto(request.expires_at, "expires_at")
        check_expiry(expires_at, now)
        key_id, holder = parse_key_id(request.key_id), self._holder(request.holder)
        facts = {
            "caller": current_peer().name,
            "key_id": key_id,
            "holder": holder,
            "expires_at": expires_at.isoformat(),
        }
        async with self._trail.recorded(Event.GRANT_EXTENDED, **facts):
            entry = await self._threads.run(
                self._threads.catalog.extend_grant, key_id, holder, expires_at=expires_at, now=now
            )
        return self._done("grant_extended", entry)

    async def RevokeGrant(self, request: keyserver_pb2.RevokeGrantRequest, context: Any) -> keyserver_pb2.Grant:
        entry = await self._threads.run(
            self._threads.catalog.revoke_grant,
            parse_key_id(request.key_id),
            self._holder(request.holder),
            now=self._clock(),
        )
        # Taking power away waits for no record: whoever fills the log's disk must not keep access by it.
        self._trail.note(Event.GRANT_REVOKED, **_facts(entry.grant))
        return self._done("grant_revoked", entry)

    async def ListGrants(
        self, request: keyserver_pb2.ListGrantsRequest, context: Any
    ) -> keyserver_pb2.ListGrantsResponse:
        limit = page_size(request.page_size)
        found = await self._threads.run(
            self._threads.catalog.list_grants,
            limit=limit + 1,
            after=_parse_token(request.page_token),
            key_id=parse_key_id(request.key_id) if request.key_id else "",
            holder=self._holder(request.holder) if request.holder else "",
        )
        last = found[limit - 1].grant if len(found) > limit else None
        return keyserver_pb2.ListGrantsResponse(
            grants=[grant_to_proto(entry.grant) for entry in found[:limit]],
            next_page_token=f"{last.key_id} {last.holder}" if last else "",
        )

    def _holder(self, text: str) -> str:
        spiffe_id = SpiffeId.parse(text)
        if not spiffe_id.member_of(self._trust_domain) or spiffe_id.is_trust_domain_id:
            raise InvalidRequest(f"holder: is not a SPIFFE ID with a path in trust domain {self._trust_domain}")
        return str(spiffe_id)

    def _done(self, event: str, entry: GrantEntry) -> keyserver_pb2.Grant:
        self._access.apply_grant(entry)
        log(event, caller=current_peer().name, key_id=entry.grant.key_id, holder=entry.grant.holder)
        return grant_to_proto(entry.grant)


def _facts(grant: Grant) -> dict[str, str]:
    return {
        "caller": current_peer().name,
        "key_id": grant.key_id,
        "holder": grant.holder,
        "purposes": ",".join(sorted(purpose.label for purpose in grant.purposes)),
        "expires_at": grant.expires_at.isoformat() if grant.expires_at else "",
        "rate": f"{grant.rate.per_second:g}/s burst {grant.rate.burst}" if grant.rate else "",
    }


def _parse_token(token: str) -> tuple[str, str]:
    if not token:
        return "", ""
    key_id, _, holder = token.partition(" ")
    return parse_key_id(key_id), str(SpiffeId.parse(holder))
