"""The ceremony: idempotent, resumable at any step, repairs expired service SVIDs and changes nothing else."""

from __future__ import annotations

import os
import secrets
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from keyreeve_ca.authority_service import prepare_authority
from keyreeve_ca.ceremony import Ceremony, StepState, give_to_owner
from keyreeve_ca.config import CaConfig, KeyClusterConfig, load_ca_config
from keyreeve_ca.domain.authority import AuthorityState, active_authority
from keyreeve_ca.domain.records import Agent
from keyreeve_ca.own_svids import OwnSvid
from keyreeve_ca.renewal import Renewal
from keyreeve_ca.service import Ca
from keyreeve_ca.signers.local import InMemoryKeyCluster, InMemoryKeyServer, ThrowAwayKeys
from keyreeve_ca.store.sql_store import SqlStore
from keyreeve_common.errors import ConfigInvalid, Conflict, InvalidRequest, Unavailable
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_testing.pki import TestPki

KEY = ec.generate_private_key(ec.SECP256R1())
LINT_KEYS = ThrowAwayKeys()


def csr_of(_: SpiffeId) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(KEY, hashes.SHA256()).public_bytes(Encoding.DER)


class OneServer(InMemoryKeyCluster):
    """One key server, of which each call may be the one that fails."""

    def __init__(self, clock: Any) -> None:
        super().__init__(clock)
        self.server = InMemoryKeyServer("ks", csr_of)
        self.calls = 0
        self.fail_at = 0

    def replicas(self) -> Any:
        return (self.server,)

    def step(self) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise Unavailable("away")

    def create_key(self, spec: Any) -> Any:
        self.step()
        made = super().create_key(spec)
        self.step()
        return made

    def create_grant(self, *arguments: Any, **named: Any) -> Any:
        self.step()
        return super().create_grant(*arguments, **named)

    def sign(self, *arguments: Any) -> bytes:
        self.step()
        return super().sign(*arguments)

    def list_grants(self, **named: Any) -> Any:
        self.step()
        return super().list_grants(**named)


class Bench:
    def __init__(self, directory: Path, rig: Any) -> None:
        self.clock = rig.clock
        self.cluster = OneServer(self.clock)
        self.store = SqlStore.open(f"sqlite:///{directory / 'state' / 'ca.sqlite3'}")
        self.config = CaConfig(
            trust_domain=TrustDomain("example.org"),
            state_dir=directory / "state",
            admin_socket=directory / "run" / "admin.sock",
            key_cluster=KeyClusterConfig(("127.0.0.1:1",)),
            bundle_file=directory / "agents" / "bundle.pem",
        )
        self.config.state_dir.mkdir()
        self.ca = Ca(self.config.policy(), self.store, self.cluster, self.clock, self.entropy, LINT_KEYS)

    @staticmethod
    def entropy(count: int) -> bytes:
        return secrets.token_bytes(count)

    def run(self) -> dict[str, StepState]:
        return {step.name: step.state for step in Ceremony(self.ca, self.store, self.config, self.cluster.server).run()}

    @property
    def own(self) -> OwnSvid:
        return OwnSvid(self.ca, self.config.svid_files)


@pytest.fixture
def bench(tmp_path: Path, rig: Any) -> Any:
    directory = tmp_path / "bench"
    directory.mkdir()
    made = Bench(directory, rig)
    yield made
    made.store.close()


def test_second_run_changes_nothing(bench: Bench) -> None:
    first = bench.run()
    assert StepState.MADE in first.values()
    assert StepState.REPAIRED not in first.values()
    files = {path: path.read_bytes() for path in bench.config.state_dir.glob("*.pem")}
    sequence = bench.store.bundle_sequence()
    assert set(bench.run().values()) == {StepState.KEPT}
    assert files == {path: path.read_bytes() for path in bench.config.state_dir.glob("*.pem")}
    assert bench.store.bundle_sequence() == sequence
    assert bench.config.svid_files.key.stat().st_mode & 0o777 == 0o600
    assert bench.config.bundle_file is not None
    assert bench.config.bundle_file.read_bytes() == bench.config.svid_files.bundle.read_bytes()


@pytest.mark.parametrize("fail_at", range(1, 14))
def test_run_that_broke_at_any_call_goes_on_there(bench: Bench, fail_at: int) -> None:
    bench.cluster.fail_at = fail_at
    try:
        bench.run()
        assert bench.cluster.calls < fail_at or fail_at > 12
    except Unavailable:
        bench.run()
    states = [(each.root, each.state) for each in bench.store.list_authorities()]
    assert states == [(True, AuthorityState.ACTIVE), (False, AuthorityState.ACTIVE)]
    assert len(bench.cluster._keys) == 2
    assert bench.own.read().spiffe_id == bench.ca.policy.ca_id
    assert set(bench.run().values()) == {StepState.KEPT}


def test_expired_service_svids_are_repaired_and_nothing_else(bench: Bench) -> None:
    bench.run()
    authorities = bench.store.list_authorities()
    bench.clock.advance(timedelta(days=2))
    states = bench.run()
    assert {name for name, state in states.items() if state is not StepState.KEPT} == {
        "CA's own SVID",
        "key server's SVID",
    }
    assert states["CA's own SVID"] is StepState.REPAIRED
    assert bench.store.list_authorities() == authorities
    bench.own.read()


@pytest.mark.parametrize("prepared", [False, True])
def test_issuing_authority_that_expired_while_the_ca_was_off_is_replaced(bench: Bench, prepared: bool) -> None:
    bench.run()
    (_, first) = bench.store.list_authorities()
    if prepared:
        bench.clock.now = first.not_after - timedelta(days=1)
        prepare_authority(bench.ca)
    bench.clock.now = first.not_after + timedelta(days=2)
    states = bench.run()
    assert states["issuing authority"] is StepState.REPAIRED
    assert active_authority(bench.store.list_authorities()).not_after > bench.clock.now
    assert len(bench.store.list_authorities()) == 3
    assert bench.own.read().not_after > bench.clock.now
    assert set(bench.run().values()) == {StepState.KEPT}


@pytest.mark.parametrize("damage", ["missing", "cut", "foreign"])
def test_damaged_own_svid_is_repaired(bench: Bench, damage: str) -> None:
    bench.run()
    path = bench.config.svid_files.key
    match damage:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:-100])
        case _:
            foreign = TestPki().svid("/keyreeve/ca")
            path.write_bytes(foreign.key_pem + foreign.chain_pem)
    states = bench.run()
    assert states["CA's own SVID"] in (StepState.REPAIRED, StepState.MADE)
    bench.own.read()


def test_grant_that_an_operator_revoked_is_left(bench: Bench) -> None:
    bench.run()
    (root, _) = bench.store.list_authorities()
    bench.cluster.revoke_grant(root.key_id, bench.ca.policy.ca_id)
    states = bench.run()
    assert list(states.values()).count(StepState.LEFT) == 1
    assert bench.cluster.list_grants(key_id=root.key_id)[0].is_revoked


def test_database_of_another_trust_domain_is_refused(bench: Bench) -> None:
    bench.store.migrate()
    bench.store.claim_trust_domain(TrustDomain("other.org"))
    with pytest.raises(Conflict):
        bench.run()


def test_files_made_by_root_belong_to_the_service(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    seen: list[Path] = []
    give_to_owner(tmp_path, chown=lambda path, *_, **__: seen.append(path))
    assert seen == []  # same owner already


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_made_is_given_away_where_the_run_broke_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(bench.config.state_dir, 12345, 12345)

    def away(*_: Any) -> Any:
        raise Unavailable("away")

    monkeypatch.setattr(bench.cluster.server, "install_svid", away)
    with pytest.raises(Unavailable):
        bench.run()
    made = list(bench.config.state_dir.iterdir())
    assert bench.config.svid_files.key in made
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(12345, 12345)}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_only_files_of_the_directory_itself_are_given_away(tmp_path: Path) -> None:
    state, other = tmp_path / "state", tmp_path / "other"
    state.mkdir()
    other.touch()
    os.chown(state, 12345, 12345)
    (state / "made").touch()
    (state / "dangling").symlink_to(tmp_path / "nothing")
    (state / "link").symlink_to(other)
    (state / "hard").hardlink_to(other)
    give_to_owner(state)
    assert (state / "made").stat().st_uid == 12345
    assert other.stat().st_uid == 0


def test_agents_can_reach_the_bundle_file_whatever_the_umask(bench: Bench) -> None:
    before = os.umask(0o077)
    try:
        bench.run()
    finally:
        os.umask(before)
    assert bench.config.bundle_file is not None
    assert bench.config.bundle_file.stat().st_mode & 0o777 == 0o644
    assert bench.config.bundle_file.parent.stat().st_mode & 0o777 == 0o755


def test_background_renews_own_and_key_servers_svids_at_half_life(bench: Bench) -> None:
    bench.run()
    changes: list[int] = []
    renewal = Renewal(bench.ca, bench.own, bench.config.key_server_id, lambda: changes.append(1))
    before, served = bench.own.read(), bench.cluster.server.not_after
    renewal.round()
    assert (bench.own.read(), bench.cluster.server.not_after) == (before, served)
    bench.clock.advance(timedelta(hours=12, seconds=1))
    renewal.round()
    assert bench.own.read().serial != before.serial
    assert bench.cluster.server.not_after is not None
    assert served is not None
    assert bench.cluster.server.not_after > served


def test_agent_that_cannot_be_served_does_not_stop_the_others(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.run()
    for name in ("n1", "n2", "n3"):
        agent_id = SpiffeId(TrustDomain("example.org"), f"/keyreeve/agent/{name}")
        now = bench.clock.now
        bench.store.save_agent(Agent(agent_id, "join_token", ("1",), now, now, now))
    served: list[str] = []

    def sync(_: Any, agent: SpiffeId) -> None:
        served.append(agent.path[-2:])
        if agent.path.endswith("n1"):
            raise InvalidRequest("a row that does not parse")
        if agent.path.endswith("n2"):
            raise ValueError("a fault of ours")

    monkeypatch.setattr("keyreeve_ca.renewal.sync_agent", sync)
    Renewal(bench.ca, bench.own, bench.config.key_server_id).round()
    assert served == ["n1", "n2", "n3"]


def test_background_rotates_and_survives_a_cluster_that_is_away(bench: Bench) -> None:
    bench.run()
    (_, first) = bench.store.list_authorities()
    changes: list[int] = []
    renewal = Renewal(bench.ca, bench.own, bench.config.key_server_id, lambda: changes.append(1))
    bench.clock.now = first.prepare_next_at
    bench.cluster.calls, bench.cluster.fail_at = 0, 1
    renewal.round()
    assert len(bench.store.list_authorities()) == 2
    renewal.round()
    assert len(bench.store.list_authorities()) == 3
    assert changes


GOOD = 'trust_domain = "example.org"\nstate_dir = "s"\nadmin_socket = "a.sock"\n[key_cluster]\naddresses = ["h:1"]\n'


@pytest.mark.parametrize(
    ("extra", "rule"),
    [
        ("[issuance]\nnonsense = 1", "issuance.nonsense: unknown key"),
        ('[issuance]\ndefault_ttl = "2d"', "ttl of workload"),
        ('[issuance]\nmax_ttl = "31d"', "max_ttl"),
        ('[issuance]\nagent_ttl = "0s"', "agent_ttl"),
        ('[issuance]\nbackdate = "2h"', "backdate"),
        ('[issuance]\nauthority_key_type = "ed25519"', "ed25519 is refused"),
        ('[issuance]\nissuing_authority_ttl = "9000d"', "authority lives"),
        ('[database]\nurl = "mysql://x/y"', "database.*only sqlite"),
        ('[database]\nurl = "postgresql://u:secret@h/d"', "holds a password"),
        ('[database]\npassword_file = "x"', "only for a postgresql"),
        ('[background]\ninterval = "1ms"', "interval"),
    ],
)
def test_bad_configuration_names_the_key(tmp_path: Path, extra: str, rule: str) -> None:
    path = tmp_path / "ca.toml"
    path.write_text(GOOD)
    assert load_ca_config(path).database_url() == f"sqlite:///{tmp_path}/s/ca.sqlite3"
    path.write_text(GOOD + extra)
    with pytest.raises(ConfigInvalid, match=rule):
        load_ca_config(path)


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ('["h:1"]', "[]", "at least one"),
        ('["h:1"]', '["h"]', "HOST:PORT"),
        ('"a.sock"', f'"{"a" * 120}"', "107 bytes"),
        ("[key_cluster]", 'listen = "x"\n[key_cluster]', "listen"),
        ("[key_cluster]", 'admins = ["spiffe://other.org/a"]\n[key_cluster]', "trust domain example.org"),
        ("[key_cluster]", '[key_cluster]\nspiffe_id = "spiffe://example.org/ks"', "path of a service"),
    ],
)
def test_bad_places_name_the_key(tmp_path: Path, old: str, new: str, rule: str) -> None:
    path = tmp_path / "ca.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigInvalid, match=rule):
        load_ca_config(path)


def test_postgresql_password_comes_from_its_file(tmp_path: Path) -> None:
    path, secret = tmp_path / "ca.toml", tmp_path / "password"
    secret.touch(mode=0o600)
    secret.write_text("p@ss\n")
    path.write_text(GOOD + '[database]\nurl = "postgresql://ca@db/keyreeve"\npassword_file = "password"')
    assert load_ca_config(path).database_url() == "postgresql+psycopg://ca:p%40ss@db/keyreeve"


def test_password_that_is_no_text_is_named_without_a_byte_of_it(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_bytes(b"secret\xff")
    password.chmod(0o600)
    path = tmp_path / "ca.toml"
    path.write_text(GOOD + '[database]\nurl = "postgresql://ca@db/keyreeve"\npassword_file = "password"')
    with pytest.raises(ConfigInvalid, match="not UTF-8") as caught:
        load_ca_config(path).database_url()
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
