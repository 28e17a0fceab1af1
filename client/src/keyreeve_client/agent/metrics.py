"""The agent's gauges: what it serves now, read at each look at its metrics."""

from __future__ import annotations

from keyreeve_common.metrics import MetricSet

from keyreeve_client.agent.attestation import NodeIdentity
from keyreeve_client.agent.key_cluster import KeyCluster
from keyreeve_client.agent.sign_server import SignServer
from keyreeve_client.agent.sync import Sync


def watch_agent(identity: NodeIdentity, sync: Sync, server: SignServer, cluster: KeyCluster) -> MetricSet:
    """The agent's metrics, these parts' gauges among them."""
    counts = server.counts
    metrics = counts.metrics
    metrics.gauge("keyreeve_agent_connections", lambda: counts.connections)
    metrics.gauge("keyreeve_agent_requests_in_flight", lambda: counts.outstanding_total)
    metrics.gauge("keyreeve_agent_svids", lambda: len(sync.keys.state.assignments))
    metrics.gauge("keyreeve_agent_svid_expiry_timestamp_seconds", lambda: _expiry(identity))
    metrics.gauge("keyreeve_agent_key_servers_available", lambda: _available(cluster))
    replicas = cluster.balancer.replicas
    streams = [server.stream for server in cluster.servers]
    metrics.gauge("keyreeve_agent_batches_total", lambda: sum(stream.batches_sent for stream in streams))
    metrics.gauge("keyreeve_agent_batched_requests_total", lambda: sum(stream.items_sent for stream in streams))
    metrics.gauge("keyreeve_agent_hedges_total", lambda: sum(replica.hedges for replica in replicas))
    metrics.gauge("keyreeve_agent_ejections_total", lambda: sum(replica.ejections for replica in replicas))
    metrics.gauge("keyreeve_agent_ca_connected", lambda: int(sync.connected))
    return metrics


def _expiry(identity: NodeIdentity) -> float | None:
    return identity.current.not_after.timestamp() if identity.current else None


def _available(cluster: KeyCluster) -> int:
    return sum(server.last_success is not None and server.last_error is None for server in cluster.servers)
