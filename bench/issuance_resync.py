"""A fleet that comes back after a restart of the CA: `python bench/issuance_resync.py [--agents 10000] [--entries 100000] [--output json]`.

The CA is the real process on PostgreSQL, in front of a real key server. Each simulated agent is a stream over a connection of its own, by mutual
TLS with its own SVID, which the CA issued: nothing of the authentication is left out. Entries, keys, SVIDs and grants are there already, as
after a restart; they were written to the two databases directly. Identities are shared by nodes (key_scope identity), one grant for each entry.

Told are the time until every agent has its state, the processor time of CA, key server and database, the CA's peak memory, the statements that
the database executed for it, and how long an administrator waits meanwhile. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from issuance_rig import TD, entropy, policy, processor_seconds
from keyreeve_ca.assignment_service import ensure_svids
from keyreeve_ca.domain.entries import Entry, Selector
from keyreeve_ca.domain.grants import EXPIRY_MARGIN, GrantState, NodeGrant
from keyreeve_ca.domain.records import Agent, SvidRecord, digest_of
from keyreeve_ca.issuance_service import issue_x509_svids
from keyreeve_ca.service import Ca, SvidOrder
from keyreeve_ca.signers.key_cluster import GrpcKeyCluster, local_replica
from keyreeve_ca.signers.local import ThrowAwayKeys
from keyreeve_ca.store import schema
from keyreeve_ca.store.rows import agent_to_row, entry_to_row, grant_to_row
from keyreeve_ca.store.sql_store import SqlStore
from keyreeve_client.agent.backoff import Backoff
from keyreeve_client.channel import TlsIdentity, open_channel, open_sync_local_channel
from keyreeve_common.identity import SpiffeId
from keyreeve_common.purposes import Purpose
from keyreeve_common.v1 import ca_pb2, ca_pb2_grpc
from keyreeve_keyserver.catalog import schema as catalog
from keyreeve_testing.keyserver import KeyServerRig
from keyreeve_testing.postgres import PostgresServer, running_postgres
from keyreeve_testing.processes import ManagedProcess, free_port
from sqlalchemy import create_engine, insert, select, text

STUBS = 4  # processes that play agents
OPENING_AT_ONCE = 50  # connections that one of them opens at a time
PATIENCE_S = 900
PURPOSES = frozenset({Purpose.TLS13_SERVER_VERIFY, Purpose.TLS13_CLIENT_VERIFY})


@dataclass(frozen=True, slots=True)
class AgentStub:
    """What one simulated agent needs."""

    chain_pem: bytes
    key_pem: bytes


@dataclass(frozen=True, slots=True)
class Target:
    """Where the agents call, and who must answer."""

    address: str
    server_id: str
    bundle_pem: bytes


def key_pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


async def _play(target: Target, stubs: Sequence[AgentStub], results: Any, stop: Any) -> None:
    opening = asyncio.Semaphore(OPENING_AT_ONCE)
    waits: list[float] = []
    sizes: list[int] = []
    began = monotonic()
    kept: list[Any] = []

    failed: Counter[str] = Counter()

    async def agent(stub: AgentStub) -> None:
        """As an agent does it: again after a failure, later each time."""
        backoff = Backoff(timedelta(milliseconds=200), timedelta(seconds=30))
        while True:
            try:
                message = await connect(stub)
                break
            except grpc.aio.AioRpcError as error:
                failed[f"{error.code().name}: {str(error.details())[-60:]}"] += 1
                await asyncio.sleep(backoff.next())
        waits.append(monotonic() - began)
        sizes.append(sum(not each.HasField("error") for each in message.assignments))

    async def connect(stub: AgentStub) -> ca_pb2.Assignments:
        async with opening:
            identity = TlsIdentity(target.bundle_pem, stub.chain_pem, stub.key_pem)
            channel = open_channel(target.address, identity, server_id=SpiffeId.parse(target.server_id))
            call: Any = ca_pb2_grpc.AgentsStub(channel).WatchAssignments(
                ca_pb2.WatchAssignmentsRequest(agent_version="bench")
            )
            kept.append((channel, call))
            message: ca_pb2.Assignments = await call.read()
            return message

    await asyncio.gather(*(agent(stub) for stub in stubs))
    results.put({"waits": waits, "assignments": sum(sizes), "failed_attempts": dict(failed)})
    await asyncio.to_thread(stop.wait)  # connected agents are part of the load
    for channel, call in kept:
        call.cancel()
        await channel.close()


def play(target: Target, stubs: Sequence[AgentStub], results: Any, stop: Any) -> None:
    asyncio.run(_play(target, stubs, results, stop))


@dataclass
class Fleet:
    """Key server, database and CA with everything that the agents had before the restart."""

    directory: Path
    postgres: PostgresServer
    agents: int
    entries: int
    identities: int

    def __post_init__(self) -> None:
        self.key_server = KeyServerRig(self.directory / "ks")
        self.url = self.postgres.make_database()
        self.port, self.attest_port = free_port(), free_port()
        self.config = self.directory / "ca.toml"
        self.admin_socket = self.directory / "run" / "admin.sock"
        location = self.url.replace("+psycopg", "")
        self.config.write_text(
            f'trust_domain = "example.org"\nstate_dir = "state"\nadmin_socket = "{self.admin_socket}"\n'
            f'listen = "127.0.0.1:{self.port}"\nattest_listen = "127.0.0.1:{self.attest_port}"\n'
            f'bundle_file = "bundle.pem"\n[key_cluster]\naddresses = ["127.0.0.1:{self.key_server.port}"]\n'
            f'admin_socket = "{self.key_server.admin_socket}"\n[database]\nurl = "{location}"\n'
        )
        self.process = ManagedProcess.python_module(
            "keyreeve_ca", "--config", self.config, name="ca", log_path=self.directory / "ca.log"
        )

    def prepare(self) -> list[AgentStub]:
        """With a key server that runs; it is to be restarted afterwards, to read its grants."""
        command = [sys.executable, "-m", "keyreeve_client.cli", "init", "--config", str(self.config)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        cluster, store = GrpcKeyCluster([local_replica(self.key_server.admin_socket)]), SqlStore.open(self.url)
        ca = Ca(policy(), store, cluster, lambda: datetime.now(UTC), entropy, ThrowAwayKeys())
        try:
            return self._fill(ca, store)
        finally:
            store.close()
            cluster.close()

    def _fill(self, ca: Ca, store: SqlStore) -> list[AgentStub]:
        now = ca.clock()
        ids = [SpiffeId(TD, f"/keyreeve/agent/n{number}") for number in range(self.agents)]
        entries = [self._entry(number, ids[number % self.agents], now) for number in range(self.entries)]
        with store.engine.begin() as connection:
            for start in range(0, len(entries), 5000):
                connection.execute(
                    insert(schema.entries), [entry_to_row(each) for each in entries[start : start + 5000]]
                )
        firsts = {each.owner.digest: each for each in reversed(entries)}
        certified = ensure_svids(ca, list(firsts.values()))
        by_owner = {owner: certified[entry.entry_id] for owner, entry in firsts.items()}
        grants = [self._grant(each, by_owner[each.owner.digest]) for each in entries]
        with store.engine.begin() as connection:
            for start in range(0, len(grants), 5000):
                connection.execute(
                    insert(schema.node_grants), [grant_to_row(each) for each in grants[start : start + 5000]]
                )
        self._fill_catalog(grants)
        return self._certify_agents(ca, store, ids)

    def _entry(self, number: int, agent: SpiffeId, now: datetime) -> Entry:
        """Entry 0 to agents-1 are the first of each agent, and so on; agents have different identities."""
        shift = number // self.agents
        name = (number * 7 + shift * 13) % self.identities
        selector = Selector("unix", f"uid:{shift + 1}")
        return Entry(f"e{number:08}", SpiffeId(TD, f"/w/{name}"), agent, (selector,), now, purposes=PURPOSES)

    @staticmethod
    def _grant(entry: Entry, certified: Any) -> NodeGrant:
        key, svid = certified
        # The catalog counts in microseconds, and gives them back.
        until = (svid.not_after + EXPIRY_MARGIN + timedelta(hours=1)).replace(microsecond=0)
        return NodeGrant(entry.owner, entry.parent_id, key.key_id, GrantState.LIVE, until)

    def _fill_catalog(self, grants: Sequence[NodeGrant]) -> None:
        """One grant is made by the key server, the others are written after its example."""
        first = grants[0]
        made = self.key_server.grant(first.key_id, str(first.agent), purposes=[int(each) for each in sorted(PURPOSES)])  # type: ignore[misc]
        (path,) = self.key_server.state.glob("*.sqlite3")
        engine = create_engine(f"sqlite:///{path}")
        with engine.begin() as connection:
            example = dict(connection.execute(select(catalog.grants)).mappings().all()[-1])
            unit = example["created_at"] / made.created_at.ToDatetime(tzinfo=UTC).timestamp()
            rows = {
                (grant.key_id, str(grant.agent)): {
                    **example,
                    "key_id": grant.key_id,
                    "holder": str(grant.agent),
                    "expires_at": round(grant.expires_at.timestamp() * unit) if grant.expires_at else None,
                }
                for grant in grants
            }
            connection.execute(catalog.grants.delete().where(catalog.grants.c.holder == str(first.agent)))
            connection.execute(insert(catalog.grants), list(rows.values()))
        engine.dispose()

    def _certify_agents(self, ca: Ca, store: SqlStore, ids: Sequence[SpiffeId]) -> list[AgentStub]:
        keys = [ec.generate_private_key(ec.SECP256R1()) for _ in ids]
        orders = [
            SvidOrder(ca.policy.agent, each, key.public_key(), f"agent-{digest_of(each)}")
            for each, key in zip(ids, keys, strict=True)
        ]
        records = [each for each in issue_x509_svids(ca, orders) if isinstance(each, SvidRecord)]
        now = ca.clock()
        rows = [
            agent_to_row(Agent(each.spiffe_id, "join_token", (each.serial,), each.not_after, now, now))
            for each in records
        ]
        with store.engine.begin() as connection:
            connection.execute(insert(schema.agents), rows)
            connection.execute(text("ANALYZE"))
        return [AgentStub(_pem(record), key_pem_of(key)) for record, key in zip(records, keys, strict=True)]


def _pem(record: SvidRecord) -> bytes:
    return b"".join(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in record.chain_der)


class DatabaseStatements:
    """What PostgreSQL itself counted, with transactions' own statements."""

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url)
        with self._engine.begin() as connection:
            connection.execute(text("CREATE EXTENSION IF NOT EXISTS pg_stat_statements"))

    def reset(self) -> None:
        with self._engine.begin() as connection:
            connection.execute(text("SELECT pg_stat_statements_reset()"))

    def read(self) -> dict[str, Any]:
        utility = "query ~ '^(BEGIN|COMMIT|ROLLBACK)' OR query = '' OR query ~ 'pg_advisory|pg_stat_statements'"
        query = f"SELECT sum(calls) FILTER (WHERE NOT ({utility})), sum(calls), sum(rows) FROM pg_stat_statements"  # noqa: S608
        top = "SELECT calls, rows, round(total_exec_time) ms, left(query, 60) query FROM pg_stat_statements ORDER BY 3 DESC LIMIT 8"
        with self._engine.begin() as connection:
            statements, calls, rows = connection.execute(text(query)).one()
            heaviest = [list(map(str, row)) for row in connection.execute(text(top))]
        return {
            "statements": int(statements),
            "with_transaction_control": int(calls),
            "rows": int(rows),
            "heaviest": heaviest,
        }

    def close(self) -> None:
        self._engine.dispose()


@contextmanager
def counting_postgres() -> Iterator[PostgresServer]:
    with running_postgres() as server:
        with (server.data / "postgresql.conf").open("a") as conf:
            conf.write(
                "shared_preload_libraries = 'pg_stat_statements'\nshared_buffers = '256MB'\nmax_connections = 100\n"
            )
        server.stop()
        server.start()
        yield server


def peak_memory_mib(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def storm(fleet: Fleet, stubs: Sequence[AgentStub], counts: DatabaseStatements) -> dict[str, Any]:
    """From the start of the CA until every agent has its state."""
    context = multiprocessing.get_context("spawn")
    stop, results = context.Event(), context.Queue()
    bundle_pem = (fleet.directory / "bundle.pem").read_bytes()
    target = Target(f"127.0.0.1:{fleet.port}", f"{TD.id}/keyreeve/ca", bundle_pem)
    parts = [stubs[number::STUBS] for number in range(STUBS)]
    players = [context.Process(target=play, args=(target, part, results, stop)) for part in parts]
    fleet.process.start_ready()
    counts.reset()
    postmaster = int((fleet.postgres.data / "postmaster.pid").read_text().splitlines()[0])
    pids = {"ca": fleet.process.pid, "key_server": fleet.key_server.process.pid, "database": postmaster}
    before = {name: processor_seconds(pid) for name, pid in pids.items()}
    began = monotonic()
    for player in players:
        player.start()
    found, admin = _collect(fleet, results)
    wall = monotonic() - began
    cpu = {name: round(processor_seconds(pid) - before[name], 2) for name, pid in pids.items()}
    figures = {
        "wall_s": round(wall, 1),
        "waits_s": _quantiles([wait for each in found for wait in each["waits"]]),
        "assignments": sum(each["assignments"] for each in found),
        "failed_attempts": dict(sum((Counter(each["failed_attempts"]) for each in found), Counter())),
        "cpu_s": cpu,
        "cpu_ms_per_agent": {name: round(seconds / len(stubs) * 1000, 2) for name, seconds in cpu.items()},
        "ca_peak_memory_mib": peak_memory_mib(fleet.process.pid),
        "admin_wait_s": _quantiles(admin),
        **counts.read(),
    }
    figures["statements_per_agent"] = round(figures["statements"] / len(stubs), 2)
    stop.set()
    for player in players:
        player.join(60)
    return figures


def _collect(fleet: Fleet, results: Any) -> tuple[list[dict[str, Any]], list[float]]:
    """What the stubs found; meanwhile how long an administrator waits for one page of entries, asked twice a second."""
    found: list[dict[str, Any]] = []
    admin: list[float] = []
    began = monotonic()
    with open_sync_local_channel(fleet.admin_socket) as channel:
        entries = ca_pb2_grpc.EntriesStub(channel)
        while len(found) < STUBS and monotonic() - began < PATIENCE_S:
            asked = monotonic()
            entries.ListEntries(ca_pb2.ListEntriesRequest(page_size=10), timeout=120)
            admin.append(monotonic() - asked)
            try:
                found.append(results.get(timeout=0.5))
            except Exception:  # noqa: S112 - queue.Empty: not yet
                continue
    return found, admin


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    shares = (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    return {name: round(ordered[min(int(len(ordered) * share), len(ordered) - 1)], 3) for name, share in shares}


def measure(agents: int = 10_000, entries: int = 100_000, identities: int = 1_000) -> dict[str, Any]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keyreeve-bench-")))
        fleet = Fleet(directory, stack.enter_context(counting_postgres()), agents, entries, identities)
        began = monotonic()
        with fleet.key_server.running(initialised=False):
            stubs = fleet.prepare()
        stack.enter_context(fleet.key_server.running(initialised=False))
        stack.enter_context(fleet.process)
        counts = DatabaseStatements(fleet.url)
        stack.callback(counts.close)
        prepared = round(monotonic() - began, 1)
        return {"agents": agents, "entries": entries, "prepared_s": prepared, **storm(fleet, stubs, counts)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=10_000)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--identities", type=int, default=1_000)
    parser.add_argument("--output", choices=("text", "json"), default="text")
    arguments = parser.parse_args()
    figures = measure(arguments.agents, arguments.entries, arguments.identities)
    sys.stdout.write(json.dumps(figures, indent=None if arguments.output == "json" else 1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
