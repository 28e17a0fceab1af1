"""One agent from start to drain: attest, take up or fetch the assignments, open the sign socket, say ready, serve, drain.

Ready means: attested, one state of assignments in use (from the CA, or kept from before while the CA is away), every proxy's files tried
once, and the sign socket open.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from keyreeve_common.event_loop import loop_name
from keyreeve_common.key_reference import KeyReference
from keyreeve_common.prometheus_export import MetricsServer
from keyreeve_common.telemetry import log, log_warning, notify_ready
from keyreeve_common.tracing import open_tracing
from keyreeve_common.x509_svid import to_pem

from keyreeve_client.agent.assignments import AgentState, Assignment, CurrentKeys, utc_now
from keyreeve_client.agent.attestation import NodeIdentity
from keyreeve_client.agent.config import AgentConfig
from keyreeve_client.agent.file_sink import SvidFiles
from keyreeve_client.agent.key_cluster import KeyCluster, balancer_settings
from keyreeve_client.agent.metrics import watch_agent
from keyreeve_client.agent.publisher import Publisher, sink_of
from keyreeve_client.agent.sign_listener import bind_sign_socket, remove_sign_socket
from keyreeve_client.agent.sign_server import SignServer
from keyreeve_client.agent.state_dir import StateDir
from keyreeve_client.agent.status import StatusWriter
from keyreeve_client.agent.sync import Sync
from keyreeve_client.channel import ReloadingChannel

_OWN_DESCRIPTORS = 256


def allow_connections(wanted: int) -> None:
    """Raises the soft limit of descriptors, two for each connection, as far as the hard limit lets it."""
    needed = 2 * wanted + _OWN_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < needed:
        log_warning("descriptors_short", limit=soft, needed=needed, what_to_do="raise LimitNOFILE")


def check(config: AgentConfig) -> None:
    """What can be known to be wrong before anything starts. Raises: ConfigInvalid."""
    for proxy in config.proxy:
        sink_of(proxy).ownership.ids()


@dataclass
class Agent:
    """Run it once, in an event loop of its own."""

    config: AgentConfig

    async def run(self) -> None:
        """Until SIGTERM or SIGINT. Raises: KeyreeveError when it cannot start."""
        check(self.config)
        allow_connections(self.config.sign_socket.max_connections)
        state = StateDir(self.config.state_dir)
        lock = state.lock()
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, log, "sighup_ignored")
        try:
            await self._serve(NodeIdentity(self.config, state), stop)
        finally:
            os.close(lock)

    async def _serve(self, identity: NodeIdentity, stop: asyncio.Event) -> None:
        if await _unless(stop, identity.establish()):
            return
        self._parts(identity)
        metrics = MetricsServer([watch_agent(identity, self._sync, self._server, self._cluster).snapshot])
        if address := self.config.telemetry.metrics_listen:
            metrics.start(address)
        try:
            async with asyncio.TaskGroup() as group:
                background = [
                    group.create_task(work, name=name)
                    for name, work in (
                        ("renew", identity.renew_forever(self._ca)),
                        ("sync", self._sync.run_forever()),
                        ("recheck", self._sync.recheck_forever()),
                        *((f"publish-{item.config.name}", item.run_forever()) for item in self._publishers),
                    )
                ]
                self._sync.restore()
                if not await _unless(stop, self._become_ready()):
                    background.append(group.create_task(self._status.run_forever(), name="status"))
                    await stop.wait()
                    log("agent_draining", outstanding=self._server.counts.outstanding_total)
                    await self._server.drain(self.config.drain_timeout)
                    remove_sign_socket(self.config.sign_socket.path)
                for task in background:
                    task.cancel()
        finally:
            await asyncio.to_thread(metrics.close)
            await asyncio.to_thread(self._tracing.close)
            await self._cluster.close()
            await self._ca.close()
        await self._status.write()
        log("agent_stopped")

    def _parts(self, identity: NodeIdentity) -> None:
        config = self.config
        keys = CurrentKeys()
        self._tracing = open_tracing(config.telemetry, "keyreeve-agent")
        self._ca = ReloadingChannel(config.ca.address, identity.files(), server_id=config.ca_id)
        self._cluster = KeyCluster(
            config.key_server.addresses,
            identity.files(),
            server_id=config.key_server_id,
            settings=balancer_settings(config.key_server),
            connections=config.key_server.connections,
        )
        self._server = SignServer(config.sign_socket, keys, self._cluster.begin, tracing=self._tracing)
        self._publishers = [Publisher(proxy, on_change=self._touch) for proxy in config.proxy]
        self._sync = Sync(identity, self._ca, keys, on_state=self._publish)
        self._identity = identity
        self._status = StatusWriter(
            identity, self._sync, self._server, self._cluster, self._publishers, started_at=utc_now()
        )
        identity.on_change = self._status.touch
        identity.on_renewed = self._renewed

    async def _become_ready(self) -> None:
        if self._sync.has_state:
            log("serving_kept_assignments")
        else:
            await self._sync.first.wait()
        for publisher in self._publishers:
            await publisher.settled.wait()
        await self._server.start(bind_sign_socket(self.config.sign_socket.path, self.config.sign_socket.mode_bits))
        await self._status.write()
        notify_ready("serving")
        log(
            "agent_ready",
            agent_id=str(self._identity.svid.spiffe_id),
            event_loop=loop_name(),
            socket=str(self.config.sign_socket.path),
            svids=len(self._sync.keys.state.assignments),
        )

    def _renewed(self) -> None:
        self._sync.svid_renewed()
        self._status.touch()

    def _touch(self) -> None:
        self._status.touch()

    def _publish(self, state: AgentState) -> None:
        bundle_pem = to_pem(self._identity.authorities())
        for publisher in self._publishers:
            assignment = state.of_spiffe_id(publisher.config.spiffe_id)
            publisher.want(self._files(assignment, bundle_pem) if assignment else None)
        self._status.touch()

    def _files(self, assignment: Assignment, bundle_pem: bytes) -> SvidFiles:
        reference = KeyReference(assignment.key_id, str(self.config.sign_socket.path), assignment.spki_der)
        return SvidFiles(to_pem(assignment.chain), reference.to_pem().encode(), bundle_pem)


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Runs `work` to its end, or cancels it when `stop` is set first: then True."""
    task = asyncio.create_task(work)
    waiting = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return False
        return True
    finally:
        waiting.cancel()
        task.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)
