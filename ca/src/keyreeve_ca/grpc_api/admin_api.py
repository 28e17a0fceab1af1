"""For administrators: entries, nodes, SVIDs, authorities; and health for anyone."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypeVar

from keyreeve_common.errors import KeyreeveError
from keyreeve_common.identity import SpiffeId
from keyreeve_common.telemetry import log_warning
from keyreeve_common.v1 import ca_pb2, ca_pb2_grpc, types_pb2

from keyreeve_ca.assignment_service import renew_entry_svid
from keyreeve_ca.authority_service import activate_authority, prepare_authority
from keyreeve_ca.domain.authority import active_authority
from keyreeve_ca.entry_service import create_entry, delete_entry, get_entry, list_entries, update_entry
from keyreeve_ca.grpc_api.feed import ChangeFeed
from keyreeve_ca.grpc_api.protos import (
    agent_to_proto,
    authority_to_proto,
    duration,
    entry_from_proto,
    entry_to_proto,
    page_size,
    svid_to_proto,
    timestamp,
)
from keyreeve_ca.node_service import ban_agent, create_join_token, evict_agent, list_agents, unban_agent
from keyreeve_ca.rotation_service import rotate_entry_key
from keyreeve_ca.service import Ca, current_bundle, list_svids
from keyreeve_ca.withdrawal_service import withdraw_grants

R = TypeVar("R")


class _Servicer:
    def __init__(self, ca: Ca, feed: ChangeFeed) -> None:
        self._ca = ca
        self._feed = feed

    async def _change(self, use_case: Callable[..., R], *arguments: Any, **named: Any) -> R:
        """Runs a use case that nodes must hear of, and carries out the withdrawals that follow from it."""
        try:
            return await asyncio.to_thread(use_case, self._ca, *arguments, **named)
        finally:
            self._feed.nudge()

    async def _change_and_withdraw(self, use_case: Callable[..., R], *arguments: Any) -> R:
        result = await self._change(use_case, *arguments)
        try:
            await asyncio.to_thread(withdraw_grants, self._ca)
        except KeyreeveError as error:  # it is on record; the background tries again
            log_warning("withdrawal_waits", code=error.code.value, detail=error.detail)
        return result


class EntriesServicer(_Servicer, ca_pb2_grpc.EntriesServicer):
    async def CreateEntry(self, request: ca_pb2.CreateEntryRequest, context: Any) -> ca_pb2.Entry:
        entry = entry_from_proto(request.entry, entry_id=str(uuid.uuid4()), now=self._ca.clock())
        return entry_to_proto(await self._change(create_entry, entry))

    async def GetEntry(self, request: ca_pb2.GetEntryRequest, context: Any) -> ca_pb2.Entry:
        return entry_to_proto(await asyncio.to_thread(get_entry, self._ca, request.entry_id))

    async def ListEntries(self, request: ca_pb2.ListEntriesRequest, context: Any) -> ca_pb2.ListEntriesResponse:
        limit = page_size(request.page_size)
        found = await asyncio.to_thread(
            list_entries,
            self._ca,
            spiffe_id=request.spiffe_id,
            parent_id=request.parent_id,
            limit=limit + 1,
            after=request.page_token,
        )
        more = found[limit - 1].entry_id if len(found) > limit else ""
        return ca_pb2.ListEntriesResponse(entries=map(entry_to_proto, found[:limit]), next_page_token=more)

    async def UpdateEntry(self, request: ca_pb2.UpdateEntryRequest, context: Any) -> ca_pb2.Entry:
        entry = entry_from_proto(request.entry, entry_id=request.entry.entry_id, now=self._ca.clock())
        read_revision = request.entry.revision
        return entry_to_proto(await self._change(update_entry, entry, read_revision=read_revision))

    async def RotateEntryKey(self, request: ca_pb2.RotateEntryKeyRequest, context: Any) -> ca_pb2.X509SvidRecord:
        return svid_to_proto(await self._change(rotate_entry_key, request.entry_id))

    async def DeleteEntry(self, request: ca_pb2.DeleteEntryRequest, context: Any) -> ca_pb2.DeleteEntryResponse:
        await self._change_and_withdraw(delete_entry, request.entry_id)
        return ca_pb2.DeleteEntryResponse()


class NodesServicer(_Servicer, ca_pb2_grpc.NodesServicer):
    def __init__(self, ca: Ca, feed: ChangeFeed, is_connected: Callable[[SpiffeId], bool]) -> None:
        super().__init__(ca, feed)
        self._is_connected = is_connected

    async def CreateJoinToken(self, request: ca_pb2.CreateJoinTokenRequest, context: Any) -> ca_pb2.JoinToken:
        text, token = await asyncio.to_thread(
            create_join_token, self._ca, agent_id=request.agent_id, ttl=duration(request, "ttl")
        )
        return ca_pb2.JoinToken(token=text, agent_id=str(token.agent_id), expires_at=timestamp(token.expires_at))

    async def ListAgents(self, request: ca_pb2.ListAgentsRequest, context: Any) -> ca_pb2.ListAgentsResponse:
        limit = page_size(request.page_size)
        found = await asyncio.to_thread(list_agents, self._ca, limit=limit + 1, after=request.page_token)
        more = str(found[limit - 1].spiffe_id) if len(found) > limit else ""
        shown = [agent_to_proto(each, connected=self._is_connected(each.spiffe_id)) for each in found[:limit]]
        return ca_pb2.ListAgentsResponse(agents=shown, next_page_token=more)

    async def EvictAgent(self, request: ca_pb2.EvictAgentRequest, context: Any) -> ca_pb2.Agent:
        return agent_to_proto(await self._change_and_withdraw(evict_agent, request.spiffe_id), connected=False)

    async def BanAgent(self, request: ca_pb2.BanAgentRequest, context: Any) -> ca_pb2.Agent:
        return agent_to_proto(await self._change_and_withdraw(ban_agent, request.spiffe_id), connected=False)

    async def UnbanAgent(self, request: ca_pb2.UnbanAgentRequest, context: Any) -> ca_pb2.Agent:
        return agent_to_proto(await self._change(unban_agent, request.spiffe_id), connected=False)


class SvidsServicer(_Servicer, ca_pb2_grpc.SvidsServicer):
    async def ListSvids(self, request: ca_pb2.ListSvidsRequest, context: Any) -> ca_pb2.ListSvidsResponse:
        limit = page_size(request.page_size)
        found = await asyncio.to_thread(
            list_svids,
            self._ca,
            spiffe_id=request.spiffe_id,
            serial=request.serial,
            current_only=request.current_only,
            limit=limit + 1,
            after=request.page_token,
        )
        more = found[limit - 1].serial if len(found) > limit else ""
        return ca_pb2.ListSvidsResponse(svids=map(svid_to_proto, found[:limit]), next_page_token=more)

    async def RenewSvids(self, request: ca_pb2.RenewSvidsRequest, context: Any) -> ca_pb2.ListSvidsResponse:
        record = await self._change(renew_entry_svid, request.entry_id)
        return ca_pb2.ListSvidsResponse(svids=[svid_to_proto(record)])


class AuthoritiesServicer(_Servicer, ca_pb2_grpc.AuthoritiesServicer):
    async def ListAuthorities(
        self, request: ca_pb2.ListAuthoritiesRequest, context: Any
    ) -> ca_pb2.ListAuthoritiesResponse:
        found = await asyncio.to_thread(self._ca.store.list_authorities)
        return ca_pb2.ListAuthoritiesResponse(authorities=map(authority_to_proto, found))

    async def PrepareAuthority(self, request: ca_pb2.PrepareAuthorityRequest, context: Any) -> ca_pb2.Authority:
        return authority_to_proto(await self._change(prepare_authority))

    async def ActivateAuthority(self, request: ca_pb2.ActivateAuthorityRequest, context: Any) -> ca_pb2.Authority:
        return authority_to_proto(await self._change(activate_authority, request.authority_id))

    async def GetBundle(self, request: ca_pb2.GetBundleRequest, context: Any) -> types_pb2.Bundle:
        return (await asyncio.to_thread(current_bundle, self._ca)).to_proto()


class HealthServicer(ca_pb2_grpc.HealthServicer):
    def __init__(self, ca: Ca) -> None:
        self._ca = ca

    async def Check(self, request: ca_pb2.HealthRequest, context: Any) -> ca_pb2.HealthResponse:
        return await asyncio.to_thread(self._check)

    def _check(self) -> ca_pb2.HealthResponse:
        problems: list[str] = []
        response = ca_pb2.HealthResponse(version=version("keyreeve-ca"))
        try:
            active = active_authority(self._ca.store.list_authorities())
            response.active_authority_not_after.FromDatetime(active.not_after)
            if active.is_expired(self._ca.clock()):
                problems.append("active issuing authority has expired")
        except KeyreeveError as error:
            problems.append(error.detail)
        problems += [f"key server {replica.name}: {detail}" for replica, detail in self._key_servers()]
        response.serving, response.detail = not problems, "; ".join(problems)
        return response

    def _key_servers(self) -> list[tuple[Any, str]]:
        found: list[tuple[Any, str]] = []
        for replica in self._ca.cluster.replicas():
            try:
                health = replica.check_health()
                if not health.serving:
                    found.append((replica, health.detail or "does not serve"))
            except KeyreeveError as error:
                found.append((replica, error.detail))
        return found
