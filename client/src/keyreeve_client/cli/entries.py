"""`keyreeve entry`: registration entries, which say who runs where and who may use which key."""

from __future__ import annotations

from typing import Annotated

import typer
from keyreeve_common.schemes import KeyType
from keyreeve_common.v1 import ca_pb2

from keyreeve_client.cli import arguments
from keyreeve_client.cli.connections import DEFAULT_CA_SOCKET, PAGE_SIZE, TIMEOUT_S, CaSocket, all_pages, ca
from keyreeve_client.cli.output import Output, show_list, show_one, show_row

app = typer.Typer(
    no_args_is_help=True, help="Registration entries: identities, where they run, who may use their keys."
)
_COLUMNS = ("entry_id", "spiffe_id", "parent_id", "selectors", "delegates", "key_type", "revision")

EntryId = Annotated[str, typer.Argument(help="The entry's id, as `keyreeve entry list` shows it.")]
Selectors = Annotated[
    list[str] | None, typer.Option("--selector", help="Selector of the workload, such as unix:uid:1000; repeat it.")
]
Delegates = Annotated[
    list[str] | None,
    typer.Option(
        "--delegate", help="Who else may use the key: a SPIFFE ID, or selectors with commas between; repeat it."
    ),
]
DnsNames = Annotated[list[str] | None, typer.Option("--dns", help="DNS name in the certificate; repeat it.")]
Ttl = Annotated[str | None, typer.Option("--ttl", help="Lifetime of its X.509-SVIDs, such as 1h.", show_default=False)]
Hint = Annotated[str | None, typer.Option("--hint", help="A word for the workload.", show_default=False)]
Expires = Annotated[
    str | None,
    typer.Option("--expires", help="When the entry ends: a time, or from now, such as 30d.", show_default=False),
]
Purposes = Annotated[
    list[str] | None,
    typer.Option("--purpose", help="What the key may sign; tls13_server_verify and tls13_client_verify unless told."),
]


@app.command("create")
def create(
    *,
    spiffe_id: Annotated[str, typer.Option("--spiffe-id", help="The identity.")],
    parent: Annotated[str, typer.Option("--parent", help="SPIFFE ID of the agent on whose node it runs.")],
    selector: Selectors = None,
    delegate: Delegates = None,
    dns: DnsNames = None,
    ttl: Ttl = None,
    key_type: Annotated[KeyType, typer.Option("--key-type")] = KeyType.EC_P256,
    key_backend: Annotated[str, typer.Option("--key-backend", help="Key server backend; empty: its default.")] = "",
    node_scope: Annotated[
        bool, typer.Option("--node-scope/--identity-scope", help="One key per node, or one for the identity.")
    ] = False,
    purpose: Purposes = None,
    hint: Hint = None,
    expires: Expires = None,
    socket: CaSocket = DEFAULT_CA_SOCKET,
    output: Output = None,
) -> None:
    """Creates an entry; the CA then has its key made and its SVID issued."""
    entry = ca_pb2.Entry(
        spiffe_id=arguments.spiffe_id(spiffe_id),
        parent_id=arguments.spiffe_id(parent),
        selectors=arguments.selectors(selector or ()),
        delegates=[arguments.delegate(text) for text in delegate or ()],
        x509_svid_ttl=arguments.duration_proto(ttl),
        dns_names=dns or (),
        custody=ca_pb2.CUSTODY_CLUSTER,
        key_scope=ca_pb2.KEY_SCOPE_NODE if node_scope else ca_pb2.KEY_SCOPE_IDENTITY,
        key_type=arguments.key_type(key_type),
        key_backend=key_backend,
        hint=hint or "",
        expires_at=arguments.expiry_proto(expires),
        purposes=arguments.purposes(purpose or ()),
    )
    with ca(socket) as stubs:
        show_one(stubs.entries.CreateEntry(ca_pb2.CreateEntryRequest(entry=entry), timeout=TIMEOUT_S), output)


@app.command("show")
def show(entry_id: EntryId, socket: CaSocket = DEFAULT_CA_SOCKET, output: Output = None) -> None:
    """One entry, whole."""
    with ca(socket) as stubs:
        show_one(stubs.entries.GetEntry(ca_pb2.GetEntryRequest(entry_id=entry_id), timeout=TIMEOUT_S), output)


@app.command("list")
def list_entries(
    spiffe_id: Annotated[str, typer.Option("--spiffe-id", help="Only of this identity.")] = "",
    parent: Annotated[str, typer.Option("--parent", help="Only of this agent.")] = "",
    socket: CaSocket = DEFAULT_CA_SOCKET,
    output: Output = None,
) -> None:
    """All entries."""
    with ca(socket) as stubs:
        pages = all_pages(
            lambda token: stubs.entries.ListEntries(
                ca_pb2.ListEntriesRequest(spiffe_id=spiffe_id, parent_id=parent, page_size=PAGE_SIZE, page_token=token),
                timeout=TIMEOUT_S,
            )
        )
        show_list([entry for page in pages for entry in page.entries], _COLUMNS, output)


@app.command("update")
def update(
    entry_id: EntryId,
    *,
    selector: Selectors = None,
    delegate: Delegates = None,
    dns: DnsNames = None,
    ttl: Ttl = None,
    hint: Hint = None,
    expires: Expires = None,
    socket: CaSocket = DEFAULT_CA_SOCKET,
    output: Output = None,
) -> None:
    """Changes what is given and leaves the rest; a list that is given replaces the old one."""
    with ca(socket) as stubs:
        entry = stubs.entries.GetEntry(ca_pb2.GetEntryRequest(entry_id=entry_id), timeout=TIMEOUT_S)
        if selector is not None:
            del entry.selectors[:]
            entry.selectors.extend(arguments.selectors(selector))
        if delegate is not None:
            del entry.delegates[:]
            entry.delegates.extend(arguments.delegate(text) for text in delegate)
        if dns is not None:
            del entry.dns_names[:]
            entry.dns_names.extend(dns)
        if (new_ttl := arguments.duration_proto(ttl)) is not None:
            entry.x509_svid_ttl.CopyFrom(new_ttl)
        if hint is not None:
            entry.hint = hint
        if (new_expiry := arguments.expiry_proto(expires)) is not None:
            entry.expires_at.CopyFrom(new_expiry)
        show_one(stubs.entries.UpdateEntry(ca_pb2.UpdateEntryRequest(entry=entry), timeout=TIMEOUT_S), output)


@app.command("delete")
def delete(entry_id: EntryId, socket: CaSocket = DEFAULT_CA_SOCKET, output: Output = None) -> None:
    """Deletes an entry: its grants end, its SVIDs are no longer renewed."""
    with ca(socket) as stubs:
        stubs.entries.DeleteEntry(ca_pb2.DeleteEntryRequest(entry_id=entry_id), timeout=TIMEOUT_S)
    show_row({"entry_id": entry_id, "deleted": True}, output)


@app.command("rotate-key")
def rotate_key(entry_id: EntryId, socket: CaSocket = DEFAULT_CA_SOCKET, output: Output = None) -> None:
    """Gives the entry a new key and an SVID for it; the old key signs until the last certificate for it ends."""
    with ca(socket) as stubs:
        request = ca_pb2.RotateEntryKeyRequest(entry_id=entry_id)
        show_one(stubs.entries.RotateEntryKey(request, timeout=TIMEOUT_S), output)
