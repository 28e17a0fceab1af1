"""Every group of the command against services that answer over real local sockets."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from cryptography import x509
from fake_services import TD, TOKEN, Services
from keyreeve_common.bundle import parse_bundle_jwks
from keyreeve_common.identity import TrustDomain
from keyreeve_common.v1 import ca_pb2, keyserver_pb2, types_pb2

AGENT = f"spiffe://{TD}/keyreeve/agent/n1"
WEB = f"spiffe://{TD}/web"


def _create_entry(services: Services, path: str = "/web", *more: str) -> str:
    entry = services.json("entry", "create", "--spiffe-id", f"spiffe://{TD}{path}", "--parent", AGENT,
                          "--selector", "unix:uid:1000", *more)  # fmt: skip
    return str(entry["entry_id"])


def test_an_entry_is_created_with_all_that_was_said(services: Services) -> None:
    entry_id = _create_entry(
        services, "/web", "--selector", "unix:path:/usr/bin/web", "--delegate", "unix:user:www-data,unix:path:/usr/sbin/nginx",
        "--delegate", f"spiffe://{TD}/proxy", "--dns", "web.example.org", "--ttl", "2h", "--key-type", "rsa-2048",
        "--key-backend", "software", "--hint", "web", "--purpose", "tls13_server_verify", "--node-scope",
        "--expires", "2031-01-01T00:00:00Z",
    )  # fmt: skip
    shown = services.json("entry", "show", entry_id)
    assert shown["selectors"] == [{"type": "unix", "value": "uid:1000"}, {"type": "unix", "value": "path:/usr/bin/web"}]
    assert [selector["value"] for selector in shown["delegates"][0]["selectors"]] == [
        "user:www-data",
        "path:/usr/sbin/nginx",
    ]
    assert shown["delegates"][1]["spiffe_id"] == f"spiffe://{TD}/proxy"
    assert shown["x509_svid_ttl"] == "7200s"
    assert (shown["custody"], shown["key_scope"], shown["key_type"]) == ("cluster", "node", "rsa-2048")
    assert shown["purposes"] == ["tls13_server_verify"]
    assert shown["expires_at"] == "2031-01-01T00:00:00Z"
    assert (shown["dns_names"], shown["key_backend"], shown["hint"]) == (["web.example.org"], "software", "web")


def test_lists_are_read_to_their_last_page(services: Services) -> None:
    ids = [_create_entry(services, f"/w{number}") for number in range(3)]
    assert [entry["entry_id"] for entry in services.json("entry", "list")] == ids
    assert services.ca.pages == 3
    code, out, _ = services.run("entry", "list", "--spiffe-id", f"spiffe://{TD}/w1")
    assert code == 0
    assert "unix:uid:1000" in out
    assert len(out.splitlines()) == 2


def test_an_update_changes_what_is_given_and_leaves_the_rest(services: Services) -> None:
    entry_id = _create_entry(services, "/web", "--dns", "old.example.org", "--ttl", "1h")
    updated = services.json("entry", "update", entry_id, "--dns", "new.example.org")
    assert updated["dns_names"] == ["new.example.org"]
    assert updated["x509_svid_ttl"] == "3600s"
    assert updated["selectors"] == [{"type": "unix", "value": "uid:1000"}]
    assert updated["revision"] == 2


def test_a_deleted_entry_is_gone(services: Services) -> None:
    entry_id = _create_entry(services)
    assert services.json("entry", "delete", entry_id) == {"entry_id": entry_id, "deleted": True}
    assert services.run("entry", "show", entry_id) == (1, "", "error: not_found: no such entry\n")


def test_what_a_service_refuses_is_one_line_and_exit_code_1(services: Services) -> None:
    _create_entry(services)
    code, out, err = services.run("entry", "create", "--spiffe-id", WEB, "--parent", AGENT)
    assert (code, out, err) == (1, "", "error: conflict: an entry like this exists\n")
    assert services.run("authority", "prepare") == (1, "", "error: failed_precondition: one is prepared already\n")


def test_what_may_pass_is_exit_code_3(services: Services) -> None:
    assert services.run("key", "show", "k-busy") == (3, "", "error: unavailable: signer is starting\n")


def test_a_service_that_is_gone_is_exit_code_3(services: Services, tmp_path: Path) -> None:
    import socket

    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(dead))
    code, _, err = services.run("key", "list", "--key-server-socket", str(dead))
    assert code == 3
    assert err.startswith("error: unavailable: ")
    assert len(err.splitlines()) == 1


def test_a_token_is_printed_alone_and_once(services: Services) -> None:
    code, out, err = services.run("token", "create", "--agent-id", AGENT, "--ttl", "5m")
    assert (code, out) == (0, TOKEN + "\n")
    assert TOKEN not in err
    assert services.ca.tokens[0].ttl.seconds == 300


def test_a_token_in_a_file_is_for_its_owner_and_not_printed(services: Services, tmp_path: Path) -> None:
    path = tmp_path / "token"
    code, out, err = services.run("-o", "json", "token", "create", "--out-file", str(path))
    assert code == 0
    assert TOKEN not in out + err
    assert path.read_text() == TOKEN + "\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(out)["out_file"] == str(path)


def test_a_token_never_overwrites_a_file(services: Services, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("precious")
    code, _, err = services.run("token", "create", "--out-file", str(path))
    assert code == 1
    assert err.startswith("error: conflict: ")
    assert path.read_text() == "precious"
    assert not services.ca.tokens, "the token was created before there was a place for it"


def test_no_file_is_left_when_the_token_was_refused(services: Services, tmp_path: Path) -> None:
    path = tmp_path / "token"
    code, _, _ = services.run("token", "create", "--out-file", str(path), "--ca-socket", str(tmp_path / "none.sock"))
    assert code == 3
    assert not path.exists()


def test_agents_are_banned_and_unbanned(services: Services) -> None:
    services.ca.agents[AGENT] = ca_pb2.Agent(spiffe_id=AGENT, connected=True)
    assert services.json("agent", "ban", AGENT)["banned"] is True
    assert services.json("agent", "list")[0]["banned"] is True
    assert services.json("agent", "unban", AGENT)["banned"] is False
    assert services.json("agent", "evict", AGENT)["spiffe_id"] == AGENT
    assert services.run("agent", "evict", f"{AGENT}x")[0] == 1


def test_the_life_of_a_key(services: Services) -> None:
    key_id = services.json("key", "create", "--key-type", "ec-p384", "--label", WEB)["key_id"]
    assert services.key_server.created[0].request_id.startswith("cli-")
    assert services.json("key", "show", key_id)["purposes"] == ["tls13_server_verify", "tls13_client_verify"]
    assert services.run("key", "destroy", key_id, "--yes")[0] == 1
    assert services.json("key", "disable", key_id)["state"] == "disabled"
    assert services.json("key", "enable", key_id)["state"] == "enabled"
    services.json("key", "disable", key_id)
    assert services.json("key", "destroy", key_id, "--yes", "--after", "30d")["state"] == "pending_destruction"
    assert services.key_server.scheduled[0].after.ToSeconds() == 30 * 86_400
    assert services.json("key", "cancel-destruction", key_id)["state"] == "disabled"
    assert services.run("key", "show", "k-9")[2] == "error: key_not_found: no such key, or no grant for this caller\n"


def test_a_retry_with_the_same_request_id_is_passed_on(services: Services) -> None:
    services.json("key", "create", "--request-id", "r-1")
    assert services.key_server.created[0].request_id == "r-1"


def test_grants_are_made_listed_and_revoked(services: Services) -> None:
    services.json("grant", "create", "--key-id", "k-1", "--holder", AGENT, "--purpose", "tls13_server_verify")
    (grant,) = services.json("grant", "list")
    assert grant["purposes"] == ["tls13_server_verify"]
    assert grant["revoked_at"] is None
    assert grant["rate"] is None
    assert services.json("grant", "revoke", "--key-id", "k-1", "--holder", AGENT)["revoked_at"] is not None
    limited = ("grant", "create", "--key-id", "k-2", "--holder", AGENT, "--rate", "500/s", "--burst", "900")
    assert services.json(*limited)["rate"] == {"per_second": 500.0, "burst": 900}
    assert "500/s, burst 900" in services.run("grant", "list")[1]


def test_quarantines_are_set_listed_and_lifted(services: Services) -> None:
    made = services.json("quarantine", "add", AGENT, "--reason", "odd", "--until", "24h")
    assert (made["holder"], made["reason"], made["lifted_at"]) == (AGENT, "odd", None)
    assert made["until"] is not None
    (listed,) = services.json("quarantine", "list")
    assert listed == made
    assert "operator" in services.run("quarantine", "list")[1]
    assert services.json("quarantine", "lift", AGENT)["lifted_at"] is not None
    assert services.json("quarantine", "list") == []
    assert len(services.json("quarantine", "list", "--all")) == 1
    assert services.run("quarantine", "lift", AGENT + "x")[2].startswith("error: not_found")
    assert services.run("quarantine", "add", AGENT)[0] == 2  # a reason is asked for


@pytest.fixture
def record(services: Services) -> ca_pb2.X509SvidRecord:
    svid = services.ca.pki.svid("/web")
    record = ca_pb2.X509SvidRecord(
        serial="abc123", spiffe_id=WEB, entry_id="e-1", state=ca_pb2.SVID_STATE_ISSUED, chain_der=svid.chain_der
    )
    services.ca.records.append(record)
    return record


@pytest.mark.usefixtures("record")
def test_svids_are_shown_by_serial_or_identity(services: Services) -> None:
    assert services.json("svid", "show", "AB:C1:23")["spiffe_id"] == WEB
    assert services.json("svid", "show", WEB)["serial"] == "abc123"
    assert services.json("svid", "list")[0]["state"] == "issued"
    assert services.json("svid", "renew", "e-1")[0]["serial"] == "abc123"
    assert services.run("svid", "show", "ffff")[0] == 1


@pytest.mark.usefixtures("record")
def test_a_chain_is_printed_as_pem(services: Services) -> None:
    _, out, _ = services.run("svid", "show", WEB, "--pem")
    assert len(x509.load_pem_x509_certificates(out.encode())) == 2


def test_the_bundle_is_printed_as_pem_and_as_jwks(services: Services) -> None:
    _, pem, _ = services.run("bundle", "show")
    assert pem.encode().strip() == services.ca.pki.bundle_pem.strip()
    _, jwks, _ = services.run("bundle", "show", "--format", "jwks")
    bundle = parse_bundle_jwks(jwks, TrustDomain(TD))
    assert bundle.sequence == 7
    assert bundle.to_pem() == services.ca.pki.bundle_pem


def test_authorities_are_listed_and_activated(services: Services) -> None:
    services.ca.authorities.append(ca_pb2.Authority(authority_id="aa", root=True, state=ca_pb2.AUTHORITY_STATE_ACTIVE))
    assert services.json("authority", "list")[0]["root"] is True
    assert services.json("authority", "activate", "bb")["state"] == "active"


def test_a_key_for_tokens_has_its_role_and_profile(services: Services) -> None:
    services.json("key", "create", "--purpose", "jwt_svid", "--trust-domain", TD, "--max-ttl", "5m")
    request = services.key_server.created[0]
    assert request.role == keyserver_pb2.KEY_ROLE_JWT_AUTHORITY
    assert list(request.purposes) == [types_pb2.PURPOSE_JWT_SVID]
    assert (request.jwt_profile.trust_domain, request.jwt_profile.max_ttl.seconds) == (TD, 300)
    code, _, error = services.run("key", "create", "--purpose", "jwt_svid")
    assert code == 2
    assert "--trust-domain" in error
    services.json("key", "create", "--purpose", "tls12_server_key_exchange", "--purpose", "digest")
    assert services.key_server.created[1].role == keyserver_pb2.KEY_ROLE_HANDSHAKE
    assert not services.key_server.created[1].HasField("jwt_profile")
