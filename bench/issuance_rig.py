"""What the issuance benchmarks stand on: a real key server by mutual TLS, PostgreSQL or SQLite, processor times, counted statements."""

from __future__ import annotations

import os
import secrets
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from keyreeve_ca.authority_service import make_root, prepare_authority
from keyreeve_ca.domain.profiles import SvidKind, SvidProfile
from keyreeve_ca.service import Ca, Policy
from keyreeve_ca.signers.key_cluster import GrpcKeyCluster, Replica, local_replica, remote_replica
from keyreeve_ca.signers.local import ThrowAwayKeys
from keyreeve_ca.store.sql_store import SqlStore
from keyreeve_client.channel import SvidFiles
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_testing.keyserver import KeyServerRig
from keyreeve_testing.postgres import PostgresServer, running_postgres
from keyreeve_testing.processes import descendants_of
from sqlalchemy import event

TD = TrustDomain("example.org")
_TICKS = os.sysconf("SC_CLK_TCK")
HOUR = timedelta(hours=1)


def processor_seconds(pid: int) -> float:
    """Of a process, its descendants, and those that ended and were waited for; by the clock ticks of /proc."""
    total = 0
    for each in (pid, *descendants_of(pid)):
        try:
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            continue
        total += sum(map(int, fields[11:15]))  # utime stime cutime cstime
    return total / _TICKS


@dataclass
class Statements:
    """Statements that leave for the database, each once however many rows it is executed for, and transactions."""

    count: int = 0
    rows: int = 0
    transactions: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def watch(self, store: SqlStore) -> None:
        event.listen(store.engine, "before_cursor_execute", self._executed)
        event.listen(store.engine, "begin", self._began)

    def reset(self) -> None:
        with self._lock:
            self.count = self.rows = self.transactions = 0

    def _executed(self, _c: Any, _cursor: Any, statement: str, parameters: Any, _x: Any, many: bool) -> None:
        if statement.startswith("BEGIN"):
            return
        with self._lock:
            self.count += 1
            self.rows += len(parameters) if many else 1
            self.kinds[" ".join(statement.split()[:4])] += 1

    def _began(self, _connection: Any) -> None:
        with self._lock:
            self.transactions += 1


@dataclass
class IssuanceRig:
    """The CA's parts in this process, so that its processor time is this process's."""

    ca: Ca
    store: SqlStore
    key_server: KeyServerRig
    postgres: PostgresServer | None
    url: str
    statements: Statements = field(default_factory=Statements)

    def key_server_seconds(self) -> float:
        return processor_seconds(self.key_server.process.pid)

    def database_seconds(self) -> float:
        """0 for SQLite, whose work is done in the CA's process."""
        if self.postgres is None:
            return 0.0
        return processor_seconds(int((self.postgres.data / "postmaster.pid").read_text().splitlines()[0]))


def entropy(count: int) -> bytes:
    return secrets.token_bytes(count)


def policy() -> Policy:
    return Policy(
        trust_domain=TD,
        workload=SvidProfile(SvidKind.WORKLOAD, HOUR, 24 * HOUR),
        agent=SvidProfile(SvidKind.AGENT, HOUR, HOUR),
        service=SvidProfile(SvidKind.SERVICE, 24 * HOUR, 24 * HOUR),
    )


@contextmanager
def running_rig(directory: Path, *, database: str) -> Iterator[IssuanceRig]:
    """`database`: postgresql or sqlite. The key server has policy, purpose checks and audit on; its log is not synced to the disk."""
    with ExitStack() as stack:
        postgres = stack.enter_context(running_postgres()) if database == "postgresql" else None
        url = postgres.make_database() if postgres else f"sqlite:///{directory / 'ca.sqlite3'}"
        key_server = KeyServerRig(directory / "ks")
        signer = key_server.signer_toml.read_text()
        key_server.signer_toml.write_text(signer.replace("[audit]", '[audit]\nfsync = "off"'))
        stack.enter_context(key_server.running())
        local = GrpcKeyCluster([local_replica(key_server.admin_socket)])
        remote = GrpcKeyCluster([_as_ca(key_server, directory)])
        for each in (local, remote):
            stack.callback(each.close)
        store = SqlStore.open(url)
        stack.callback(store.close)
        store.migrate()
        operator = Ca(policy(), store, local, lambda: datetime.now(UTC), entropy, ThrowAwayKeys())
        make_root(operator)  # only an operator's socket may use the root's key
        prepare_authority(operator)
        ca = replace(operator, cluster=remote)
        rig = IssuanceRig(ca, store, key_server, postgres, url)
        rig.statements.watch(store)
        yield rig


def _as_ca(key_server: KeyServerRig, directory: Path) -> Replica:
    svid, bundle = key_server.pki.svid("keyreeve/ca"), directory / "bundle.pem"
    chain, key = svid.write(directory)
    bundle.write_bytes(key_server.pki.bundle_pem)
    files = SvidFiles(key=key, chain=chain, bundle=bundle)
    return remote_replica(f"127.0.0.1:{key_server.port}", files, SpiffeId.parse(key_server.spiffe_id))
