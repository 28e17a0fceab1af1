"""The services as they run: sockets, health, what is about to expire, clocks."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from google.protobuf.timestamp_pb2 import Timestamp
from keyreeve_common.errors import KeyreeveError
from keyreeve_common.v1 import ca_pb2, keyserver_pb2

from keyreeve_client.agent.sign_socket_client import SignSocketClient
from keyreeve_client.cli.connections import CaStubs, KeyServerStubs, ca, key_server
from keyreeve_client.cli.doctor.findings import Finding, failed, ok, run, skipped, warning
from keyreeve_client.cli.doctor.installation import ConfigFile, Installation
from keyreeve_client.cli.svids import read_agent_status

RPC_TIMEOUT_S = 5.0
# The CA activates an authority's successor when a sixth of its life is left: less than that, and rotation did not happen.
NOTICE_SHARE = 8
MAX_CLOCK_SKEW = timedelta(seconds=30)


def check_key_server(installation: Installation, now: datetime) -> Iterator[Finding]:
    """Its socket, its health, its backends, its SVID."""
    config = installation.of("keyserver")
    if config is None:
        yield skipped("key server", "no keyserver.toml: this host does not run it")
        return
    first = config.file("admin_socket") or installation.key_server_socket
    sockets = [first, *_further_pairs(first, config)]
    for number, socket in enumerate(sockets, start=1):
        yield from _check_one(socket, now, pair=f" (pair {number})" if len(sockets) > 1 else "")


def _further_pairs(first: Path, config: ConfigFile) -> list[Path]:
    """The admin sockets of the host's other front ends: those that are configured, and those of units of their own that are there."""
    count = max(config.integer("supervisor", "pairs") or 1, 1)
    while first.with_name(f"{first.stem}-{count + 1}{first.suffix}").exists():
        count += 1
    return [first.with_name(f"{first.stem}-{number}{first.suffix}") for number in range(2, count + 1)]


def _check_one(socket: Path, now: datetime, *, pair: str) -> Iterator[Finding]:
    try:
        with key_server(socket) as stubs:
            health = stubs.health.Check(keyserver_pb2.HealthRequest(), timeout=RPC_TIMEOUT_S)
            yield _serving(f"key server{pair}", health.serving, f"version {health.version} {health.detail}".strip())
            for backend in health.backends:
                detail = f"{backend.custody or 'custody unknown'}, {backend.workers} workers; {backend.detail}".rstrip(
                    "; "
                )
                yield _serving(f"backend {backend.name}{pair}", backend.serving, detail)
                if backend.engine:
                    yield _engine(backend)
            if health.HasField("svid_not_after"):
                yield _expiry(f"key server's SVID{pair}", _time(health.svid_not_after), now, timedelta(minutes=5),
                              "is the CA up and able to reach it? `keyreeve init` mends an expired one")  # fmt: skip
            else:
                yield failed(f"key server's SVID{pair}", "it has none yet", "run `keyreeve init` on the CA's host")
            yield _key_clock(stubs, now)
    except KeyreeveError as error:
        yield failed(f"key server{pair}", f"{socket}: {error}", "is keyreeve-keyserver running? look at its log")


def _serving(check: str, serving: bool, detail: str) -> Finding:
    if serving:
        return ok(check, f"serves; {detail}" if detail else "serves")
    return failed(check, detail or "does not serve", "look at its log; the detail says what it lacks")


def _engine(backend: keyserver_pb2.BackendHealth) -> Finding:
    check = f"engine of backend {backend.name}"
    if not backend.engine_detail:
        return ok(check, f"signs with {backend.engine}")
    return warning(
        check, f"signs with {backend.engine}; {backend.engine_detail}", "docs/operations.md: The signing engine"
    )


def _key_clock(stubs: KeyServerStubs, now: datetime) -> Finding:
    keys = stubs.keys.ListKeys(keyserver_pb2.ListKeysRequest(page_size=1000), timeout=RPC_TIMEOUT_S).keys
    return _not_ahead("clock of the key server", [_time(key.created_at) for key in keys], now)


def check_ca(installation: Installation, now: datetime) -> Iterator[Finding]:
    """Its socket, its health, its authorities, its agents."""
    config = installation.of("ca")
    if config is None:
        yield skipped("CA", "no ca.toml: this host does not run it")
        return
    socket = config.file("admin_socket") or installation.ca_socket
    try:
        with ca(socket) as stubs:
            health = stubs.health.Check(ca_pb2.HealthRequest(), timeout=RPC_TIMEOUT_S)
            yield _serving("CA", health.serving, f"version {health.version} {health.detail}".strip())
            yield from _authorities(stubs, now)
            yield from _agents(stubs, now)
            yield _ca_clock(stubs, now)
    except KeyreeveError as error:
        yield failed("CA", f"{socket}: {error}", "is keyreeve-ca running? look at its log")


def _authorities(stubs: CaStubs, now: datetime) -> Iterator[Finding]:
    answer = stubs.authorities.ListAuthorities(ca_pb2.ListAuthoritiesRequest(), timeout=RPC_TIMEOUT_S)
    active = [each for each in answer.authorities if each.state == ca_pb2.AUTHORITY_STATE_ACTIVE]
    if not any(not each.root for each in active):
        yield failed("issuing authority", "none is active", "run `keyreeve init`, or `keyreeve authority activate`")
    for each in active:
        name = "root" if each.root else "issuing authority"
        remedy = "run `keyreeve authority prepare`, then `keyreeve authority activate`"
        certificate = x509.load_der_x509_certificate(each.certificate_der)
        lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        yield _expiry(name, certificate.not_valid_after_utc, now, lifetime / NOTICE_SHARE, remedy)


def _agents(stubs: CaStubs, now: datetime) -> Iterator[Finding]:
    answer = stubs.nodes.ListAgents(ca_pb2.ListAgentsRequest(page_size=1000), timeout=RPC_TIMEOUT_S)
    lost = [each.spiffe_id for each in answer.agents if not each.banned and _time(each.svid_not_after) <= now]
    connected = sum(each.connected for each in answer.agents)
    if lost:
        yield warning(
            "agents", f"SVID expired: {', '.join(lost[:5])}", "give the node a new join token (`keyreeve token create`)"
        )
    else:
        yield ok("agents", f"{len(answer.agents)} attested, {connected} connected")


def _ca_clock(stubs: CaStubs, now: datetime) -> Finding:
    answer = stubs.svids.ListSvids(ca_pb2.ListSvidsRequest(current_only=True, page_size=1000), timeout=RPC_TIMEOUT_S)
    return _not_ahead("clock of the CA", [_time(each.not_before) for each in answer.svids], now)


def check_agent(installation: Installation, now: datetime) -> Iterator[Finding]:
    """Its sign socket, and what it says of itself."""
    config = installation.of("agent")
    if config is None:
        yield skipped("agent", "no agent.toml: this host does not run it")
        return
    path = config.file("sign_socket", "path")
    if path is not None:
        yield _ping(path)
    try:
        status = read_agent_status(config.file("state_dir") or Path("/run/keyreeve-agent"))
    except KeyreeveError as error:
        yield failed("agent", str(error), "is keyreeve-agent running? look at its log")
        return
    if status.get("agent_refused"):
        yield failed(
            "agent", f"refused: {status['agent_refused']['detail']}", "give it a new join token and restart it"
        )
    for what, part in (
        ("CA", status["ca"]),
        *((f"key server {each['address']}", each) for each in status["key_servers"]),
    ):
        if part["error"]:
            yield failed(f"agent to {what}", part["error"]["detail"], "check address, firewall, and that it runs")
        elif part.get("state") == "ejected":
            yield warning(f"agent to {what}", "left out until it answers a probe", "look at its health and its log")
        else:
            yield ok(f"agent to {what}", _latency(part) or "no error")
    for svid in (status["agent_svid"], *status["svids"]):
        if svid is not None:
            name = f"SVID {svid.get('spiffe_id', status['agent_id'])}"
            yield _expiry(
                name,
                datetime.fromisoformat(svid["not_after"]),
                now,
                timedelta(minutes=2),
                "is the CA up and reachable?",
            )
    for proxy in status["proxies"]:
        yield _proxy(proxy)


def _latency(part: dict[str, Any]) -> str:
    """How long 95 of 100 of a key server's answers took, by scheme; empty for the CA and before the first answer."""
    measured = part.get("latency_ms") or {}
    return ", ".join(f"{scheme} p95 {times['p95']:g} ms" for scheme, times in sorted(measured.items()))


def _ping(path: Path) -> Finding:
    try:
        with SignSocketClient(path) as client:
            client.ping()
    except KeyreeveError as error:
        return failed("sign socket", str(error), "is keyreeve-agent running? look at its log")
    return ok("sign socket", f"{path} answers")


def _proxy(proxy: dict[str, object]) -> Finding:
    check = f"proxy {proxy['name']}"
    error, reload = proxy["error"], proxy["last_reload"]
    if isinstance(error, dict):
        return failed(check, str(error["detail"]), "mend what it names; the agent tries again by itself")
    if not proxy["assigned"]:
        return failed(
            check, f"{proxy['spiffe_id']} is not assigned to this node", "create an entry whose parent is this agent"
        )
    if isinstance(reload, dict) and not reload["ok"]:
        return failed(check, f"reload command ended with {reload['exit_status']}", "run it by hand and see")
    return ok(check, f"{proxy['directory']}/current is {proxy['version']}")


def check_clock() -> Iterator[Finding]:
    """Whether this host's clock is kept by NTP, where systemd can tell."""
    answer = run(["timedatectl", "show", "--property=NTPSynchronized", "--value"])
    if answer.code != 0:
        yield skipped("clock of this host", "no timedatectl that would tell")
    elif answer.text.strip() == "yes":
        yield ok("clock of this host", "synchronised")
    else:
        yield warning("clock of this host", "not synchronised", "run an NTP client: SVIDs are short-lived")


def _not_ahead(check: str, times: list[datetime], now: datetime) -> Finding:
    """What a service dated must not lie in our future; how far it lags cannot be seen from here."""
    if not times:
        return skipped(check, "nothing was dated by it yet")
    ahead = max(times) - now
    if ahead > MAX_CLOCK_SKEW:
        return failed(check, f"is {ahead.total_seconds():.0f} s ahead of this host", "synchronise both clocks by NTP")
    return ok(check, "not ahead of this host")


def _expiry(check: str, not_after: datetime, now: datetime, notice: timedelta, remedy: str) -> Finding:
    text = f"until {not_after.astimezone(UTC).isoformat(timespec='seconds')}"
    if not_after <= now:
        return failed(check, f"expired: {text}", remedy)
    return warning(check, f"ends soon: {text}", remedy) if not_after - now < notice else ok(check, text)


def _time(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)
