"""Rows to values and back. What does not parse any more was written by somebody else: that is a fault, not an input error."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import Any, TypeAlias, cast

from cryptography import x509
from keyreeve_common.identity import SpiffeId
from keyreeve_common.purposes import parse_purpose
from keyreeve_common.schemes import KeyType
from sqlalchemy import Connection, Engine, RowMapping, select, update

from keyreeve_ca.domain.authority import Authority, AuthorityState
from keyreeve_ca.domain.entries import Custody, Delegate, Entry, KeyOwner, KeyScope, Selector
from keyreeve_ca.domain.grants import GrantState, NodeGrant
from keyreeve_ca.domain.records import Agent, KeyUse, ManagedKey, SvidRecord, SvidState
from keyreeve_ca.store import schema

Row: TypeAlias = RowMapping | Mapping[str, Any]
CHANGES = "changes"
BUNDLE = "bundle"
SVID_NUMBERS = "svid_numbers"


@dataclass
class Part:
    """One part of the store; all parts share the engine."""

    engine: Engine


def bump(connection: Connection, name: str, *, by: int = 1) -> int:
    """The counter's next value, `by` steps on. Write transactions are serial, so there is no race."""
    value = by + read_counter(connection, name)
    changed = connection.execute(
        update(schema.counters).where(schema.counters.c.name == name).values(value=value)
    ).rowcount
    if not changed:
        connection.execute(schema.counters.insert().values(name=name, value=value))
    return value


def read_counter(connection: Connection, name: str) -> int:
    found = connection.execute(select(schema.counters.c.value).where(schema.counters.c.name == name)).scalar()
    return int(found or 0)


def hash_of(spiffe_id: SpiffeId) -> str:
    return sha256(str(spiffe_id).encode()).hexdigest()


def _selectors_to_json(selectors: Sequence[Selector]) -> list[list[str]]:
    return [[selector.type, selector.value] for selector in selectors]


def _selectors(value: Any) -> tuple[Selector, ...]:
    return tuple(Selector(kind, text) for kind, text in value)


def _optional_id(text: str | None) -> SpiffeId | None:
    return SpiffeId.parse(text) if text else None


def entry_to_row(entry: Entry) -> dict[str, Any]:
    return {
        "entry_id": entry.entry_id,
        "similarity": entry.similarity,
        "spiffe_id": str(entry.spiffe_id),
        "parent_id": str(entry.parent_id),
        "owner": entry.owner.digest,
        "selectors": _selectors_to_json(entry.selectors),
        "delegates": [
            {"selectors": _selectors_to_json(each.selectors), "spiffe_id": str(each.spiffe_id or "")}
            for each in entry.delegates
        ],
        "dns_names": list(entry.dns_names),
        "purposes": sorted(purpose.label for purpose in entry.purposes),
        "x509_svid_ttl": entry.x509_svid_ttl.total_seconds() if entry.x509_svid_ttl else None,
        "custody": entry.custody.value,
        "key_scope": entry.key_scope.value,
        "key_type": entry.key_type.value,
        "key_backend": entry.key_backend,
        "hint": entry.hint,
        "revision": entry.revision,
        "created_at": entry.created_at,
        "expires_at": entry.expires_at,
    }


def entry_from_row(row: Row) -> Entry:
    ttl = row["x509_svid_ttl"]
    return Entry(
        entry_id=row["entry_id"],
        spiffe_id=SpiffeId.parse(row["spiffe_id"]),
        parent_id=SpiffeId.parse(row["parent_id"]),
        selectors=_selectors(row["selectors"]),
        delegates=tuple(
            Delegate(_selectors(each["selectors"]), _optional_id(each["spiffe_id"])) for each in row["delegates"]
        ),
        x509_svid_ttl=timedelta(seconds=ttl) if ttl else None,
        dns_names=tuple(row["dns_names"]),
        custody=Custody(row["custody"]),
        key_scope=KeyScope(row["key_scope"]),
        key_type=KeyType(row["key_type"]),
        key_backend=row["key_backend"],
        hint=row["hint"],
        revision=row["revision"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        purposes=frozenset(parse_purpose(name) for name in row["purposes"]),
    )


def agent_to_row(agent: Agent) -> dict[str, Any]:
    return {
        "spiffe_id": str(agent.spiffe_id),
        "attestation_type": agent.attestation_type,
        "serials": list(agent.serials),
        "svid_not_after": agent.svid_not_after,
        "attested_at": agent.attested_at,
        "last_seen_at": agent.last_seen_at,
        "banned": agent.banned,
        "evicted": agent.evicted,
        "agent_version": agent.agent_version,
    }


def agent_from_row(row: Row) -> Agent:
    values = dict(cast("Mapping[str, Any]", row))
    return Agent(**{**values, "spiffe_id": SpiffeId.parse(row["spiffe_id"]), "serials": tuple(row["serials"])})


def authority_to_row(authority: Authority) -> dict[str, Any]:
    return {
        "authority_id": authority.authority_id,
        "state": authority.state.value,
        "key_id": authority.key_id,
        "certificate_der": authority.certificate_der,
        "root": authority.root,
        "number": authority.number,
    }


def authority_from_row(row: Row) -> Authority:
    return Authority(
        authority_id=row["authority_id"],
        state=AuthorityState(row["state"]),
        key_id=row["key_id"],
        certificate=x509.load_der_x509_certificate(row["certificate_der"]),
        root=row["root"],
        number=row["number"],
    )


def key_to_row(key: ManagedKey) -> dict[str, Any]:
    return {
        "owner": key.owner.digest,
        "spiffe_id": str(key.owner.spiffe_id),
        "agent": str(key.owner.agent) if key.owner.agent else None,
        "generation": key.generation,
        "key_id": key.key_id,
        "spki_der": key.spki_der,
        "fingerprint": key.fingerprint,
        "use": key.use.value,
    }


def owner_from_row(row: Row) -> KeyOwner:
    return KeyOwner(SpiffeId.parse(row["spiffe_id"]), _optional_id(row["agent"]))


def key_from_row(row: Row) -> ManagedKey:
    return ManagedKey(
        owner=owner_from_row(row),
        generation=row["generation"],
        key_id=row["key_id"],
        spki_der=bytes(row["spki_der"]),
        fingerprint=row["fingerprint"],
        use=KeyUse(row["use"]),
    )


def grant_to_row(grant: NodeGrant) -> dict[str, Any]:
    return {
        "owner": grant.owner.digest,
        "agent_hash": hash_of(grant.agent),
        "agent": str(grant.agent),
        "key_id": grant.key_id,
        "state": grant.state.value,
        "expires_at": grant.expires_at,
        "revoked_at": grant.revoked_at,
    }


def grant_from_row(row: Row, owner: KeyOwner) -> NodeGrant:
    return NodeGrant(
        owner=owner,
        agent=SpiffeId.parse(row["agent"]),
        key_id=row["key_id"],
        state=GrantState(row["state"]),
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
    )


def svid_to_row(record: SvidRecord, number: int) -> dict[str, Any]:
    return {
        "serial": record.serial,
        "number": number,
        "spiffe_id": str(record.spiffe_id),
        "subject": record.subject,
        "authority_id": record.authority_id,
        "entry_id": record.entry_id,
        "key_id": record.key_id,
        "state": record.state.value,
        "wanted": record.wanted,
        "not_before": record.not_before,
        "not_after": record.not_after,
        "created_at": record.created_at,
        "chain_der": chain_to_json(record.chain_der),
        "failure": record.failure,
        "current": record.current,
    }


def chain_to_json(chain_der: Sequence[bytes]) -> list[str]:
    return [base64.b64encode(der).decode("ascii") for der in chain_der]


def svid_from_row(row: Row) -> SvidRecord:
    values = {str(name): row[name] for name in cast("Mapping[str, Any]", row) if name != "number"}
    return SvidRecord(
        **{
            **values,
            "spiffe_id": SpiffeId.parse(row["spiffe_id"]),
            "state": SvidState(row["state"]),
            "chain_der": tuple(base64.b64decode(text) for text in row["chain_der"]),
        }
    )
