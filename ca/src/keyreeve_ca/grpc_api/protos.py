"""Domain to proto and back. What comes in is held to its form here; every refusal names the field."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from keyreeve_client.key_admin import key_type_from_proto, key_type_to_proto
from keyreeve_common.bundle import Bundle
from keyreeve_common.errors import InvalidRequest
from keyreeve_common.grpc_edge import error_to_proto
from keyreeve_common.identity import SpiffeId
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import KeyType
from keyreeve_common.v1 import ca_pb2

from keyreeve_ca.assignment_service import Assignment
from keyreeve_ca.domain.authority import Authority, AuthorityState
from keyreeve_ca.domain.entries import DEFAULT_PURPOSES, Custody, Delegate, Entry, KeyScope, Selector
from keyreeve_ca.domain.records import Agent, SvidRecord, SvidState

MAX_PAGE = 1000
DEFAULT_PAGE = 100
_CUSTODY = {0: Custody.CLUSTER, ca_pb2.CUSTODY_CLUSTER: Custody.CLUSTER, ca_pb2.CUSTODY_NODE: Custody.NODE}
_SCOPE = {0: KeyScope.IDENTITY, ca_pb2.KEY_SCOPE_IDENTITY: KeyScope.IDENTITY, ca_pb2.KEY_SCOPE_NODE: KeyScope.NODE}
_CUSTODY_NUMBER = {Custody.CLUSTER: ca_pb2.CUSTODY_CLUSTER, Custody.NODE: ca_pb2.CUSTODY_NODE}
_SCOPE_NUMBER = {KeyScope.IDENTITY: ca_pb2.KEY_SCOPE_IDENTITY, KeyScope.NODE: ca_pb2.KEY_SCOPE_NODE}
_AUTHORITY_STATE = {
    AuthorityState.PREPARED: ca_pb2.AUTHORITY_STATE_PREPARED,
    AuthorityState.ACTIVE: ca_pb2.AUTHORITY_STATE_ACTIVE,
    AuthorityState.OLD: ca_pb2.AUTHORITY_STATE_OLD,
}
_SVID_STATE = {
    SvidState.INTENDED: ca_pb2.SVID_STATE_INTENDED,
    SvidState.ISSUED: ca_pb2.SVID_STATE_ISSUED,
    SvidState.FAILED: ca_pb2.SVID_STATE_FAILED,
}


def page_size(asked: int) -> int:
    if asked > MAX_PAGE:
        raise InvalidRequest(f"page_size: at most {MAX_PAGE}")
    return asked or DEFAULT_PAGE


def duration(message: Any, name: str) -> timedelta | None:
    """Raises: InvalidRequest."""
    if not message.HasField(name):
        return None
    try:
        value: timedelta = getattr(message, name).ToTimedelta()
    except (ValueError, OverflowError):
        raise InvalidRequest(f"{name}: is not a duration") from None
    return value


def time_of(message: Any, name: str) -> datetime | None:
    """Raises: InvalidRequest."""
    if not message.HasField(name):
        return None
    try:
        value: datetime = getattr(message, name).ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise InvalidRequest(f"{name}: is not a time between the years 1 and 9999") from None
    return value


def timestamp(time: datetime | None) -> Timestamp | None:
    if time is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp


def entry_from_proto(message: ca_pb2.Entry, *, entry_id: str, now: datetime) -> Entry:
    """A checked entry; `entry_id`, revision and creation are the CA's to say. Raises: InvalidRequest, FailedPrecondition."""
    return Entry(
        entry_id=entry_id,
        spiffe_id=_field("spiffe_id", SpiffeId.parse, message.spiffe_id),
        parent_id=_field("parent_id", SpiffeId.parse, message.parent_id),
        selectors=tuple(Selector(each.type, each.value) for each in message.selectors),
        created_at=now,
        delegates=tuple(_delegate(each) for each in message.delegates),
        x509_svid_ttl=duration(message, "x509_svid_ttl"),
        dns_names=tuple(message.dns_names),
        custody=_known(_CUSTODY, message.custody, "custody"),
        key_scope=_known(_SCOPE, message.key_scope, "key_scope"),
        key_type=_key_type(message.key_type),
        key_backend=message.key_backend,
        hint=message.hint,
        expires_at=time_of(message, "expires_at"),
        purposes=_purposes(message.purposes),
    )


def _field(name: str, parse: Callable[[str], SpiffeId], text: str) -> SpiffeId:
    if not text:
        raise InvalidRequest(f"{name}: is missing")
    return parse(text)


def _delegate(message: ca_pb2.Delegate) -> Delegate:
    return Delegate(
        tuple(Selector(each.type, each.value) for each in message.selectors),
        SpiffeId.parse(message.spiffe_id) if message.spiffe_id else None,
    )


def _known(table: dict[Any, Any], number: int, name: str) -> Any:
    if number not in table:
        raise InvalidRequest(f"{name}: {number} is not a value that this CA knows")
    return table[number]


def _key_type(number: int) -> KeyType:
    found = KeyType.EC_P256 if number == 0 else key_type_from_proto(number)
    if found is None:
        raise InvalidRequest(f"key_type: {number} is not a value that this CA knows")
    return found


def _purposes(numbers: Any) -> frozenset[Purpose]:
    if not numbers:
        return DEFAULT_PURPOSES
    try:
        return frozenset(Purpose(number) for number in numbers)
    except ValueError:
        raise InvalidRequest("purposes: holds a value that this CA does not know") from None


def entry_to_proto(entry: Entry) -> ca_pb2.Entry:
    message = ca_pb2.Entry(
        entry_id=entry.entry_id,
        spiffe_id=str(entry.spiffe_id),
        parent_id=str(entry.parent_id),
        selectors=_selectors(entry.selectors),
        delegates=_delegates(entry),
        dns_names=entry.dns_names,
        custody=_CUSTODY_NUMBER[entry.custody],
        key_scope=_SCOPE_NUMBER[entry.key_scope],
        key_type=key_type_to_proto(entry.key_type),
        key_backend=entry.key_backend,
        hint=entry.hint,
        revision=entry.revision,
        created_at=timestamp(entry.created_at),
        expires_at=timestamp(entry.expires_at),
        purposes=_purpose_numbers(entry),
    )
    if entry.x509_svid_ttl is not None:
        message.x509_svid_ttl.FromTimedelta(entry.x509_svid_ttl)
    return message


def _purpose_numbers(entry: Entry) -> Any:
    return sorted(int(purpose) for purpose in entry.purposes)


def _selectors(selectors: tuple[Selector, ...]) -> list[ca_pb2.Selector]:
    return [ca_pb2.Selector(type=each.type, value=each.value) for each in selectors]


def _delegates(entry: Entry) -> list[ca_pb2.Delegate]:
    return [
        ca_pb2.Delegate(selectors=_selectors(each.selectors), spiffe_id=str(each.spiffe_id or ""))
        for each in entry.delegates
    ]


def assignment_to_proto(assignment: Assignment) -> ca_pb2.Assignment:
    entry = assignment.entry
    message = ca_pb2.Assignment(
        entry_id=entry.entry_id,
        revision=entry.revision,
        spiffe_id=str(entry.spiffe_id),
        selectors=_selectors(entry.selectors),
        delegates=_delegates(entry),
        purposes=_purpose_numbers(entry),
        hint=entry.hint,
    )
    if assignment.key is not None and assignment.svid is not None and assignment.error is None:
        message.key_id = assignment.key.key_id
        message.key_type = key_type_to_proto(entry.key_type)
        message.spki_der = assignment.key.spki_der
        message.chain_der.extend(assignment.svid.chain_der)
        message.not_after.FromDatetime(assignment.svid.not_after)
        message.former_key_ids.extend(assignment.former_key_ids)
    elif assignment.error is not None:
        message.error.CopyFrom(error_to_proto(assignment.error))
    return message


def assignments_to_proto(sequence: int, assignments: list[Assignment], bundle: Bundle) -> ca_pb2.Assignments:
    return ca_pb2.Assignments(
        sequence=sequence, assignments=map(assignment_to_proto, assignments), bundle=bundle.to_proto()
    )


def agent_to_proto(agent: Agent, *, connected: bool) -> ca_pb2.Agent:
    return ca_pb2.Agent(
        spiffe_id=str(agent.spiffe_id),
        attestation_type=agent.attestation_type,
        svid_serial=agent.serials[0] if agent.serials else "",
        svid_not_after=timestamp(agent.svid_not_after),
        attested_at=timestamp(agent.attested_at),
        last_seen_at=timestamp(agent.last_seen_at),
        banned=agent.banned,
        connected=connected,
        agent_version=agent.agent_version,
    )


def authority_to_proto(authority: Authority) -> ca_pb2.Authority:
    return ca_pb2.Authority(
        authority_id=authority.authority_id,
        state=_AUTHORITY_STATE[authority.state],
        key_id=authority.key_id,
        certificate_der=authority.certificate_der,
        not_after=timestamp(authority.not_after),
        root=authority.root,
    )


def svid_to_proto(record: SvidRecord) -> ca_pb2.X509SvidRecord:
    return ca_pb2.X509SvidRecord(
        serial=record.serial,
        spiffe_id=str(record.spiffe_id),
        entry_id=record.entry_id,
        key_id=record.key_id,
        authority_id=record.authority_id,
        state=_SVID_STATE[record.state],
        not_before=timestamp(record.not_before),
        not_after=timestamp(record.not_after),
        chain_der=record.chain_der,
        failure=record.failure,
    )
