"""Faults of a running Keyreeve with two key servers, one after another under steady load, and the table of what they cost (docs/reliability.md).

nginx serves two identities, one with a sealed software key and one with a key in the token; a local process has messages of its own signed.
After the last fault both audit logs are verified, and every signature that was given is looked for in them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from time import monotonic

import pytest
from keyreeve_testing.fault_table import Row, failed, row_of, write_rows
from keyreeve_testing.load import Load, Signatures
from keyreeve_testing.postgres import PostgresServer, postgres_is_installed, running_postgres
from keyreeve_testing.processes import command_line, descendants_of
from keyreeve_testing.replicated_stack import REPLICAS, ReplicatedStack
from keyreeve_testing.softhsm import softhsm_is_installed
from keyreeve_testing.stack import NGINX, Served, StackConfig

STOPPED_S = 10.0
AUDIT_BYTES = 4 << 20
pytestmark = [
    pytest.mark.native,
    pytest.mark.softhsm,
    pytest.mark.postgres,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces and a small file system"),
    pytest.mark.skipif(not Path(NGINX).exists(), reason="nginx is not installed"),
    pytest.mark.skipif(not softhsm_is_installed(), reason="softhsm2 is not installed"),
    pytest.mark.skipif(not postgres_is_installed(), reason="PostgreSQL is not installed"),
]


@dataclass
class Scene:
    """The stack under load, and what was measured so far."""

    stack: ReplicatedStack
    postgres: PostgresServer
    soft: Load
    hsm: Load
    local: Load
    signatures: Signatures
    rows: dict[str, Row]
    given: dict[str, list[bytes]]

    @property
    def loads(self) -> tuple[Load, ...]:
        return self.soft, self.hsm, self.local

    def settle(self) -> None:
        """Until both replicas serve, the agent knows it, and all loads succeed again."""
        for replica in REPLICAS:
            self.stack.wait_until(lambda replica=replica: self.stack.serves(replica), f"replica {replica}", 60)  # type: ignore[misc]
        self.stack.wait_until(self.stack.agent_sees_all, "the agent to take back every replica", 60)
        for load in self.loads:
            load.wait_successes(10, within=60)

    def measure(
        self, fault: str, inject: Callable[[], None], heal: Callable[[], None] = lambda: None, *, lasts: float = 0.0
    ) -> Row:
        """Injects the fault under load, lets it last, heals it, waits until all loads succeed again; the row."""
        self.settle()
        before = len(self.signatures.given)
        began = monotonic()
        inject()
        Event().wait(lasts)  # the fault lasts: nothing announces its end
        heal()
        self.settle()
        handshakes = self.soft.since(began) + self.hsm.since(began)
        local = self.local.since(began)
        row = row_of(fault, began, handshakes=handshakes, signatures=local)
        self.rows[fault] = row
        self.given[fault] = self.signatures.given[before:]
        return row


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("faults") / "stack"
    served = (
        Served("soft", "/ns/web/sa/soft", backend="software"),
        Served("hsm", "/ns/web/sa/hsm", backend="softhsm"),
    )
    config = StackConfig(directory, served=served, nginx_workers=2)
    with running_postgres() as postgres:
        stack = ReplicatedStack(config, catalog_url=postgres.make_database().replace("+psycopg", ""))
        with _small_disk(stack), stack:
            key_id = stack.svid_of(str(config.client))["key_id"]
            signatures = Signatures(stack.sign_socket, key_id)
            soft = Load("soft", lambda: _handshake(stack, "soft"))
            hsm = Load("hsm", lambda: _handshake(stack, "hsm"))
            local = Load("local", signatures.once)
            with closing(signatures), soft, hsm, local:
                yield Scene(stack, postgres, soft, hsm, local, signatures, {}, {})


def _handshake(stack: ReplicatedStack, name: str) -> None:
    stack.handshake(name)


class _small_disk:
    """The first replica's audit log lies on a small file system of its own, so that a test can fill it."""

    def __init__(self, stack: ReplicatedStack) -> None:
        self._stack = stack
        self._prepare = stack.prepare
        self._mounted: Path | None = None

    def __enter__(self) -> None:
        def prepare() -> None:
            self._prepare()
            place = self._stack.audit_dir(1)
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={AUDIT_BYTES},mode=700", "tmpfs", place], check=True)
            self._mounted = place

        self._stack.prepare = prepare  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        if self._mounted is not None:
            kept = self._mounted.with_name("1-kept")
            shutil.copytree(self._mounted, kept)
            subprocess.run(["umount", self._mounted], check=True)


def test_signer_killed(scene: Scene) -> None:
    row = scene.measure("kill -9 of a signer", lambda: os.kill(scene.stack.part(1, "signer"), signal.SIGKILL))
    assert (row.failed, row.signatures_failed) == (0, 0)


def test_front_end_killed(scene: Scene) -> None:
    row = scene.measure("kill -9 of a front end", lambda: os.kill(scene.stack.part(1, "front end"), signal.SIGKILL))
    assert (row.failed, row.signatures_failed) == (0, 0)


def test_replica_killed(scene: Scene) -> None:
    row = scene.measure(
        "kill -9 of a whole replica, started again",
        lambda: scene.stack.kill_group(2),
        lambda: scene.stack.start_replica(2),
    )
    assert (row.failed, row.signatures_failed) == (0, 0)


def test_hsm_worker_killed(scene: Scene) -> None:
    scene.stack.wait_until(lambda: bool(hsm_workers(scene, 1)), "a PKCS#11 worker of the first replica")
    row = scene.measure("kill -9 of an HSM worker", lambda: os.kill(hsm_workers(scene, 1)[0], signal.SIGKILL))
    assert (row.failed, row.signatures_failed) == (0, 0)


def test_replica_stopped(scene: Scene) -> None:
    row = scene.measure(
        f"SIGSTOP of a replica for {STOPPED_S:g} s",
        lambda: scene.stack.stop_group(1, signal.SIGSTOP),
        lambda: scene.stack.stop_group(1, signal.SIGCONT),
        lasts=STOPPED_S,
    )
    assert (row.failed, row.signatures_failed) == (0, 0)


def test_connection_black_holed(scene: Scene) -> None:
    row = scene.measure(
        "connection to a replica black-holed for 10 s",
        scene.stack.far.black_hole,
        scene.stack.far.mend,
        lasts=STOPPED_S,
    )
    assert (row.failed, row.signatures_failed) == (0, 0)


def test_postgresql_killed(scene: Scene) -> None:
    row = scene.measure(
        "kill -9 of PostgreSQL, started again after 5 s", scene.postgres.kill, scene.postgres.start, lasts=5.0
    )
    assert (row.failed, row.signatures_failed) == (0, 0)


def test_disk_full_under_the_audit_log(scene: Scene) -> None:
    filler = scene.stack.audit_dir(1) / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                return

    row = scene.measure("disk full under the audit log of a replica for 5 s", fill, filler.unlink, lasts=5.0)
    assert (row.failed, row.signatures_failed) == (0, 0)


def test_token_removed(scene: Scene) -> None:
    """Keys in the token cannot sign while it is away; sealed software keys go on."""
    assert scene.stack.token is not None
    store = scene.stack.token.conf.parent / "tokens"
    away = store.with_name("tokens-away")

    def remove() -> None:
        store.rename(away)
        for worker in (pid for replica in REPLICAS for pid in hsm_workers(scene, replica)):
            os.kill(worker, signal.SIGKILL)  # SoftHSM keeps its files open: a worker that starts anew misses the token

    scene.settle()
    began = monotonic()
    scene.measure("token removed for 5 s, put back", remove, lambda: restore(away, store), lasts=5.0)
    assert failed(scene.soft.since(began)) == 0, "a software key failed with the token"
    assert failed(scene.hsm.since(began)) > 0, "the token was not away: this test shows nothing"


def test_agent_killed(scene: Scene) -> None:
    """There is one agent on a node: handshakes fail while it is away, and go on with it."""
    agent = scene.stack.processes["agent"]
    row = scene.measure("kill -9 of the agent, started again", agent.kill, lambda: restart_agent(scene))
    assert row.recovered < 60


def restore(away: Path, store: Path) -> None:
    away.rename(store)


def restart_agent(scene: Scene) -> None:
    scene.stack.processes["agent"].start_ready(60)


def hsm_workers(scene: Scene, replica: int) -> list[int]:
    server = scene.stack.processes[f"keyserver-{replica}"].pid
    return [pid for pid in descendants_of(server) if any("pkcs11_worker" in word for word in command_line(pid))]


def test_no_record_is_lost_and_the_table_is_written(scene: Scene) -> None:
    """Runs last: stops the replicas, verifies both logs, looks up every signature that was given."""
    assert scene.rows, "no fault was measured"
    recorded: set[bytes] = set()
    for replica in REPLICAS:
        scene.stack.processes[f"keyserver-{replica}"].terminate()
        scene.stack.cli_text("audit", "verify", str(scene.stack.audit_dir(replica)))
        for record in scene.stack.cli("audit", "search", str(scene.stack.audit_dir(replica)), "--event", "signature"):
            recorded.add(bytes.fromhex(record["message_sha256"]))
    lost = {fault: sum(1 for digest in given if digest not in recorded) for fault, given in scene.given.items()}
    write_rows("reliability", [replace(row, records_lost=lost[fault]) for fault, row in scene.rows.items()])
    assert sum(lost.values()) == 0
    assert all(given for given in scene.given.values()), "a fault under which nothing was signed shows nothing"
