"""`keyreeve token` and `keyreeve agent`: letting nodes in, and putting them out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from keyreeve_common.errors import Conflict, Internal
from keyreeve_common.files import storage_error
from keyreeve_common.v1 import ca_pb2

from keyreeve_client.cli import arguments
from keyreeve_client.cli.connections import DEFAULT_CA_SOCKET, PAGE_SIZE, TIMEOUT_S, CaSocket, all_pages, ca
from keyreeve_client.cli.output import Output, show_list, show_one, show_row, show_text, to_json, wants_json

tokens = typer.Typer(no_args_is_help=True, help="Join tokens: each lets one node in, once.")
agents = typer.Typer(no_args_is_help=True, help="Attested nodes.")
_COLUMNS = ("spiffe_id", "svid_serial", "svid_not_after", "last_seen_at", "connected", "banned", "agent_version")

AgentId = Annotated[str, typer.Argument(help="The agent's SPIFFE ID.")]


@tokens.command("create")
def create_token(
    agent_id: Annotated[
        str, typer.Option("--agent-id", help="SPIFFE ID that the node will have, below /keyreeve/agent/.")
    ] = "",
    ttl: Annotated[str | None, typer.Option("--ttl", help="Until when it can be used, such as 10m.")] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out-file", help="Write the token here (mode 0600) and do not print it.")
    ] = None,
    socket: CaSocket = DEFAULT_CA_SOCKET,
    output: Output = None,
) -> None:
    """Creates a join token. It is shown this once: the CA keeps only its hash."""
    request = ca_pb2.CreateJoinTokenRequest(
        agent_id=arguments.spiffe_id(agent_id) if agent_id else "", ttl=arguments.duration_proto(ttl)
    )
    file = _new_secret_file(out_file) if out_file else None
    try:
        with ca(socket) as stubs:
            token = stubs.nodes.CreateJoinToken(request, timeout=TIMEOUT_S)
    except BaseException:
        if file is not None and out_file is not None:
            os.close(file)
            out_file.unlink(missing_ok=True)
        raise
    row = to_json(token)
    if file is not None:
        with os.fdopen(file, "w") as stream:
            stream.write(token.token + "\n")
        row["token"] = ""
        row["out_file"] = str(out_file)
        show_row(row, output)
    elif wants_json(output):
        show_row(row, output)
    else:
        show_text(token.token)
        typer.echo(f"for {token.agent_id}, until {row['expires_at']}; it is not shown again", err=True)


def _new_secret_file(path: Path) -> int:
    """A descriptor of a new file, opened before the token exists, so that none is lost. Raises: Conflict, Internal, StorageFull."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise Conflict(f"{path}: exists already; a token is never written over another file") from None
    except FileNotFoundError:
        raise Internal(f"{path}: its directory does not exist") from None
    except OSError as error:
        raise storage_error(error, path) from error


@agents.command("list")
def list_agents(socket: CaSocket = DEFAULT_CA_SOCKET, output: Output = None) -> None:
    """All agents that were attested."""
    with ca(socket) as stubs:
        pages = all_pages(
            lambda token: stubs.nodes.ListAgents(
                ca_pb2.ListAgentsRequest(page_size=PAGE_SIZE, page_token=token), timeout=TIMEOUT_S
            )
        )
        show_list([agent for page in pages for agent in page.agents], _COLUMNS, output)


@agents.command("evict")
def evict(agent_id: AgentId, socket: CaSocket = DEFAULT_CA_SOCKET, output: Output = None) -> None:
    """Ends its streams, its grants and its right to renew; the node must attest anew."""
    request = ca_pb2.EvictAgentRequest(spiffe_id=arguments.spiffe_id(agent_id))
    with ca(socket) as stubs:
        show_one(stubs.nodes.EvictAgent(request, timeout=TIMEOUT_S), output)


@agents.command("ban")
def ban(agent_id: AgentId, socket: CaSocket = DEFAULT_CA_SOCKET, output: Output = None) -> None:
    """Evicts it and refuses its SPIFFE ID until it is unbanned."""
    request = ca_pb2.BanAgentRequest(spiffe_id=arguments.spiffe_id(agent_id))
    with ca(socket) as stubs:
        show_one(stubs.nodes.BanAgent(request, timeout=TIMEOUT_S), output)


@agents.command("unban")
def unban(agent_id: AgentId, socket: CaSocket = DEFAULT_CA_SOCKET, output: Output = None) -> None:
    """Lets its SPIFFE ID attest again."""
    request = ca_pb2.UnbanAgentRequest(spiffe_id=arguments.spiffe_id(agent_id))
    with ca(socket) as stubs:
        show_one(stubs.nodes.UnbanAgent(request, timeout=TIMEOUT_S), output)
