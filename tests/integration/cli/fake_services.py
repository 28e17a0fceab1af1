"""A CA and a key server that answer the command from memory, over real Unix sockets with the real gRPC edge."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from keyreeve_client.cli.__main__ import run
from keyreeve_common.errors import Conflict, FailedPrecondition, KeyNotFound, NotFound, Unavailable
from keyreeve_common.grpc_edge import LOCAL, EdgeInterceptor
from keyreeve_common.identity import TrustDomain
from keyreeve_common.v1 import ca_pb2, ca_pb2_grpc, keyserver_pb2, keyserver_pb2_grpc, types_pb2
from keyreeve_testing.pki import TestPki

TD = "cli.test"
TOKEN = "join-token-of-the-test"


@dataclass
class FakeCa(
    ca_pb2_grpc.EntriesServicer,
    ca_pb2_grpc.NodesServicer,
    ca_pb2_grpc.SvidsServicer,
    ca_pb2_grpc.AuthoritiesServicer,
    ca_pb2_grpc.HealthServicer,
):
    pki: TestPki
    entries: dict[str, ca_pb2.Entry] = field(default_factory=dict)
    agents: dict[str, ca_pb2.Agent] = field(default_factory=dict)
    records: list[ca_pb2.X509SvidRecord] = field(default_factory=list)
    authorities: list[ca_pb2.Authority] = field(default_factory=list)
    tokens: list[ca_pb2.CreateJoinTokenRequest] = field(default_factory=list)
    serving: bool = True
    pages: int = 0

    async def CreateEntry(self, request: ca_pb2.CreateEntryRequest, context: Any) -> ca_pb2.Entry:
        if any(entry.spiffe_id == request.entry.spiffe_id for entry in self.entries.values()):
            raise Conflict("an entry like this exists")
        entry = ca_pb2.Entry()
        entry.CopyFrom(request.entry)
        entry.entry_id, entry.revision = f"e-{len(self.entries) + 1}", 1
        self.entries[entry.entry_id] = entry
        return entry

    async def GetEntry(self, request: ca_pb2.GetEntryRequest, context: Any) -> ca_pb2.Entry:
        if request.entry_id not in self.entries:
            raise NotFound("no such entry")
        return self.entries[request.entry_id]

    async def ListEntries(self, request: ca_pb2.ListEntriesRequest, context: Any) -> ca_pb2.ListEntriesResponse:
        """One entry a page, so that the command has to turn pages."""
        self.pages += 1
        found = [each for each in self.entries.values() if not request.spiffe_id or each.spiffe_id == request.spiffe_id]
        at = int(request.page_token or 0)
        return ca_pb2.ListEntriesResponse(
            entries=found[at : at + 1], next_page_token=str(at + 1) if at + 1 < len(found) else ""
        )

    async def UpdateEntry(self, request: ca_pb2.UpdateEntryRequest, context: Any) -> ca_pb2.Entry:
        if self.entries[request.entry.entry_id].revision != request.entry.revision:
            raise Conflict("the entry changed meanwhile")
        entry = ca_pb2.Entry()
        entry.CopyFrom(request.entry)
        entry.revision += 1
        self.entries[entry.entry_id] = entry
        return entry

    async def DeleteEntry(self, request: ca_pb2.DeleteEntryRequest, context: Any) -> ca_pb2.DeleteEntryResponse:
        if self.entries.pop(request.entry_id, None) is None:
            raise NotFound("no such entry")
        return ca_pb2.DeleteEntryResponse()

    async def CreateJoinToken(self, request: ca_pb2.CreateJoinTokenRequest, context: Any) -> ca_pb2.JoinToken:
        self.tokens.append(request)
        return ca_pb2.JoinToken(token=TOKEN, agent_id=request.agent_id or f"spiffe://{TD}/keyreeve/agent/random")

    async def ListAgents(self, request: ca_pb2.ListAgentsRequest, context: Any) -> ca_pb2.ListAgentsResponse:
        return ca_pb2.ListAgentsResponse(agents=self.agents.values())

    async def EvictAgent(self, request: ca_pb2.EvictAgentRequest, context: Any) -> ca_pb2.Agent:
        return self._agent(request.spiffe_id, banned=False)

    async def BanAgent(self, request: ca_pb2.BanAgentRequest, context: Any) -> ca_pb2.Agent:
        return self._agent(request.spiffe_id, banned=True)

    async def UnbanAgent(self, request: ca_pb2.UnbanAgentRequest, context: Any) -> ca_pb2.Agent:
        return self._agent(request.spiffe_id, banned=False)

    def _agent(self, spiffe_id: str, *, banned: bool) -> ca_pb2.Agent:
        if spiffe_id not in self.agents:
            raise NotFound("no such agent")
        self.agents[spiffe_id].banned = banned
        return self.agents[spiffe_id]

    async def ListSvids(self, request: ca_pb2.ListSvidsRequest, context: Any) -> ca_pb2.ListSvidsResponse:
        wanted = (
            record
            for record in self.records
            if (not request.serial or record.serial == request.serial)
            and (not request.spiffe_id or record.spiffe_id == request.spiffe_id)
        )
        return ca_pb2.ListSvidsResponse(svids=wanted)

    async def RenewSvids(self, request: ca_pb2.RenewSvidsRequest, context: Any) -> ca_pb2.ListSvidsResponse:
        return ca_pb2.ListSvidsResponse(svids=[each for each in self.records if each.entry_id == request.entry_id])

    async def ListAuthorities(self, request: Any, context: Any) -> ca_pb2.ListAuthoritiesResponse:
        return ca_pb2.ListAuthoritiesResponse(authorities=self.authorities)

    async def PrepareAuthority(self, request: Any, context: Any) -> ca_pb2.Authority:
        raise FailedPrecondition("one is prepared already")

    async def ActivateAuthority(self, request: ca_pb2.ActivateAuthorityRequest, context: Any) -> ca_pb2.Authority:
        return ca_pb2.Authority(authority_id=request.authority_id, state=ca_pb2.AUTHORITY_STATE_ACTIVE)

    async def GetBundle(self, request: Any, context: Any) -> types_pb2.Bundle:
        return types_pb2.Bundle(trust_domain=TD, x509_authorities_der=self.pki.bundle_der, sequence=7)

    async def Check(self, request: Any, context: Any) -> ca_pb2.HealthResponse:
        return ca_pb2.HealthResponse(
            serving=self.serving, version="1", detail="" if self.serving else "database is locked"
        )


@dataclass
class FakeKeyServer(
    keyserver_pb2_grpc.KeyAdminServicer,
    keyserver_pb2_grpc.GrantsServicer,
    keyserver_pb2_grpc.QuarantinesServicer,
    keyserver_pb2_grpc.HealthServicer,
):
    keys: dict[str, keyserver_pb2.Key] = field(default_factory=dict)
    grants: dict[tuple[str, str], keyserver_pb2.Grant] = field(default_factory=dict)
    quarantines: dict[str, keyserver_pb2.Quarantine] = field(default_factory=dict)
    created: list[keyserver_pb2.CreateKeyRequest] = field(default_factory=list)
    scheduled: list[keyserver_pb2.ScheduleKeyDestructionRequest] = field(default_factory=list)
    svid_lifetime: timedelta = timedelta(hours=12)
    backend_detail: str = ""
    engine: str = ""
    engine_detail: str = ""

    async def CreateKey(self, request: keyserver_pb2.CreateKeyRequest, context: Any) -> keyserver_pb2.Key:
        self.created.append(request)
        key = keyserver_pb2.Key(
            key_id=f"k-{len(self.keys) + 1}", key_type=request.key_type, role=request.role, purposes=request.purposes,
            state=keyserver_pb2.KEY_STATE_ENABLED, backend=request.backend or "hsm", label=request.label,
        )  # fmt: skip
        key.attributes.token = "keyreeve"
        key.created_at.FromDatetime(datetime.now(UTC))
        self.keys[key.key_id] = key
        return key

    async def GetKey(self, request: keyserver_pb2.GetKeyRequest, context: Any) -> keyserver_pb2.Key:
        return self._key(request.key_id)

    async def ListKeys(self, request: Any, context: Any) -> keyserver_pb2.ListKeysResponse:
        return keyserver_pb2.ListKeysResponse(keys=self.keys.values())

    async def DisableKey(self, request: keyserver_pb2.DisableKeyRequest, context: Any) -> keyserver_pb2.Key:
        return self._move(request.key_id, keyserver_pb2.KEY_STATE_DISABLED)

    async def EnableKey(self, request: keyserver_pb2.EnableKeyRequest, context: Any) -> keyserver_pb2.Key:
        return self._move(request.key_id, keyserver_pb2.KEY_STATE_ENABLED)

    async def ScheduleKeyDestruction(
        self, request: keyserver_pb2.ScheduleKeyDestructionRequest, context: Any
    ) -> keyserver_pb2.Key:
        if self._key(request.key_id).state != keyserver_pb2.KEY_STATE_DISABLED:
            raise FailedPrecondition("only a disabled key can be destroyed")
        self.scheduled.append(request)
        return self._move(request.key_id, keyserver_pb2.KEY_STATE_PENDING_DESTRUCTION)

    async def CancelKeyDestruction(
        self, request: keyserver_pb2.CancelKeyDestructionRequest, context: Any
    ) -> keyserver_pb2.Key:
        return self._move(request.key_id, keyserver_pb2.KEY_STATE_DISABLED)

    def _key(self, key_id: str) -> keyserver_pb2.Key:
        if key_id == "k-busy":
            raise Unavailable("signer is starting")
        if key_id not in self.keys:
            raise KeyNotFound
        return self.keys[key_id]

    def _move(self, key_id: str, state: keyserver_pb2.KeyState.ValueType) -> keyserver_pb2.Key:
        self._key(key_id).state = state
        return self.keys[key_id]

    async def CreateGrant(self, request: keyserver_pb2.CreateGrantRequest, context: Any) -> keyserver_pb2.Grant:
        grant = keyserver_pb2.Grant(key_id=request.key_id, holder=request.holder, purposes=request.purposes)
        if request.HasField("rate"):
            grant.rate.CopyFrom(request.rate)
        self.grants[request.key_id, request.holder] = grant
        return grant

    async def RevokeGrant(self, request: keyserver_pb2.RevokeGrantRequest, context: Any) -> keyserver_pb2.Grant:
        grant = self.grants.get((request.key_id, request.holder))
        if grant is None:
            raise NotFound("no such grant")
        grant.revoked_at.FromDatetime(datetime.now(UTC))
        return grant

    async def ListGrants(self, request: Any, context: Any) -> keyserver_pb2.ListGrantsResponse:
        return keyserver_pb2.ListGrantsResponse(grants=self.grants.values())

    async def AddQuarantine(
        self, request: keyserver_pb2.AddQuarantineRequest, context: Any
    ) -> keyserver_pb2.Quarantine:
        made = keyserver_pb2.Quarantine(
            holder=request.holder,
            cause=keyserver_pb2.QUARANTINE_CAUSE_OPERATOR,
            reason=request.reason,
            set_by="local",
            until=request.until if request.HasField("until") else None,
        )
        self.quarantines[request.holder] = made
        return made

    async def LiftQuarantine(
        self, request: keyserver_pb2.LiftQuarantineRequest, context: Any
    ) -> keyserver_pb2.Quarantine:
        if request.holder not in self.quarantines:
            raise NotFound("this holder was never in quarantine")
        self.quarantines[request.holder].lifted_at.FromDatetime(datetime.now(UTC))
        return self.quarantines[request.holder]

    async def ListQuarantines(
        self, request: keyserver_pb2.ListQuarantinesRequest, context: Any
    ) -> keyserver_pb2.ListQuarantinesResponse:
        shown = [one for one in self.quarantines.values() if request.include_ended or not one.HasField("lifted_at")]
        return keyserver_pb2.ListQuarantinesResponse(quarantines=shown)

    async def Check(self, request: Any, context: Any) -> keyserver_pb2.HealthResponse:
        backend = keyserver_pb2.BackendHealth(
            name="hsm", serving=not self.backend_detail, detail=self.backend_detail, custody="token-resident", workers=2,
            engine=self.engine, engine_detail=self.engine_detail,
        )  # fmt: skip
        answer = keyserver_pb2.HealthResponse(serving=True, version="1", backends=[backend])
        answer.svid_not_after.FromDatetime(datetime.now(UTC) + self.svid_lifetime)
        return answer


@dataclass
class Services:
    """Both fakes, and the command that speaks to them."""

    directory: Path
    ca: FakeCa
    key_server: FakeKeyServer
    capsys: pytest.CaptureFixture[str]

    @property
    def ca_socket(self) -> Path:
        return self.directory / "ca.sock"

    @property
    def key_server_socket(self) -> Path:
        return self.directory / "keyserver.sock"

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self.capsys.readouterr()
        code = run(list(arguments))
        said = self.capsys.readouterr()
        return code, said.out, said.err

    def json(self, *arguments: str) -> Any:
        code, out, err = self.run("--output", "json", *arguments)
        assert (code, err) == (0, "")
        return json.loads(out)


async def serve(services: Services) -> list[grpc.aio.Server]:
    ca = _server("ca", "Entries", "Nodes", "Svids", "Authorities", "Health")
    for add in (
        ca_pb2_grpc.add_EntriesServicer_to_server,
        ca_pb2_grpc.add_NodesServicer_to_server,
        ca_pb2_grpc.add_SvidsServicer_to_server,
        ca_pb2_grpc.add_AuthoritiesServicer_to_server,
        ca_pb2_grpc.add_HealthServicer_to_server,
    ):
        _add(add, services.ca, ca)
    key_server = _server("keyserver", "KeyAdmin", "Grants", "Quarantines", "Health")
    for add in (
        keyserver_pb2_grpc.add_KeyAdminServicer_to_server,
        keyserver_pb2_grpc.add_GrantsServicer_to_server,
        keyserver_pb2_grpc.add_QuarantinesServicer_to_server,
        keyserver_pb2_grpc.add_HealthServicer_to_server,
    ):
        _add(add, services.key_server, key_server)
    for server, path in ((ca, services.ca_socket), (key_server, services.key_server_socket)):
        server.add_insecure_port(f"unix:{path}")
        await server.start()
    return [ca, key_server]


def _add(add: Callable[[Any, Any], None], servicer: object, server: grpc.aio.Server) -> None:
    add(servicer, server)


def _server(package: str, *names: str) -> grpc.aio.Server:
    allow = {f"/keyreeve.{package}.v1.{name}/": (LOCAL,) for name in names}
    return grpc.aio.server(interceptors=[EdgeInterceptor(lambda: TrustDomain(TD), allow)])
