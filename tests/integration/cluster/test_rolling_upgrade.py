"""The release before and this one side by side over one PostgreSQL catalog, which the old one made; an agent of each talks to each.

The old code is taken from the repository's history at test time and runs with PYTHONPATH; a shallow clone does not have it, and skips.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep

import grpc
import pytest
from keyreeve_client.agent.key_cluster import KeyCluster
from keyreeve_common.identity import SpiffeId
from keyreeve_testing.cluster import AGENT, Cluster, load_on
from keyreeve_testing.keyserver import KeyServerRig
from keyreeve_testing.pki import TestPki
from keyreeve_testing.postgres import PostgresServer

BEFORE = "d152844"
ROOT = Path(__file__).parents[3]
MEMBERS = ("common", "keyserver", "client")
# The agent's way to the key cluster, of whichever release is on the path: asks each address by itself, and says what came.
OLD_AGENT = """
import asyncio, json, sys
from pathlib import Path
from keyreeve_client.agent.key_cluster import KeyCluster
from keyreeve_client.channel import SvidFiles
from keyreeve_common.identity import SpiffeId
from keyreeve_common.key_id import KeyId
from keyreeve_common.sign_socket import SignFrame
import keyreeve_client

told = json.load(sys.stdin)
files = SvidFiles(*(Path(told[name]) for name in ("key", "chain", "bundle")))

async def ask(address):
    cluster = KeyCluster((address,), files, server_id=SpiffeId.parse(told["server_id"]))
    try:
        request = SignFrame(1, 20_000, told["scheme"], told["purpose"], KeyId(told["key_id"]), bytes.fromhex(told["message"]))
        return (await cluster.sign(request)).hex()
    finally:
        await cluster.close()

async def main():
    return [await ask(address) for address in told["addresses"]]

json.dump({"from": keyreeve_client.__file__, "signatures": asyncio.run(main())}, sys.stdout)
"""


@pytest.fixture(scope="module")
def old_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", BEFORE, *MEMBERS], capture_output=True, check=False)
    if archive.returncode != 0:
        pytest.skip(f"commit {BEFORE} is not in this clone's history")
    where = tmp_path_factory.mktemp("before")
    subprocess.run(["tar", "-x", "-C", where], input=archive.stdout, check=True)
    return where


def python_path(code: Path) -> dict[str, str]:
    return {"PYTHONPATH": ":".join(str(code / member / "src") for member in MEMBERS)}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, postgres: PostgresServer, old_code: Path) -> Iterator[Cluster]:
    """Replica 0 is of the release before, and makes the catalog and a key; replica 1 is of this one and comes later."""
    where, pki, url = tmp_path_factory.mktemp("mixed"), TestPki(), postgres.make_database()
    old, new = (KeyServerRig(where / name, pki, catalog=f'url = "{url}"') for name in ("old", "new"))
    old.process.env = python_path(old_code)
    # The configuration of that release, with which this one is to start as well: sections that came since are cut off.
    old.signer_toml.write_text(old.signer_toml.read_text().split("[audit]")[0])
    with ExitStack() as stack:
        stack.enter_context(old.running())
        cluster = Cluster(where, [old, new], pki, pki.svid(AGENT))
        cluster.add_key("p256")
        stack.enter_context(new.running())
        yield cluster


def old_agent(cluster: Cluster, code: Path, name: str = "p256") -> list[bytes]:
    """The signatures that an agent of the release before gets from each replica."""
    files = cluster.files()
    key_id, scheme, _ = cluster.keys[name]
    told = {
        "key": str(files.key),
        "chain": str(files.chain),
        "bundle": str(files.bundle),
        "server_id": cluster.rigs[0].spiffe_id,
        "key_id": key_id,
        "scheme": scheme,
        "purpose": cluster.purpose,
        "message": cluster.message.hex(),
        "addresses": [f"127.0.0.1:{rig.port}" for rig in cluster.rigs],
    }
    done = subprocess.run(
        [sys.executable, "-c", OLD_AGENT],
        input=json.dumps(told).encode(),
        capture_output=True,
        env=python_path(code),
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    said = json.loads(done.stdout)
    assert said["from"].startswith(str(code))  # it was the old code that ran
    return [bytes.fromhex(signature) for signature in said["signatures"]]


def test_the_replicas_are_of_two_releases(mixed: Cluster, old_code: Path) -> None:
    environ = Path(f"/proc/{mixed.rigs[0].pids()[1]}/environ").read_bytes()
    assert str(old_code).encode() in environ
    imported = subprocess.run(
        [sys.executable, "-c", "import keyreeve_keyserver; print(keyreeve_keyserver.__file__)"],
        env=python_path(old_code),
        capture_output=True,
        text=True,
        check=True,
    )
    assert imported.stdout.startswith(str(old_code))  # the path goes before what is installed
    steps = "catalog/steps.py"
    assert not (old_code / "keyserver/src/keyreeve_keyserver" / steps).exists()
    assert (ROOT / "keyserver/src/keyreeve_keyserver" / steps).exists()


def test_an_agent_of_each_release_is_served_by_each(mixed: Cluster, old_code: Path) -> None:
    for signature in old_agent(mixed, old_code):
        mixed.verify("p256", signature)

    async def new_agent() -> None:
        for rig in mixed.rigs:
            client = KeyCluster(
                (f"127.0.0.1:{rig.port}",), mixed.files(), server_id=SpiffeId.parse(mixed.rigs[0].spiffe_id)
            )
            try:
                await mixed.sign(client, "p256", 20_000)
            finally:
                await client.close()

    asyncio.run(new_agent())


def test_what_either_release_writes_the_other_reads(mixed: Cluster, old_code: Path) -> None:
    """A key made by the new replica is signed with by the old one, and a grant that the old one revokes holds at both."""
    old, new = mixed.rigs
    key = new.create_key("made-by-the-new")
    new.grant(key.key_id, mixed.agent.spiffe_id)
    mixed.take("made-by-the-new", key)
    mixed.wait_known(key.key_id)
    for signature in old_agent(mixed, old_code, "made-by-the-new"):
        mixed.verify("made-by-the-new", signature)
    old.revoke(key.key_id, mixed.agent.spiffe_id)
    for rig in mixed.rigs:
        assert refused_within(rig, mixed, key.key_id, seconds=20)


def refused_within(rig: KeyServerRig, cluster: Cluster, key_id: str, *, seconds: float) -> bool:
    deadline = monotonic() + seconds
    with rig.caller(cluster.agent) as stubs:
        while monotonic() < deadline:
            try:
                stubs.sign(key_id)
            except grpc.RpcError as error:
                return error.code() is grpc.StatusCode.NOT_FOUND
            sleep(0.05)
    return False


async def test_each_replica_restarts_as_the_new_release_under_load(mixed: Cluster, old_code: Path) -> None:
    """The upgrade itself: the old replica is stopped and comes back new, while requests go on."""
    old = mixed.rigs[0]
    async with mixed.client() as client, load_on(mixed, client, "p256", callers=6) as load:
        await load.progress(60)
        assert await asyncio.to_thread(old.process.terminate) == 0
        await load.progress(60)
        old.process.env = {}
        await asyncio.to_thread(old.process.start_ready)
        await load.progress(60)
    assert load.failures == {}
