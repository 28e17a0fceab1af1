"""The CA's listeners: mTLS for agents and admins, server-authenticated TLS for nodes that attest, a Unix socket for local admins."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
from keyreeve_client.channel import SvidFiles
from keyreeve_common.errors import ConfigInvalid, KeyreeveError
from keyreeve_common.files import make_private_directory
from keyreeve_common.grpc_edge import ANYONE, LOCAL, SERVER_PING_OPTIONS, EdgeInterceptor
from keyreeve_common.telemetry import log, log_warning
from keyreeve_common.tls_listener import reloading_credentials
from keyreeve_common.v1 import ca_pb2_grpc

from keyreeve_ca.config import CaConfig
from keyreeve_ca.domain.entries import AGENT_PATH
from keyreeve_ca.grpc_api.admin_api import (
    AuthoritiesServicer,
    EntriesServicer,
    HealthServicer,
    NodesServicer,
    SvidsServicer,
)
from keyreeve_ca.grpc_api.feed import ChangeFeed
from keyreeve_ca.grpc_api.node_api import AgentsServicer, NodeAttestationServicer
from keyreeve_ca.metrics import CaMetrics
from keyreeve_ca.service import Ca

_SERVICES = "/keyreeve.ca.v1."
_OPTIONS = [
    ("grpc.so_reuseport", 0),  # a second CA on this port is an error, not a silent partner
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.max_receive_message_length", 1024 * 1024),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    *SERVER_PING_OPTIONS,
]
STOP_GRACE = 2.0


def allow_table(config: CaConfig) -> dict[str, tuple[str, ...]]:
    """Who may call what."""
    admins = (*(str(admin) for admin in config.admins), LOCAL)
    return {
        f"{_SERVICES}NodeAttestation/": (ANYONE,),
        f"{_SERVICES}Agents/": (f"{config.trust_domain.id}{AGENT_PATH}*",),
        f"{_SERVICES}Entries/": admins,
        f"{_SERVICES}Nodes/": admins,
        f"{_SERVICES}Svids/": admins,
        f"{_SERVICES}Authorities/": admins,
        f"{_SERVICES}Authorities/GetBundle": (ANYONE,),
        f"{_SERVICES}Health/": (ANYONE,),
    }


class _ServerCertificate:
    """What a listener asks at each new connection: the SVID as it is in the files now; the one before while they cannot be used."""

    def __init__(self, files: SvidFiles) -> None:
        self._files = files
        self._stamp = files.stamp()
        self.current = self._load()

    def __call__(self) -> grpc.ServerCertificateConfiguration:
        stamp = self._files.stamp()
        if stamp != self._stamp:
            try:
                self.current, self._stamp = self._load(), stamp
            except KeyreeveError as error:
                log_warning("svid_reload_failed", target="own listeners", detail=error.detail)
        return self.current

    def _load(self) -> grpc.ServerCertificateConfiguration:
        identity = self._files.read()
        assert identity.key_pem and identity.chain_pem  # noqa: S101, PT018 - read() gives both
        return grpc.ssl_server_certificate_configuration([(identity.key_pem, identity.chain_pem)], identity.bundle_pem)


@dataclass
class Listeners:
    """All servers of one CA process."""

    ca: Ca
    config: CaConfig
    feed: ChangeFeed
    metrics: CaMetrics = field(default_factory=CaMetrics)

    def __post_init__(self) -> None:
        self._servers: list[grpc.aio.Server] = []
        self.agents = AgentsServicer(self.ca, self.feed, self.ca.clock)

    async def start(self) -> None:
        """Raises: ConfigInvalid when an address cannot be bound."""
        certificate = _ServerCertificate(self.config.svid_files)
        api, attest, admin = self._new_server(), self._new_server(), self._new_server()
        for server in (api, admin):
            self._add_admin_services(server)
        ca_pb2_grpc.add_AgentsServicer_to_server(self.agents, api)
        ca_pb2_grpc.add_NodeAttestationServicer_to_server(NodeAttestationServicer(self.ca, self.feed), attest)
        mutual = reloading_credentials(certificate, require_client_authentication=True)
        one_sided = reloading_credentials(certificate, require_client_authentication=False)
        _bind(api, self.config.listen, mutual)
        _bind(attest, self.config.attest_listen, one_sided)
        self._bind_admin(admin, self.config.admin_socket)
        for server in self._servers:
            await server.start()
        self.config.admin_socket.chmod(0o600)
        log("listening", api=self.config.listen, attestation=self.config.attest_listen)

    async def stop(self) -> None:
        await asyncio.gather(*(server.stop(STOP_GRACE) for server in self._servers))
        await asyncio.to_thread(self.agents.close)

    def _new_server(self) -> grpc.aio.Server:
        edge = EdgeInterceptor(
            lambda: self.config.trust_domain, allow_table(self.config), self.ca.clock, self.metrics.call_ended
        )
        server = grpc.aio.server(interceptors=[edge], options=_OPTIONS)
        self._servers.append(server)
        return server

    def _add_admin_services(self, server: grpc.aio.Server) -> None:
        ca, feed = self.ca, self.feed
        ca_pb2_grpc.add_EntriesServicer_to_server(EntriesServicer(ca, feed), server)
        nodes = NodesServicer(ca, feed, lambda agent: agent in self.agents.connected)
        ca_pb2_grpc.add_NodesServicer_to_server(nodes, server)
        ca_pb2_grpc.add_SvidsServicer_to_server(SvidsServicer(ca, feed), server)
        ca_pb2_grpc.add_AuthoritiesServicer_to_server(AuthoritiesServicer(ca, feed), server)
        ca_pb2_grpc.add_HealthServicer_to_server(HealthServicer(ca), server)

    def _bind_admin(self, server: grpc.aio.Server, socket: Path) -> None:
        make_private_directory(socket.parent)
        if os.stat(socket.parent).st_mode & 0o077:
            raise ConfigInvalid(f"{socket.parent}: is open to other users; run: chmod 700 {socket.parent}")
        socket.unlink(missing_ok=True)
        _listen(server.add_insecure_port, f"unix:{socket}")


def _bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials) -> None:
    _listen(lambda where: server.add_secure_port(where, credentials), address)


def _listen(bind: object, address: str) -> None:
    try:
        port = bind(address)  # type: ignore[operator]
    except RuntimeError:
        port = 0
    if not port:
        raise ConfigInvalid(f"{address}: cannot be bound; is another process there?")
