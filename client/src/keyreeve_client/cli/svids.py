"""`keyreeve svid`, `keyreeve authority` and `keyreeve bundle`: what was issued, by whom, and whom to trust."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from keyreeve_common.bundle import bundle_from_proto
from keyreeve_common.errors import Internal, NotFound, PermissionDenied, Unavailable
from keyreeve_common.v1 import ca_pb2
from keyreeve_common.x509_svid import load_chain_der, to_pem

from keyreeve_client.cli import arguments
from keyreeve_client.cli.connections import (
    DEFAULT_CA_SOCKET,
    PAGE_SIZE,
    TIMEOUT_S,
    CaSocket,
    CaStubs,
    all_pages,
    ca,
)
from keyreeve_client.cli.output import Output, show_json, show_list, show_one, show_table, show_text, wants_json

app = typer.Typer(no_args_is_help=True, help="X.509-SVIDs that were issued.")
authorities = typer.Typer(no_args_is_help=True, help="Issuing authorities: prepared, active, old.")
bundles = typer.Typer(no_args_is_help=True, help="The trust bundle.")
_COLUMNS = ("serial", "spiffe_id", "state", "not_before", "not_after", "key_id")
_AUTHORITY_COLUMNS = ("authority_id", "root", "state", "not_after", "key_id")


DEFAULT_AGENT_STATE = Path("/run/keyreeve-agent")


class BundleFormat(StrEnum):
    PEM = "pem"
    JWKS = "jwks"


@app.command("list")
def list_svids(
    spiffe_id: Annotated[str, typer.Option("--spiffe-id", help="Only of this identity.")] = "",
    current: Annotated[bool, typer.Option("--current", help="Only the newest valid one of each.")] = False,
    socket: CaSocket = DEFAULT_CA_SOCKET,
    output: Output = None,
) -> None:
    """All that was issued, or recorded and then failed."""
    with ca(socket) as stubs:
        show_list(_records(stubs, spiffe_id=spiffe_id, current_only=current), _COLUMNS, output)


@app.command("show")
def show(
    serial: Annotated[str, typer.Argument(help="Serial in hex, or a SPIFFE ID for its current one.")],
    pem: Annotated[bool, typer.Option("--pem", help="Print the chain alone, as PEM.")] = False,
    socket: CaSocket = DEFAULT_CA_SOCKET,
    output: Output = None,
) -> None:
    """One SVID's record and chain."""
    with ca(socket) as stubs:
        if serial.startswith("spiffe://"):
            records = _records(stubs, spiffe_id=arguments.spiffe_id(serial), current_only=True)
        else:
            records = _records(stubs, serial=serial.lower().removeprefix("0x").replace(":", ""))
    if not records:
        raise NotFound(f"no SVID with serial or SPIFFE ID {serial[:128]!r}")
    record = max(records, key=lambda each: each.not_after.ToDatetime())
    if pem:
        show_text(to_pem(load_chain_der(list(record.chain_der))).decode("ascii").rstrip())
    else:
        show_one(record, output)


def _records(
    stubs: CaStubs, *, spiffe_id: str = "", serial: str = "", current_only: bool = False
) -> list[ca_pb2.X509SvidRecord]:
    pages = all_pages(
        lambda token: stubs.svids.ListSvids(
            ca_pb2.ListSvidsRequest(
                spiffe_id=spiffe_id, serial=serial, current_only=current_only, page_size=PAGE_SIZE, page_token=token
            ),
            timeout=TIMEOUT_S,
        )
    )
    return [record for page in pages for record in page.svids]


@app.command("node")
def show_node(
    state_dir: Annotated[Path, typer.Option("--state-dir", help="The agent's state_dir.")] = DEFAULT_AGENT_STATE,
    output: Output = None,
) -> None:
    """What the agent of this node serves now, and how it is; asks nobody but the agent's own status file."""
    status = read_agent_status(state_dir)
    if wants_json(output):
        show_json(status)
        return
    show_text(f"agent {status['agent_id']}, written {status['written_at']}")
    show_table(status["svids"], ("serial", "spiffe_id", "not_after", "key_id", "key_type", "signatures"))


def read_agent_status(state_dir: Path) -> dict[str, Any]:
    """Raises: Unavailable, PermissionDenied, Internal."""
    path = state_dir / "status.json"
    try:
        status = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Unavailable(f"{path}: no such file: is keyreeve-agent running?") from None
    except PermissionError:
        raise PermissionDenied(f"{path}: only the agent's user may read it; try as root") from None
    except ValueError:
        raise Internal(f"{path}: is not JSON") from None
    if not isinstance(status, dict):
        raise Internal(f"{path}: is not a JSON object")
    return status


@app.command("renew")
def renew(
    entry_id: Annotated[str, typer.Argument(help="The entry's id.")],
    socket: CaSocket = DEFAULT_CA_SOCKET,
    output: Output = None,
) -> None:
    """Renews an entry's SVIDs now instead of at half life."""
    with ca(socket) as stubs:
        answer = stubs.svids.RenewSvids(ca_pb2.RenewSvidsRequest(entry_id=entry_id), timeout=TIMEOUT_S)
        show_list(answer.svids, _COLUMNS, output)


@authorities.command("list")
def list_authorities(socket: CaSocket = DEFAULT_CA_SOCKET, output: Output = None) -> None:
    """Root and issuing authorities, with their states."""
    with ca(socket) as stubs:
        answer = stubs.authorities.ListAuthorities(ca_pb2.ListAuthoritiesRequest(), timeout=TIMEOUT_S)
        show_list(answer.authorities, _AUTHORITY_COLUMNS, output)


@authorities.command("prepare")
def prepare(socket: CaSocket = DEFAULT_CA_SOCKET, output: Output = None) -> None:
    """Makes the next issuing authority; it signs nothing until it is activated."""
    with ca(socket) as stubs:
        show_one(stubs.authorities.PrepareAuthority(ca_pb2.PrepareAuthorityRequest(), timeout=TIMEOUT_S), output)


@authorities.command("activate")
def activate(
    authority_id: Annotated[str, typer.Argument(help="As `keyreeve authority list` shows it.")],
    socket: CaSocket = DEFAULT_CA_SOCKET,
    output: Output = None,
) -> None:
    """Lets a prepared authority sign from now on; the active one becomes old."""
    request = ca_pb2.ActivateAuthorityRequest(authority_id=authority_id)
    with ca(socket) as stubs:
        show_one(stubs.authorities.ActivateAuthority(request, timeout=TIMEOUT_S), output)


@bundles.command("show")
def show_bundle(
    form: Annotated[BundleFormat, typer.Option("--format", help="PEM, or a SPIFFE bundle (JWKS).")] = BundleFormat.PEM,
    socket: CaSocket = DEFAULT_CA_SOCKET,
    output: Output = None,
) -> None:
    """The authorities that this trust domain is verified with."""
    with ca(socket) as stubs:
        bundle = stubs.authorities.GetBundle(ca_pb2.GetBundleRequest(), timeout=TIMEOUT_S)
    if form is BundleFormat.JWKS:
        show_text(bundle_from_proto(bundle).to_jwks())
    elif wants_json(output):
        show_one(bundle, output)
    else:
        show_text(to_pem(load_chain_der(list(bundle.x509_authorities_der))).decode("ascii").rstrip())
