"""A real signer under load that is killed, filled up and restarted: no signature is out of the log, and the log verifies after each."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import grpc
import pytest
from keyreeve_client.audit.log_directory import LogDirectory
from keyreeve_client.audit.search import FoundRecord, Query, search_log
from keyreeve_client.audit.verification import Report, verify_log
from keyreeve_client.cli.__main__ import run
from keyreeve_common.errors import AuditUnavailable, ErrorCode
from keyreeve_common.grpc_edge import error_from_rpc
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.transparency.records import AuditRecord, Source
from keyreeve_common.v1 import keyserver_pb2
from keyreeve_keyserver import frames
from keyreeve_testing.disk import small_disk
from keyreeve_testing.keyserver import KeyServerRig, sign_request
from keyreeve_testing.signer import SignerClient, running_signer, write_signer_config

RESULTS = Path(__file__).parents[3] / "build" / "results" / "audit.json"
AGENT = "agent/a"
NEW_KEY = {"key_id": "web", "key_type": "ec-p256", "role": "handshake", "purposes": ["tls13_server_verify"]}
ROUNDS = 5


def verified(directory: Path) -> Report:
    log = LogDirectory(directory)
    report = verify_log(log, log.vkey())
    assert report.findings == []
    return report


def records(directory: Path, **criteria: object) -> list[AuditRecord]:
    found = list(search_log(LogDirectory(directory), Query(**criteria)))  # type: ignore[arg-type]
    assert all(isinstance(each, FoundRecord) for each in found)
    return [each.record for each in found if isinstance(each, FoundRecord)]


def audited_config(directory: Path, audit: Path, *, more: str = "") -> Path:
    path = write_signer_config(directory)
    path.write_text(path.read_text() + f'[audit]\ndirectory = "{audit}"\ncheckpoint_interval = "50ms"\n{more}')
    return path


def item(number: int, *, message: bytes | None = None) -> frames.SignItem:
    content = build_tls13_content(Purpose.TLS13_SERVER_VERIFY, sha256(str(number).encode()).digest())
    trace = number.to_bytes(16, "big") + bytes(9)
    return frames.SignItem(number, KeyId("web"), 0x0403, 1, 10_000, content if message is None else message, trace)


class Load:
    """Sends batches without waiting for the answer of each, and keeps what came back until the signer is gone."""

    def __init__(self, client: SignerClient, first: int) -> None:
        self.client = client
        self.received: dict[int, bytes] = {}
        self.sent = first
        self.some = threading.Event()
        self.places = threading.Semaphore(12)  # batches under way: enough to keep it busy, not to fill the log
        self.ended = False

    def send(self) -> None:
        with suppress(OSError):
            while self.places.acquire() and not self.ended:
                batch = tuple(item(self.sent + offset) for offset in range(1, 17))
                self.sent += 16
                self.client.connection.sendall(frames.SignBatch(self.client.next_id(), "local", batch).to_bytes())

    def receive(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                answer = self.client.read_answer()
                assert isinstance(answer, frames.SignResults)
                self.places.release()
                for result in answer.results:
                    if isinstance(result, frames.Signed):
                        self.received[result.id] = result.signature
                if len(self.received) > 50:
                    self.some.set()
        self.ended = True
        self.places.release()

    def run_until_killed(self, after_s: float) -> None:
        threads = [threading.Thread(target=self.send), threading.Thread(target=self.receive)]
        for thread in threads:
            thread.start()
        assert self.some.wait(60)
        time.sleep(after_s)  # a random instant is the point
        assert self.client.process is not None
        self.client.process.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()


@pytest.mark.parametrize("policy", ["always", "off"])
def test_killed_signer_leaves_no_signature_without_its_record(tmp_path: Path, policy: str) -> None:
    """kill -9 at random instants under load, again and again on one log."""
    source = random.Random(policy)  # noqa: S311 - to be repeatable, not secret
    audit = tmp_path / "audit"
    config = audited_config(tmp_path, audit, more=f'fsync = "{policy}"\n')
    received: dict[int, bytes] = {}
    first = 0
    with running_signer(config, log=tmp_path / "log") as client:
        record = client.control("create_key", **NEW_KEY)["record"]
    for _ in range(ROUNDS):
        with running_signer(config, log=tmp_path / "log") as client:
            client.control("load_key", record=record)
            load = Load(client, first)
            load.run_until_killed(source.random() * 0.1)
            received.update(load.received)
            first = load.sent
        verified(audit)
    with running_signer(config, log=tmp_path / "log") as client:
        client.control("load_key", record=record)
        client.sign(item(first + 1))
    report = verified(audit)
    assert report.unsigned == 0
    found = {int.from_bytes(each.request_id, "big"): each for each in records(audit, event="signature")}
    assert len(received) > 50 * ROUNDS
    for number, signature in received.items():
        assert found[number].signature_hash == sha256(signature).digest()
        assert found[number].message_hash == sha256(item(number).message).digest()
    assert len(records(audit, event="log_started")) == ROUNDS + 2


def test_torn_end_is_repaired_and_reported(tmp_path: Path) -> None:
    audit = tmp_path / "audit"
    config = audited_config(tmp_path, audit)
    with running_signer(config, log=tmp_path / "log") as client:
        record = client.control("create_key", **NEW_KEY)["record"]
    (journal,) = [path for path in (audit / "journal").iterdir() if path.name.isdigit()]
    journal.write_bytes(journal.read_bytes() + journal.read_bytes()[:25])
    with running_signer(config, log=tmp_path / "log") as client:
        client.control("load_key", record=record)
        assert isinstance(client.sign(item(1))[1], frames.Signed)
    assert '"audit_log_repaired"' in (tmp_path / "log").read_text()
    (repaired,) = records(audit, event="log_repaired")
    assert dict(repaired.details)["torn_bytes"] == "25"
    verified(audit)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_log_that_does_not_match_its_checkpoint_stops_the_start(tmp_path: Path, damage: str) -> None:
    audit = tmp_path / "audit"
    config = audited_config(tmp_path, audit)
    with running_signer(config, log=tmp_path / "log") as client:
        client.control("create_key", **NEW_KEY)
    (journal,) = [path for path in (audit / "journal").iterdir() if path.name.isdigit()]
    if damage == "cut":
        journal.write_bytes(journal.read_bytes()[:-1])
    else:
        other = tmp_path / "other"
        with running_signer(audited_config(other, other / "audit"), log=tmp_path / "log") as client:
            client.control("create_key", **{**NEW_KEY, "key_id": "else"})
        (theirs,) = [path for path in (other / "audit" / "journal").iterdir() if path.name.isdigit()]
        journal.write_bytes(theirs.read_bytes())
    with running_signer(config, log=tmp_path / "refused") as client:
        assert client.process is not None
        assert client.process.wait(30) == 78
    text = (tmp_path / "refused").read_text()
    assert "start_refused" in text
    assert "move the directory away as evidence" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_stops_signatures_and_not_the_signer(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        audit = disk / "audit"
        config = audited_config(tmp_path, audit)
        signed: list[int] = []
        with running_signer(config, log=tmp_path / "log") as client:
            client.control("load_key", record=client.control("create_key", **NEW_KEY)["record"])
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(1024))
            number, refused = 0, 0
            while refused < 3:
                number += 1
                assert number < 5_000, "the disk was never full"
                result = client.sign(item(number))[number]
                if isinstance(result, frames.Signed):
                    signed.append(number)
                else:
                    assert result.error.code is ErrorCode.AUDIT_UNAVAILABLE
                    assert result.error.retry_after
                    refused += 1
            with pytest.raises(AuditUnavailable):
                client.control("create_key", **{**NEW_KEY, "key_id": "other"})
            assert client.control("health")["audit"]["state"] == "unavailable"
            filler.unlink()
            result = client.sign(item(number + 1))[number + 1]
            assert isinstance(result, frames.Signed)
            signed.append(number + 1)
            assert client.control("health")["audit"]["state"] == "ok"
        verified(audit)
        found = [int.from_bytes(each.request_id, "big") for each in records(audit, event="signature")]
        assert found == signed


def test_two_signers_share_no_log(tmp_path: Path) -> None:
    config = audited_config(tmp_path, tmp_path / "audit")
    with running_signer(config, log=tmp_path / "log") as client:
        client.control("health")
        with running_signer(config, log=tmp_path / "second") as second:
            assert second.process is not None
            assert second.process.wait(30) == 78
        assert "another signer writes this audit log" in (tmp_path / "second").read_text()
        client.control("health")


def test_whole_key_server_records_who_did_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through mTLS: administration, signatures and refusals, from the front end and from the signer, then read by the command."""
    with KeyServerRig(tmp_path / "ks").running() as rig:
        agent, stranger = rig.pki.svid(AGENT), rig.pki.svid("agent/stranger")
        key = rig.create_key()
        rig.grant(key.key_id, agent.spiffe_id)
        with rig.caller(agent) as stubs:
            signature = stubs.sign(key.key_id)
            with pytest.raises(grpc.RpcError):
                stubs.signing.Sign(sign_request(key.key_id, message=b"no handshake"), timeout=20)
        with rig.caller(stranger) as stubs:
            with pytest.raises(grpc.RpcError) as refused:
                stubs.sign(key.key_id)
            assert error_from_rpc(refused.value).code is ErrorCode.KEY_NOT_FOUND
            with pytest.raises(grpc.RpcError):
                stubs.grants.ListGrants(keyserver_pb2.ListGrantsRequest(), timeout=20)
        rig.revoke(key.key_id, agent.spiffe_id)
        assert rig.process.terminate() == 0
    audit = rig.audit_directory
    verified(audit)
    (signed,) = records(audit, event="signature", key_id=key.key_id)
    assert (signed.caller, signed.source, signed.result) == (agent.spiffe_id, Source.SIGNER, "ok")
    assert signed.signature_hash == sha256(signature).digest()
    assert any(signed.request_id)
    (mismatch,) = records(audit, result="purpose_mismatch")
    assert (mismatch.caller, mismatch.source) == (agent.spiffe_id, Source.SIGNER)
    (unknown,) = records(audit, caller=stranger.spiffe_id, event="refusal")
    assert (unknown.result, unknown.source, unknown.key_id) == ("key_not_found", Source.FRONT_END, key.key_id)
    (call,) = records(audit, event="call_refused")
    assert (call.caller, dict(call.details)["method"].rsplit("/", 1)[-1]) == (stranger.spiffe_id, "ListGrants")
    (granted,) = records(audit, event="grant_created")
    (revoked,) = records(audit, event="grant_revoked")
    assert granted.caller == revoked.caller == "local"
    assert dict(granted.details)["holder"] == dict(revoked.details)["holder"] == agent.spiffe_id
    assert {each.source for each in records(audit, event="key_created", key_id=key.key_id)} == set(Source)
    assert run(["audit", "search", str(audit), "--caller", stranger.spiffe_id]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_log_stops_grants_and_no_revocation(tmp_path: Path) -> None:
    """What takes power away is done at once, and recorded when there is room again."""
    with small_disk(tmp_path / "disk", "2m") as disk:
        rig = KeyServerRig(tmp_path / "ks")
        rig.signer_toml.write_text(rig.signer_toml.read_text().replace('"audit"', f'"{disk}/audit"'))
        with rig.running():
            agent = rig.pki.svid(AGENT)
            key = rig.create_key()
            rig.grant(key.key_id, agent.spiffe_id)
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(1024))
            with rig.caller(agent) as stubs:
                code, tries = None, 0
                while code is not ErrorCode.AUDIT_UNAVAILABLE:
                    tries += 1
                    assert tries < 5_000
                    try:
                        stubs.sign(key.key_id)
                    except grpc.RpcError as error:
                        code = error_from_rpc(error).code
                with pytest.raises(grpc.RpcError) as refused:
                    rig.grant(key.key_id, "spiffe://" + rig.pki.trust_domain + "/agent/b")
                assert error_from_rpc(refused.value).code is ErrorCode.AUDIT_UNAVAILABLE
                rig.revoke(key.key_id, agent.spiffe_id)
                with pytest.raises(grpc.RpcError) as refused:
                    stubs.sign(key.key_id)
                assert error_from_rpc(refused.value).code is ErrorCode.KEY_NOT_FOUND
            filler.unlink()
            assert rig.process.terminate() == 0
        verified(disk / "audit")
        (revoked,) = records(disk / "audit", event="grant_revoked")
        assert dict(revoked.details)["holder"] == agent.spiffe_id


def test_what_the_log_costs(tmp_path: Path) -> None:
    """Every batch is signed under each policy; what that costs goes to build/results/audit.json, since a busy machine proves nothing."""
    rates: dict[str, float] = {}
    for name in ("without", "always", "interval", "off"):
        directory = tmp_path / name
        more = f'fsync = "{name}"\n'
        config = (
            write_signer_config(directory)
            if name == "without"
            else audited_config(directory, directory / "audit", more=more)
        )
        with running_signer(config, log=tmp_path / "log") as client:
            client.control("load_key", record=client.control("create_key", **NEW_KEY)["record"])
            items = [tuple(item(number * 64 + offset) for offset in range(64)) for number in range(30)]
            began, waiting = time.monotonic(), 0
            for batch in items:
                client.connection.sendall(frames.SignBatch(client.next_id(), "local", batch).to_bytes())
                waiting += len(batch)
            while waiting:
                answer = client.read_answer()
                assert isinstance(answer, frames.SignResults)
                assert all(isinstance(result, frames.Signed) for result in answer.results)
                waiting -= len(answer.results)
            rates[name] = len(items) * 64 / (time.monotonic() - began)
    ratios = {name: round(rate / rates["without"], 2) for name, rate in rates.items()}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"per_second_without_log": round(rates["without"]), "ratios": ratios}) + "\n")
