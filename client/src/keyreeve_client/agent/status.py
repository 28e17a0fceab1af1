"""What the agent says of itself: state_dir/status.json, for `keyreeve svid show`, `keyreeve doctor` and people. It holds no secret."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from keyreeve_common.errors import KeyreeveError
from keyreeve_common.files import write_atomic
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.telemetry import log_warning

from keyreeve_client.agent.assignments import Assignment
from keyreeve_client.agent.attestation import VERSION, NodeIdentity
from keyreeve_client.agent.key_cluster import KeyCluster, KeyServer
from keyreeve_client.agent.publisher import Publisher
from keyreeve_client.agent.sign_server import SignServer
from keyreeve_client.agent.sync import Sync

FORMAT = 1
HEARTBEAT_SECONDS = 10
_TICK_SECONDS = 1.0


@dataclass
class StatusWriter:
    """Writes the status after each change, within a second when only counts changed, and every 10 seconds as a sign of life."""

    identity: NodeIdentity
    sync: Sync
    server: SignServer
    cluster: KeyCluster
    publishers: list[Publisher]
    started_at: datetime
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _failing: bool = False

    def touch(self) -> None:
        self._changed.set()

    async def run_forever(self) -> None:
        while True:
            self._changed.clear()
            counted = self._counted()
            await self.write()
            for _ in range(HEARTBEAT_SECONDS):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_TICK_SECONDS):
                        await self._changed.wait()
                if self._changed.is_set() or self._counted() != counted:
                    break

    def _counted(self) -> tuple[int, ...]:
        counts = self.server.counts
        return counts.signed.total(), counts.refused.total(), counts.connections

    async def write(self) -> None:
        data = json.dumps(self.build(), indent=2).encode() + b"\n"
        try:
            await asyncio.to_thread(write_atomic, self.identity.state.status, data)
            self._failing = False
        except KeyreeveError as error:
            if not self._failing:
                log_warning("status_not_written", code=error.code.value, detail=error.detail)
            self._failing = True

    def build(self) -> dict[str, Any]:
        """The document, version 1."""
        identity, counts = self.identity, self.server.counts
        svid = identity.current
        return {
            "format": FORMAT,
            "version": VERSION,
            "pid": os.getpid(),
            "started_at": _time(self.started_at),
            "written_at": _time(identity.clock()),
            "trust_domain": str(identity.config.trust_domain),
            "agent_id": str(svid.spiffe_id) if svid else None,
            "agent_svid": {"serial": svid.serial, "not_after": _time(svid.not_after)} if svid else None,
            "agent_refused": _error(identity.refusal),
            "sign_socket": str(identity.config.sign_socket.path),
            "ca": {
                "address": identity.config.ca.address,
                "connected": self.sync.connected,
                "last_sync": _time(self.sync.last_sync),
                "sequence": self.sync.keys.state.sequence,
                "error": _error(self.sync.last_error),
            },
            "key_servers": [_key_server(server) for server in self.cluster.servers],
            "svids": [self._svid(assignment) for assignment in self.sync.keys.state.assignments],
            "refused_assignments": [
                {"entry_id": item.entry_id, "spiffe_id": item.spiffe_id, "error": _error(item.error)}
                for item in self.sync.keys.state.refused
            ],
            "proxies": [_proxy(publisher) for publisher in self.publishers],
            "connections": counts.connections,
            "outstanding": counts.outstanding_total,
            "signatures": counts.signed.total(),
            "refusals": dict(counts.refused),
        }

    def _svid(self, assignment: Assignment) -> dict[str, Any]:
        return {
            "spiffe_id": str(assignment.spiffe_id),
            "entry_id": assignment.entry_id,
            "revision": assignment.revision,
            "key_id": assignment.key_id,
            "key_type": assignment.key_type.value,
            "serial": assignment.svid.serial,
            "not_before": _time(assignment.svid.not_before),
            "not_after": _time(assignment.svid.not_after),
            "hint": assignment.hint,
            "signatures": self.server.counts.signed[assignment.key_id],
        }


def _key_server(server: KeyServer) -> dict[str, Any]:
    tried = server.last_success is not None or server.last_error is not None
    return {
        "address": server.address,
        "available": server.last_error is None if tried else None,
        "last_success": _time(server.last_success),
        "error": _error(server.last_error),
        "state": server.replica.state.value,
        "outstanding": server.replica.outstanding,
        "requests": server.replica.requests,
        "failures": server.replica.faults,
        "hedges": server.replica.hedges,
        "ejections": server.replica.ejections,
        "latency_ms": {
            scheme_name(scheme): {"p50": _ms(lane.latencies.p50_s), "p95": _ms(lane.latencies.p95_s)}
            for scheme, lane in server.replica.lanes.items()
            if lane.latencies.count
        },
    }


def scheme_name(scheme: int) -> str:
    """The IANA name of a class of requests; 'other' for those whose scheme nobody knows."""
    try:
        return SignatureScheme(scheme).iana_name
    except ValueError:
        return "other"


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)


def _proxy(publisher: Publisher) -> dict[str, Any]:
    reload = publisher.last_reload
    return {
        "name": publisher.config.name,
        "spiffe_id": str(publisher.config.spiffe_id),
        "directory": str(publisher.config.directory),
        "assigned": publisher.assigned,
        "version": publisher.sink.current_version,
        "error": _error(publisher.error),
        "last_reload": {"at": _time(publisher.last_reload_at), "exit_status": reload.exit_status, "ok": reload.ok}
        if reload
        else None,
    }


def _time(value: datetime | None) -> str | None:
    return value.isoformat(timespec="seconds") if value else None


def _error(error: KeyreeveError | None) -> dict[str, str] | None:
    return {"code": error.code.value, "detail": error.detail} if error else None
