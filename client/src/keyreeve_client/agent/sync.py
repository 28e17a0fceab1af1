"""What the CA assigns to this node: a stream of full states, each verified before it is used.

While the CA is away the last state stays in use until its SVIDs expire; it is kept in the state directory, so that the agent can also be
restarted meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from keyreeve_common.errors import KeyreeveError, Unavailable
from keyreeve_common.files import write_atomic
from keyreeve_common.grpc_edge import error_from_rpc
from keyreeve_common.telemetry import log, log_warning
from keyreeve_common.v1 import ca_pb2, ca_pb2_grpc
from keyreeve_common.x509_svid import to_pem

from keyreeve_client.agent.assignments import AgentState, CurrentKeys, parse_assignments, parse_bundle
from keyreeve_client.agent.attestation import REFUSALS, VERSION, NodeIdentity
from keyreeve_client.agent.backoff import Backoff
from keyreeve_client.agent.workload import forget_names
from keyreeve_client.channel import ReloadingChannel

_RECHECK = timedelta(seconds=60)


@dataclass
class Sync:
    """Keeps `keys.state` at what the CA says; calls `on_state` after each change."""

    identity: NodeIdentity
    channel: ReloadingChannel
    keys: CurrentKeys
    on_state: Callable[[AgentState], None]
    last_sync: datetime | None = None
    connected: bool = False
    last_error: KeyreeveError | None = None
    first: asyncio.Event = field(default_factory=asyncio.Event)
    _message: ca_pb2.Assignments | None = None
    _logged: set[tuple[str, str]] = field(default_factory=set)
    _renewed: asyncio.Event = field(default_factory=asyncio.Event)

    def restore(self) -> None:
        """Takes up the state that was kept, if there is one."""
        message = ca_pb2.Assignments()
        try:
            message.ParseFromString(self.identity.state.assignments.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, DecodeError) as error:
            log_warning("kept_assignments_unreadable", detail=type(error).__name__)
            return
        self._message = message
        self._use(message)
        log("assignments_restored", sequence=message.sequence, usable=len(self.keys.state.assignments))

    @property
    def has_state(self) -> bool:
        """Whether a state is in use, kept or fresh."""
        return self._message is not None

    def svid_renewed(self) -> None:
        """The stream is to be opened anew with the fresh SVID."""
        self._renewed.set()

    async def run_forever(self) -> None:
        backoff = Backoff(timedelta(milliseconds=200), timedelta(seconds=30))
        while True:
            try:
                await self._watch(backoff)
                continue
            except KeyreeveError as error:
                if self.connected or self.last_error is None or self.last_error.code is not error.code:
                    log_warning("ca_lost", code=error.code.value, detail=error.detail)
                self.connected, self.last_error = False, error
                self.identity.on_change()
                if isinstance(error, REFUSALS):
                    await self.identity.recover(error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff.next()):
                    await self._renewed.wait()

    async def recheck_forever(self) -> None:
        """A state with refused assignments is verified again: it may only have been ahead of our clock."""
        while True:
            await asyncio.sleep(_RECHECK.total_seconds())
            if self._message is not None and self.keys.state.refused:
                self._use(self._message)

    async def _watch(self, backoff: Backoff) -> None:
        """Returns when the stream is to be opened anew at once. Raises: KeyreeveError when it broke."""
        self._renewed.clear()
        stub = ca_pb2_grpc.AgentsStub(await self.channel.current())
        call: Any = stub.WatchAssignments(ca_pb2.WatchAssignmentsRequest(agent_version=VERSION))
        reader = asyncio.create_task(self._read(call, backoff), name="watch-assignments")
        renewed = asyncio.create_task(self._renewed.wait())
        try:
            await asyncio.wait((reader, renewed), return_when=asyncio.FIRST_COMPLETED)
            if not reader.done():
                return
            if reader.cancelled():  # what grpc.aio does to the readers of a channel that is closed
                raise Unavailable("channel to the CA was closed")
            reader.result()
        finally:
            renewed.cancel()
            reader.cancel()
            call.cancel()
            await asyncio.gather(reader, renewed, return_exceptions=True)

    async def _read(self, call: Any, backoff: Backoff) -> None:
        try:
            async for message in call:
                backoff.reset()
                if not self.connected:
                    log("ca_connected", address=self.channel.target)
                self.connected, self.last_error, self.identity.refusal = True, None, None
                self._take(message)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        raise Unavailable("CA ended the stream")

    def _take(self, message: ca_pb2.Assignments) -> None:
        self._message = message
        self.last_sync = self.identity.clock()
        self._keep_bundle(message)
        self._use(message)
        log(
            "assignments_received",
            sequence=message.sequence,
            usable=len(self.keys.state.assignments),
            refused=len(self.keys.state.refused),
        )
        try:
            write_atomic(self.identity.state.assignments, message.SerializeToString(), mode=0o600)
        except KeyreeveError as error:
            log_warning("assignments_not_kept", code=error.code.value, detail=error.detail)
        self.first.set()

    def _keep_bundle(self, message: ca_pb2.Assignments) -> None:
        if not message.HasField("bundle"):
            return
        try:
            pem = to_pem(parse_bundle(message.bundle, self.identity.config.trust_domain))
            if pem != self._kept_bundle():
                write_atomic(self.identity.state.bundle, pem)
                log("bundle_replaced", sequence=message.bundle.sequence)
        except KeyreeveError as error:
            log_warning("bundle_refused", code=error.code.value, detail=error.detail)

    def _kept_bundle(self) -> bytes | None:
        try:
            return self.identity.state.bundle.read_bytes()
        except OSError:  # somebody tidied up: what the CA just sent takes its place
            return None

    def _use(self, message: ca_pb2.Assignments) -> None:
        forget_names()
        state = parse_assignments(
            message,
            trust_domain=self.identity.config.trust_domain,
            authorities=self.identity.authorities(),
            now=self.identity.clock(),
        )
        for refused in state.refused:
            if (refused.entry_id, refused.error.detail) not in self._logged:
                log_warning(
                    "assignment_refused",
                    entry_id=refused.entry_id,
                    spiffe_id=refused.spiffe_id,
                    code=refused.error.code.value,
                    detail=refused.error.detail,
                )
        self._logged = {(refused.entry_id, refused.error.detail) for refused in state.refused}
        self.keys.state = state
        self.on_state(state)
