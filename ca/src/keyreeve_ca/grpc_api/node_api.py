"""For nodes: attestation, renewal, and the stream of assignments."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any, TypeVar

from keyreeve_common.errors import InvalidRequest, KeyreeveError, Overloaded
from keyreeve_common.grpc_edge import Peer, current_peer
from keyreeve_common.identity import SpiffeId
from keyreeve_common.telemetry import log, log_warning
from keyreeve_common.v1 import ca_pb2, ca_pb2_grpc
from keyreeve_common.x509_svid import X509Svid

from keyreeve_ca.assignment_service import Assignment, renew_at, sync_agent
from keyreeve_ca.domain.attestation import check_agent_version
from keyreeve_ca.domain.records import digest_of
from keyreeve_ca.grpc_api.feed import ChangeFeed
from keyreeve_ca.grpc_api.protos import assignments_to_proto
from keyreeve_ca.node_service import attest_node, authorise_agent, renew_agent_svid
from keyreeve_ca.service import Ca, current_bundle

R = TypeVar("R")
FIRST_RETRY = timedelta(seconds=1)
LONGEST_RETRY = timedelta(seconds=30)
LONGEST_WAIT = timedelta(minutes=1)  # where few agents are connected
LOOKS_PER_SECOND = 20  # at all agents together, where nothing asks for one
LONGEST_WAIT_OF_MANY = timedelta(minutes=15)
SHORTEST_WAIT = timedelta(milliseconds=200)
SYNC_WORKERS = 8  # syncs at a time: the others wait in line, and administrators' calls have workers of their own
MAX_STREAMS_PER_AGENT = 8
_STREAMS_RETRY = timedelta(seconds=5)


class NodeAttestationServicer(ca_pb2_grpc.NodeAttestationServicer):
    def __init__(self, ca: Ca, feed: ChangeFeed) -> None:
        self._ca = ca
        self._feed = feed

    async def AttestNode(self, request: ca_pb2.AttestNodeRequest, context: Any) -> ca_pb2.AttestNodeResponse:
        if request.WhichOneof("attestation") != "join_token":
            raise InvalidRequest("attestation: only join_token is offered")
        spiffe_id, record, bundle = await asyncio.to_thread(
            attest_node,
            self._ca,
            token=request.join_token.token,
            csr_der=request.csr_der,
            agent_version=request.agent_version,
        )
        self._feed.nudge()
        return ca_pb2.AttestNodeResponse(spiffe_id=str(spiffe_id), chain_der=record.chain_der, bundle=bundle.to_proto())


class AgentsServicer(ca_pb2_grpc.AgentsServicer):
    """`connected` counts the open streams of each agent."""

    def __init__(self, ca: Ca, feed: ChangeFeed, clock: Callable[[], datetime]) -> None:
        self._ca = ca
        self._feed = feed
        self._clock = clock
        self.connected: Counter[SpiffeId] = Counter()  # without those that have no stream
        self._workers = ThreadPoolExecutor(SYNC_WORKERS, thread_name_prefix="sync")

    def close(self) -> None:
        """Waits for the syncs that are under way; those in line are given up."""
        self._workers.shutdown(cancel_futures=True)

    async def RenewAgentSvid(
        self, request: ca_pb2.RenewAgentSvidRequest, context: Any
    ) -> ca_pb2.RenewAgentSvidResponse:
        caller = current_peer().require_svid(self._clock())
        record = await asyncio.to_thread(renew_agent_svid, self._ca, caller, request.csr_der)
        return ca_pb2.RenewAgentSvidResponse(chain_der=record.chain_der)

    async def WatchAssignments(
        self, request: ca_pb2.WatchAssignmentsRequest, context: Any
    ) -> AsyncIterator[ca_pb2.Assignments]:
        """Full state at once, then on every change; the caller is authorised again before each push."""
        peer = current_peer()
        caller = peer.require_svid(self._clock())
        agent, version = caller.spiffe_id, check_agent_version(request.agent_version)
        if self.connected[agent] >= MAX_STREAMS_PER_AGENT:
            raise Overloaded(f"{MAX_STREAMS_PER_AGENT} streams of this agent are open", retry_after=_STREAMS_RETRY)
        self.connected[agent] += 1
        try:
            await self._in_line(self._arrive, caller, version)
            log("agent_connected", agent_id=str(agent))
            async for message in self._states(peer, agent):
                yield message
        finally:
            self.connected[agent] -= 1
            if not self.connected[agent]:
                del self.connected[agent]
            log("agent_disconnected", agent_id=str(agent))

    async def _in_line(self, work: Callable[..., R], *arguments: Any) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._workers, work, *arguments)

    def _arrive(self, caller: X509Svid, version: str) -> None:
        authorise_agent(self._ca, caller)
        self._ca.store.touch_agent(caller.spiffe_id, seen_at=self._clock(), version=version)

    async def _states(self, peer: Peer, agent: SpiffeId) -> AsyncIterator[ca_pb2.Assignments]:
        last: ca_pb2.Assignments | None = None
        retry = FIRST_RETRY
        with self._feed.watch(agent) as watch:
            while True:
                watch.begin_look()
                message, wait = await self._look(peer, agent, retry)
                failing = message is None or any(each.HasField("error") for each in message.assignments)
                retry = min(retry * 2, LONGEST_RETRY) if failing else FIRST_RETRY
                if message is not None and not _same(message, last):
                    message.sequence = max(message.sequence, last.sequence + 1 if last else 0)
                    last = message
                    yield message
                await watch.wait(at_most=wait)

    async def _look(self, peer: Peer, agent: SpiffeId, retry: timedelta) -> tuple[ca_pb2.Assignments | None, timedelta]:
        """The state of now, and when to look again. None while the store is away: the agent keeps what it has."""
        caller = peer.require_svid(self._clock())
        try:
            return await self._in_line(self._state, caller, agent, retry)
        except KeyreeveError as error:
            if error.rendering.http < 500:
                raise
            log_warning("assignments_wait", agent_id=str(agent), code=error.code.value, detail=error.detail)
            return None, retry

    def _state(self, caller: X509Svid, agent: SpiffeId, retry: timedelta) -> tuple[ca_pb2.Assignments, timedelta]:
        authorise_agent(self._ca, caller)
        assignments = sync_agent(self._ca, agent)
        message = assignments_to_proto(self._ca.store.change_sequence(), assignments, current_bundle(self._ca))
        authorise_agent(self._ca, caller)  # it may have been evicted while keys were made
        return message, self._next_look(assignments, caller, retry)

    def _next_look(self, assignments: list[Assignment], caller: X509Svid, retry: timedelta) -> timedelta:
        if not all(each.is_ready for each in assignments):
            return retry
        now = self._clock()
        due = [renew_at(each.svid) - now for each in assignments if each.svid is not None]
        due += [each.entry.expires_at - now for each in assignments if each.entry.expires_at is not None]
        return max(SHORTEST_WAIT, min([self._longest_wait(caller.spiffe_id), caller.not_after - now, *due]))

    def _longest_wait(self, agent: SpiffeId) -> timedelta:
        """A minute, or more where many agents are connected; each its own up to a fifth less, so that they do not come as one."""
        wait = min(max(LONGEST_WAIT, timedelta(seconds=len(self.connected) / LOOKS_PER_SECOND)), LONGEST_WAIT_OF_MANY)
        return wait * (1 - int(digest_of(agent)[:4], 16) / 0xFFFF / 5)


def _same(new: ca_pb2.Assignments, old: ca_pb2.Assignments | None) -> bool:
    if old is None:
        return False
    return list(new.assignments) == list(old.assignments) and new.bundle == old.bundle
