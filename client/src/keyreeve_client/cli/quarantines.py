"""`keyreeve quarantine`: holders that may not sign, whatever their grants say."""

from __future__ import annotations

from typing import Annotated

import typer
from keyreeve_common.v1 import keyserver_pb2

from keyreeve_client.cli import arguments
from keyreeve_client.cli.connections import (
    DEFAULT_KEY_SERVER_SOCKET,
    PAGE_SIZE,
    TIMEOUT_S,
    KeyServerSocket,
    all_pages,
    key_server,
)
from keyreeve_client.cli.output import Output, show_list, show_one

app = typer.Typer(no_args_is_help=True, help="Holders that may not sign.")
_COLUMNS = ("holder", "cause", "reason", "set_by", "since", "until", "lifted_at")

Holder = Annotated[str, typer.Argument(help="SPIFFE ID of the agent.")]


@app.command("list")
def list_quarantines(
    ended: Annotated[bool, typer.Option("--all", help="Lifted and expired ones too.")] = False,
    socket: KeyServerSocket = DEFAULT_KEY_SERVER_SOCKET,
    output: Output = None,
) -> None:
    """Who is in quarantine, why, and until when."""
    with key_server(socket) as stubs:
        pages = all_pages(
            lambda token: stubs.quarantines.ListQuarantines(
                keyserver_pb2.ListQuarantinesRequest(page_size=PAGE_SIZE, page_token=token, include_ended=ended),
                timeout=TIMEOUT_S,
            )
        )
        show_list([one for page in pages for one in page.quarantines], _COLUMNS, output)


@app.command("add")
def add(
    holder: Holder,
    reason: Annotated[str, typer.Option("--reason", help="For people: why.")],
    until: Annotated[str | None, typer.Option("--until", help="A time, or from now, such as 24h.")] = None,
    socket: KeyServerSocket = DEFAULT_KEY_SERVER_SOCKET,
    output: Output = None,
) -> None:
    """Stops a holder from signing with any key, on every replica within a second. Its grants stay."""
    request = keyserver_pb2.AddQuarantineRequest(
        holder=arguments.spiffe_id(holder), reason=reason, until=arguments.expiry_proto(until)
    )
    with key_server(socket) as stubs:
        show_one(stubs.quarantines.AddQuarantine(request, timeout=TIMEOUT_S), output)


@app.command("lift")
def lift(holder: Holder, socket: KeyServerSocket = DEFAULT_KEY_SERVER_SOCKET, output: Output = None) -> None:
    """Lets a holder sign again with what its grants allow."""
    request = keyserver_pb2.LiftQuarantineRequest(holder=arguments.spiffe_id(holder))
    with key_server(socket) as stubs:
        show_one(stubs.quarantines.LiftQuarantine(request, timeout=TIMEOUT_S), output)
