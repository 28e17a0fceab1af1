"""The Health service: one look at the signer's backends, the catalog and the SVID, with one line of what to do.

Everyone who may connect learns whether it serves; key administrators and the local operator learn the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from importlib.metadata import version
from typing import Any

from keyreeve_common.errors import KeyreeveError
from keyreeve_common.grpc_edge import current_peer
from keyreeve_common.v1 import keyserver_pb2, keyserver_pb2_grpc

from keyreeve_keyserver.frontend.access import Access, Freshness
from keyreeve_keyserver.frontend.canary import CanaryState
from keyreeve_keyserver.frontend.protos import key_type_to_proto
from keyreeve_keyserver.frontend.signer_link import SignerLink
from keyreeve_keyserver.frontend.tls_identity import TlsIdentity

_SIGNER_TIMEOUT_S = 2.0
_ASK = "the key server's operators see more: keyreeve doctor"


class HealthServicer(keyserver_pb2_grpc.HealthServicer):
    def __init__(
        self,
        *,
        link: SignerLink,
        access: Access,
        identity: TlsIdentity,
        clock: Callable[[], datetime],
        admins: frozenset[str],
    ) -> None:
        self._admins = admins
        self._link = link
        self._access = access
        self._identity = identity
        self._clock = clock
        self.canaries: Mapping[str, CanaryState] = {}

    async def Check(self, request: keyserver_pb2.HealthRequest, context: Any) -> keyserver_pb2.HealthResponse:
        problems: list[str] = []
        backends: list[keyserver_pb2.BackendHealth] = []
        weaknesses: list[str] = []
        try:
            said = await self._link.control("health", timeout=_SIGNER_TIMEOUT_S)
            backends = list(self._backends(said))
            weaknesses = list(_weaknesses(said))
        except KeyreeveError as error:
            problems.append(error.detail)
        if backends and not any(backend.serving for backend in backends):
            problems.append("no backend serves; see the backends' details")
        problems += [f"canary of {name}: {state.error}" for name, state in self.canaries.items() if state.error]
        problems += self._own_problems()
        response = keyserver_pb2.HealthResponse(
            serving=not problems,
            version=version("keyreeve-keyserver"),
            backends=backends,
            detail="; ".join([*problems, *self._notes(), *weaknesses]),
            catalog_staleness_s=self._access.staleness_s,
            serving_from_cache=self._access.freshness is Freshness.CACHED,
        )
        if self._identity.installed is not None:
            response.svid_not_after.FromDatetime(self._identity.installed.svid.not_after)
        peer = current_peer()
        return response if peer.local or peer.name in self._admins else _for_strangers(response)

    def _own_problems(self) -> Iterator[str]:
        try:
            self._access.require_fresh()
        except KeyreeveError as error:
            yield error.detail
        if self._identity.installed is None:
            yield "no SVID is installed; run: keyreeve init"
        elif self._clock() >= self._identity.installed.svid.not_after:
            yield "the SVID has expired; check that the CA runs and reaches this key server, or run: keyreeve init"

    def _notes(self) -> Iterator[str]:
        """What serves and is not as it should be."""
        if self._access.freshness is Freshness.CACHED:
            yield (
                f"serving from cache: the catalog was not read for {self._access.staleness_s:.1f} s, "
                f"signing ends at {self._access.max_staleness_s:g} s; check the database"
            )

    def _backends(self, said: dict[str, Any]) -> Iterator[keyserver_pb2.BackendHealth]:
        known = {str(backend.get("name")): backend for backend in self._link.capabilities.get("backends", [])}
        for backend in said.get("backends", []):
            name = str(backend.get("name", ""))
            facts = known.get(name, {})
            yield keyserver_pb2.BackendHealth(
                canary=self._canary(name),
                name=name,
                serving=backend.get("state") == "up",
                detail=str(backend.get("detail") or ""),
                key_types=[key_type_to_proto(str(key_type)) for key_type in facts.get("key_types", [])],
                custody=str(facts.get("custody", "")),
                workers=int(backend.get("workers", 0)),
                engine=str(backend.get("engine") or ""),
                engine_detail=str(backend.get("engine_detail") or ""),
            )

    def _canary(self, backend: str) -> keyserver_pb2.CanaryHealth | None:
        state = self.canaries.get(backend)
        if state is None:
            return None
        shown = keyserver_pb2.CanaryHealth(good=not state.error, detail=state.error)
        shown.at.FromDatetime(state.at)
        shown.took.FromTimedelta(timedelta(seconds=state.seconds))
        return shown


def _for_strangers(full: keyserver_pb2.HealthResponse) -> keyserver_pb2.HealthResponse:
    """What agents choose by. Which release, backends and protections an attacker has before him is for those to know who can mend it."""
    response = keyserver_pb2.HealthResponse()
    response.CopyFrom(full)
    for name in ("version", "backends", "detail"):
        response.ClearField(name)
    if full.detail:
        response.detail = _ASK
    return response


def _weaknesses(said: dict[str, Any]) -> Iterator[str]:
    """Protections that are off: to be known, but no reason not to serve (`hardening.required` in signer.toml makes them one)."""
    parts = [("the signer", said.get("protections"))]
    parts += [(f"workers of {backend.get('name')}", backend.get("protections")) for backend in said.get("backends", [])]
    for what, protections in parts:
        off = [name for name, state in (protections or {}).items() if state != "on"]
        if off:
            yield f"{what}: protections off: {', '.join(off)}; the log event signer_hardened and the signer's health say why"
