"""The ServiceIdentity service: hands out requests for certificates, takes certificates in. The TLS key stays in its file."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from keyreeve_common.grpc_edge import current_peer
from keyreeve_common.telemetry import log
from keyreeve_common.v1 import keyserver_pb2, keyserver_pb2_grpc

from keyreeve_keyserver.frontend.tls_identity import TlsIdentity


class ServiceIdentityServicer(keyserver_pb2_grpc.ServiceIdentityServicer):
    """`on_installed` opens the TLS listener, if it is not open yet."""

    def __init__(self, identity: TlsIdentity, on_installed: Callable[[], Awaitable[None]]) -> None:
        self._identity = identity
        self._on_installed = on_installed
        self._one_at_a_time = asyncio.Lock()

    async def GetCsr(self, request: keyserver_pb2.GetCsrRequest, context: Any) -> keyserver_pb2.GetCsrResponse:
        async with self._one_at_a_time:
            csr_der = await asyncio.to_thread(self._identity.build_csr, request.spiffe_id)
        return keyserver_pb2.GetCsrResponse(csr_der=csr_der)

    async def InstallSvid(
        self, request: keyserver_pb2.InstallSvidRequest, context: Any
    ) -> keyserver_pb2.InstallSvidResponse:
        async with self._one_at_a_time:
            svid = await asyncio.to_thread(
                self._identity.install,
                list(request.chain_der),
                request.bundle.trust_domain,
                list(request.bundle.x509_authorities_der),
            )
            log("svid_installed", caller=current_peer().name, spiffe_id=str(svid.spiffe_id), serial=svid.serial)
            await self._on_installed()
        response = keyserver_pb2.InstallSvidResponse()
        response.not_after.FromDatetime(svid.not_after)
        return response
