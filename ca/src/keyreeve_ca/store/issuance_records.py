"""Authorities, the bundle's sequence, and the inventory of what was issued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from keyreeve_common.errors import Conflict, NotFound
from keyreeve_common.identity import SpiffeId, TrustDomain
from sqlalchemy import Connection, bindparam, func, select, update

from keyreeve_ca.domain.authority import Authority
from keyreeve_ca.domain.records import SvidRecord, SvidState
from keyreeve_ca.store import schema
from keyreeve_ca.store.change_log import agents_sharing, announce
from keyreeve_ca.store.engine import read_transaction, write_transaction
from keyreeve_ca.store.rows import (
    BUNDLE,
    SVID_NUMBERS,
    Part,
    authority_from_row,
    authority_to_row,
    bump,
    chain_to_json,
    read_counter,
    svid_from_row,
    svid_to_row,
)

_A = schema.authorities.c
_S = schema.svids.c
_TRUST_DOMAIN = "trust_domain"
_ISSUED = (
    update(schema.svids)
    .where(_S.serial == bindparam("of"))
    .values(state=SvidState.ISSUED.value, chain_der=bindparam("chain_der"), current=bindparam("current"))
)
_FAILED = (
    update(schema.svids)
    .where(_S.serial == bindparam("of"))
    .values(state=SvidState.FAILED.value, failure=bindparam("failure"))
)


class IssuanceRecords(Part):
    def claim_trust_domain(self, trust_domain: TrustDomain) -> None:
        with write_transaction(self.engine) as connection:
            query = select(schema.settings.c.value).where(schema.settings.c.name == _TRUST_DOMAIN)
            stored = connection.execute(query).scalar()
            if stored is None:
                connection.execute(schema.settings.insert().values(name=_TRUST_DOMAIN, value=trust_domain.name))
            elif stored != trust_domain.name:
                raise Conflict(f"database belongs to trust domain {stored}, the configuration says {trust_domain}")

    def bundle_sequence(self) -> int:
        with read_transaction(self.engine) as connection:
            return read_counter(connection, BUNDLE)

    def list_authorities(self) -> list[Authority]:
        with read_transaction(self.engine) as connection:
            return _authorities(connection)

    def save_authorities(self, authorities: Sequence[Authority], *, expected: Sequence[Authority]) -> None:
        with write_transaction(self.engine) as connection:
            stored = {each.authority_id: each for each in _authorities(connection)}
            if stored != {each.authority_id: each for each in expected}:
                raise Conflict("authorities changed meanwhile; look again")
            for authority in authorities:
                row = authority_to_row(authority)
                if authority.authority_id not in stored:
                    connection.execute(schema.authorities.insert().values(**row))
                    if authority.root:
                        bump(connection, BUNDLE)
                elif stored[authority.authority_id] != authority:
                    same = _A.authority_id == authority.authority_id
                    connection.execute(update(schema.authorities).where(same).values(**row))
            announce(connection, None)

    def record_intent(self, record: SvidRecord) -> None:
        with write_transaction(self.engine) as connection:
            number = bump(connection, SVID_NUMBERS)
            connection.execute(schema.svids.insert().values(**svid_to_row(record, number)))

    def record_intents(self, records: Sequence[SvidRecord]) -> None:
        with write_transaction(self.engine) as connection:
            last = bump(connection, SVID_NUMBERS, by=len(records))
            numbered = enumerate(records, last - len(records) + 1)
            rows = [svid_to_row(record, number) for number, record in numbered]
            connection.execute(schema.svids.insert(), rows)

    def record_results(self, issued: Sequence[SvidRecord], failures: Mapping[str, str]) -> None:
        with write_transaction(self.engine) as connection:
            if failures:
                texts = [{"of": serial, "failure": text} for serial, text in failures.items()]
                connection.execute(_FAILED, texts)
            if issued:
                _record_issued(connection, issued)
                sharing = agents_sharing(connection, [record.subject for record in issued])
                if sharing:  # else it is no entry's SVID
                    announce(connection, sharing)

    def record_issued(self, serial: str, chain_der: Sequence[bytes]) -> SvidRecord:
        with write_transaction(self.engine) as connection:
            record = _svid(connection, serial)
            connection.execute(
                update(schema.svids).where(_S.subject == record.subject, _S.current.is_(True)).values(current=False)
            )
            connection.execute(
                update(schema.svids)
                .where(_S.serial == serial)
                .values(state=SvidState.ISSUED.value, chain_der=chain_to_json(chain_der), current=True)
            )
            return _svid(connection, serial)

    def record_failed(self, serial: str, failure: str) -> None:
        with write_transaction(self.engine) as connection:
            connection.execute(
                update(schema.svids).where(_S.serial == serial).values(state=SvidState.FAILED.value, failure=failure)
            )

    def current_svid(self, subject: str) -> SvidRecord | None:
        query = select(schema.svids).where(_S.subject == subject, _S.current.is_(True))
        with read_transaction(self.engine) as connection:
            row = connection.execute(query).mappings().first()
            return svid_from_row(row) if row else None

    def list_svids(
        self,
        *,
        spiffe_id: SpiffeId | None = None,
        serial: str = "",
        current_only: bool = False,
        limit: int = 1000,
        after: str = "",
    ) -> list[SvidRecord]:
        query = select(schema.svids).order_by(_S.number.desc()).limit(limit)
        if spiffe_id is not None:
            query = query.where(_S.spiffe_id == str(spiffe_id))
        if serial:
            query = query.where(_S.serial == serial)
        if current_only:
            query = query.where(_S.current.is_(True))
        with read_transaction(self.engine) as connection:
            if after:
                mark = select(func.max(_S.number)).where(_S.serial == after).scalar_subquery()
                query = query.where(_S.number < mark)
            return [svid_from_row(row) for row in connection.execute(query).mappings()]


def _record_issued(connection: Connection, issued: Sequence[SvidRecord]) -> None:
    newest = {record.subject: record.serial for record in issued}
    connection.execute(update(schema.svids).where(_S.subject.in_(newest), _S.current.is_(True)).values(current=False))
    rows = [
        {
            "of": record.serial,
            "chain_der": chain_to_json(record.chain_der),
            "current": newest[record.subject] == record.serial,
        }
        for record in issued
    ]
    if connection.execute(_ISSUED, rows).rowcount != len(rows):
        raise NotFound("no such SVID")  # and nothing of this batch is changed


def _authorities(connection: Connection) -> list[Authority]:
    query = select(schema.authorities).order_by(_A.root.desc(), _A.number)
    return [authority_from_row(row) for row in connection.execute(query).mappings()]


def _svid(connection: Connection, serial: str) -> SvidRecord:
    row = connection.execute(select(schema.svids).where(_S.serial == serial)).mappings().first()
    if row is None:
        raise NotFound("no such SVID")
    return svid_from_row(row)
