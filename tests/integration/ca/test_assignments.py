"""A node attests, watches its assignments and signs with its key; operators' decisions reach it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any

import grpc
import pytest
from cryptography import x509
from keyreeve_client.channel import open_sync_channel
from keyreeve_client.key_admin import KeyAdminClient
from keyreeve_client.sign_client import SignClient
from keyreeve_common.errors import (
    AgentBanned,
    Conflict,
    JoinTokenInvalid,
    KeyNotFound,
    KeyreeveError,
    PermissionDenied,
)
from keyreeve_common.grpc_edge import error_from_rpc
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.schemes import SignatureScheme
from keyreeve_common.v1 import ca_pb2
from keyreeve_common.x509_svid import verify_chain

WEB = "spiffe://example.org/web"
KEY_SERVER_ID = SpiffeId.parse("spiffe://example.org/keyreeve/keyserver")
MESSAGE = build_tls13_content(Purpose.TLS13_SERVER_VERIFY, bytes(32))


class Watch:
    """A WatchAssignments stream, read by a thread of its own."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.messages: Queue[ca_pb2.Assignments | KeyreeveError] = Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for message in self._call:
                self.messages.put(message)
        except grpc.RpcError as error:
            self.messages.put(error_from_rpc(error))

    def next(self) -> ca_pb2.Assignments:
        message = self.messages.get(timeout=60)
        if isinstance(message, KeyreeveError):
            raise message
        return message

    def until(self, condition: Callable[[ca_pb2.Assignments], bool]) -> ca_pb2.Assignments:
        while True:
            message = self.next()
            if condition(message):
                return message


@contextmanager
def watching(ca: Any, node: Any) -> Iterator[Watch]:
    with ca.caller(node.identity) as stubs:
        call = stubs.agents.WatchAssignments(ca_pb2.WatchAssignmentsRequest(agent_version="test"))
        yield Watch(call)
        call.cancel()


def entry_for(node: Any, *, uid: int = 1000, **changes: Any) -> ca_pb2.Entry:
    fields = {
        "spiffe_id": WEB,
        "parent_id": node.spiffe_id,
        "selectors": [ca_pb2.Selector(type="unix", value=f"uid:{uid}")],
        "dns_names": ["web.example.org"],
        **changes,
    }
    return ca_pb2.Entry(**fields)


def create(ca: Any, entry: ca_pb2.Entry) -> ca_pb2.Entry:
    with ca.local() as local:
        created: ca_pb2.Entry = local.entries.CreateEntry(ca_pb2.CreateEntryRequest(entry=entry))
        return created


def ready(message: ca_pb2.Assignments) -> bool:
    return bool(message.assignments) and not any(each.HasField("error") for each in message.assignments)


def sign(ca: Any, node: Any, assignment: ca_pb2.Assignment) -> bytes:
    leaf = x509.load_der_x509_certificate(assignment.chain_der[0])
    address = f"127.0.0.1:{ca.key_server.port}"
    with open_sync_channel(address, node.identity, server_id=KEY_SERVER_ID) as channel:
        return SignClient(channel).sign(
            assignment.key_id,
            SignatureScheme.ECDSA_SECP256R1_SHA256,
            Purpose.TLS13_SERVER_VERIFY,
            message=MESSAGE,
            public_key=leaf.public_key(),
        )


def grants(ca: Any) -> KeyAdminClient:
    from keyreeve_client.channel import open_sync_local_channel

    return KeyAdminClient(open_sync_local_channel(ca.key_server.admin_socket))


def test_node_attests_watches_and_signs(ca: Any) -> None:
    node = ca.node()
    with watching(ca, node) as watch:
        assert not watch.next().assignments
        create(ca, entry_for(node))
        message = watch.until(ready)
        (assignment,) = message.assignments
        chain = [x509.load_der_x509_certificate(der) for der in assignment.chain_der]
        roots = [x509.load_der_x509_certificate(der) for der in message.bundle.x509_authorities_der]
        svid = verify_chain(
            chain, trust_domain=TrustDomain("example.org"), authorities=roots, now=chain[0].not_valid_before_utc
        )
        assert str(svid.spiffe_id) == WEB
        sign(ca, node, assignment)


def test_deleted_entry_takes_the_grant_away(ca: Any) -> None:
    node = ca.node()
    entry = create(ca, entry_for(node))
    with watching(ca, node) as watch:
        (assignment,) = watch.until(ready).assignments
        sign(ca, node, assignment)
        with ca.local() as local:
            local.entries.DeleteEntry(ca_pb2.DeleteEntryRequest(entry_id=entry.entry_id))
        assert watch.until(lambda message: not message.assignments).sequence > 0
        with pytest.raises(KeyNotFound):
            sign(ca, node, assignment)
        # a new entry brings the CA's own withdrawal back, with the same key
        create(ca, entry_for(node))
        (again,) = watch.until(ready).assignments
        assert again.key_id == assignment.key_id
        sign(ca, node, again)


def test_grant_that_an_operator_revoked_stays_revoked(ca: Any) -> None:
    node = ca.node()
    entry = create(ca, entry_for(node))
    admin = grants(ca)
    with watching(ca, node) as watch:
        (assignment,) = watch.until(ready).assignments
        admin.revoke_grant(assignment.key_id, SpiffeId.parse(node.spiffe_id))
        with ca.local() as local:
            local.svids.RenewSvids(ca_pb2.RenewSvidsRequest(entry_id=entry.entry_id))
        refused = watch.until(lambda message: not ready(message)).assignments[0].error
        assert refused.code == "permission_denied"
        second = create(ca, entry_for(node, uid=1001))
        message = watch.until(lambda message: len(message.assignments) == 2)
        assert {each.error.code for each in message.assignments} == {"permission_denied"}
        with ca.local() as local:
            for each in (entry, second):
                local.entries.DeleteEntry(ca_pb2.DeleteEntryRequest(entry_id=each.entry_id))
        create(ca, entry_for(node))
        message = watch.until(lambda message: len(message.assignments) == 1)
        assert message.assignments[0].error.code == "permission_denied"
        purposes = frozenset({Purpose.TLS13_SERVER_VERIFY, Purpose.TLS13_CLIENT_VERIFY})
        admin.create_grant(assignment.key_id, SpiffeId.parse(node.spiffe_id), purposes=purposes, expires_at=None)
        create(ca, entry_for(node, uid=1002))
        (again, _) = watch.until(lambda message: ready(message) and len(message.assignments) == 2).assignments
        sign(ca, node, again)


def test_banned_agent_loses_its_stream_and_its_grants(ca: Any) -> None:
    node = ca.node()
    create(ca, entry_for(node))
    with watching(ca, node) as watch:
        (assignment,) = watch.until(ready).assignments
        with ca.local() as local:
            assert local.nodes.BanAgent(ca_pb2.BanAgentRequest(spiffe_id=node.spiffe_id)).banned
        with pytest.raises(AgentBanned):
            watch.until(lambda _: False)
        with pytest.raises(KeyNotFound):
            sign(ca, node, assignment)
        with pytest.raises(AgentBanned):
            ca.join_token(node.spiffe_id)
        with ca.local() as local:
            local.nodes.UnbanAgent(ca_pb2.UnbanAgentRequest(spiffe_id=node.spiffe_id))
    anew = ca.node()
    with watching(ca, anew) as watch:
        (assignment,) = watch.until(ready).assignments
        sign(ca, anew, assignment)
    with watching(ca, node) as watch, pytest.raises(PermissionDenied):
        watch.next()  # the SVID from before the ban acts no more


def test_join_token_works_once(ca: Any) -> None:
    token = ca.join_token()
    ca.attest(token)
    for bad in (token, "x" * 43, "", "not a token"):
        with pytest.raises(JoinTokenInvalid, match="unknown, used or expired"):
            ca.attest(bad)


def test_key_server_that_is_away_is_told_per_entry_and_mended(ca: Any) -> None:
    node = ca.node()
    with watching(ca, node) as watch:
        watch.next()
        ca.key_server.process.terminate()
        create(ca, entry_for(node))
        message = watch.until(lambda message: bool(message.assignments))
        assert message.assignments[0].error.code == "unavailable"
        ca.key_server.process.start_ready()
        (assignment,) = watch.until(ready).assignments
        sign(ca, node, assignment)


def test_key_server_that_is_away_does_not_take_what_is_good(ca: Any) -> None:
    node = ca.node()
    create(ca, entry_for(node))
    with watching(ca, node) as watch:
        watch.until(ready)
    ca.key_server.process.terminate()
    with watching(ca, node) as watch:
        assert ready(watch.next())


def test_two_nodes_share_one_key_and_have_a_grant_each(ca: Any) -> None:
    first, second = ca.node("n1"), ca.node("n2")
    create(ca, entry_for(first))
    create(ca, entry_for(second))
    own = create(ca, entry_for(second, spiffe_id="spiffe://example.org/own", key_scope=ca_pb2.KEY_SCOPE_NODE))
    with watching(ca, first) as one, watching(ca, second) as two:
        (shared,) = one.until(ready).assignments
        message = two.until(lambda message: ready(message) and len(message.assignments) == 2)
        keys = {each.spiffe_id: each for each in message.assignments}
        assert keys[WEB].key_id == shared.key_id
        assert keys[own.spiffe_id].key_id != shared.key_id
        assert list(keys[WEB].chain_der) == list(shared.chain_der)
        sign(ca, first, shared)
        sign(ca, second, keys[WEB])
        with pytest.raises(KeyNotFound):
            sign(ca, first, keys[own.spiffe_id])


def test_agents_may_not_administer_and_strangers_may_not_watch(ca: Any) -> None:
    node = ca.node()
    with ca.caller(node.identity) as stubs:
        with pytest.raises(PermissionDenied):
            stubs.entries.ListEntries(ca_pb2.ListEntriesRequest())
        with pytest.raises(PermissionDenied):
            stubs.nodes.CreateJoinToken(ca_pb2.CreateJoinTokenRequest())
        assert stubs.health.Check(ca_pb2.HealthRequest()).serving


def test_duplicate_and_stale_entries_are_conflicts(ca: Any) -> None:
    node = ca.node()
    entry = create(ca, entry_for(node))
    with pytest.raises(Conflict, match="same parent"):
        create(ca, entry_for(node))
    with ca.local() as local:
        entry.hint = "public"
        updated = local.entries.UpdateEntry(ca_pb2.UpdateEntryRequest(entry=entry))
        assert (updated.revision, updated.hint) == (2, "public")
        with pytest.raises(Conflict, match="revision 2"):
            local.entries.UpdateEntry(ca_pb2.UpdateEntryRequest(entry=entry))


def test_ca_that_is_killed_loses_nothing(ca: Any) -> None:
    node = ca.node()
    create(ca, entry_for(node))
    with watching(ca, node) as watch:
        (before,) = watch.until(ready).assignments
    ca.process.kill()
    ca.process.start_ready()
    with watching(ca, node) as watch:
        (after,) = watch.until(ready).assignments
    assert (after.key_id, list(after.chain_der)) == (before.key_id, list(before.chain_der))
