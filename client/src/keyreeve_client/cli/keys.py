"""`keyreeve key` and `keyreeve grant`: the key server's keys, and who may use them."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated

import typer
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_public_key,
)
from keyreeve_common.errors import InvalidRequest
from keyreeve_common.files import write_atomic
from keyreeve_common.key_attestation import verify_attestation
from keyreeve_common.schemes import KeyType
from keyreeve_common.v1 import keyserver_pb2

from keyreeve_client.cli import arguments
from keyreeve_client.cli.approvals import read_approvals
from keyreeve_client.cli.connections import (
    DEFAULT_KEY_SERVER_SOCKET,
    PAGE_SIZE,
    TIMEOUT_S,
    KeyServerSocket,
    all_pages,
    key_server,
)
from keyreeve_client.cli.output import Output, show_list, show_one, show_row

app = typer.Typer(no_args_is_help=True, help="Keys of the key server.")
grants = typer.Typer(no_args_is_help=True, help="Who may use which key.")
_GRANT_COLUMNS = ("key_id", "holder", "purposes", "expires_at", "revoked_at", "rate")
_COLUMNS = ("key_id", "key_type", "role", "state", "life", "generation", "backend", "label", "attributes", "signatures")

KeyIdArgument = Annotated[str, typer.Argument(help="The key's id.")]
KeyIdOption = Annotated[str, typer.Option("--key-id", help="The key's id.")]
Holder = Annotated[str, typer.Option("--holder", help="SPIFFE ID of the agent.")]


@app.command("list")
def list_keys(
    label: Annotated[str, typer.Option("--label", help="Only keys with this label.")] = "",
    socket: KeyServerSocket = DEFAULT_KEY_SERVER_SOCKET,
    output: Output = None,
) -> None:
    """All keys."""
    with key_server(socket) as stubs:
        pages = all_pages(
            lambda token: stubs.keys.ListKeys(
                keyserver_pb2.ListKeysRequest(label=label, page_size=PAGE_SIZE, page_token=token), timeout=TIMEOUT_S
            )
        )
        show_list([key for page in pages for key in page.keys], _COLUMNS, output)


@app.command("show")
def show(key_id: KeyIdArgument, socket: KeyServerSocket = DEFAULT_KEY_SERVER_SOCKET, output: Output = None) -> None:
    """One key: where it is, what the token says of it, what it may sign."""
    request = keyserver_pb2.GetKeyRequest(key_id=arguments.key_id(key_id))
    with key_server(socket) as stubs:
        show_one(stubs.keys.GetKey(request, timeout=TIMEOUT_S), output)


@app.command("create")
def create(
    *,
    key_type: Annotated[KeyType, typer.Option("--key-type")] = KeyType.EC_P256,
    backend: Annotated[str, typer.Option("--backend", help="Which backend; empty: the server's default.")] = "",
    label: Annotated[str, typer.Option("--label", help="For people: what it is for.")] = "",
    purpose: Annotated[
        list[str] | None,
        typer.Option(
            "--purpose", help="tls13_server_verify and tls13_client_verify unless told; jwt_svid stands alone."
        ),
    ] = None,
    trust_domain: Annotated[
        str, typer.Option("--trust-domain", help="With purpose jwt_svid: of every token's subject.")
    ] = "",
    max_ttl: Annotated[
        str,
        typer.Option("--max-ttl", help="With purpose jwt_svid: how long a token may live, such as 5m; at most a day."),
    ] = "",
    request_id: Annotated[
        str, typer.Option("--request-id", help="The same id gives the same key again, so a retry makes no second one.")
    ] = "",
    socket: KeyServerSocket = DEFAULT_KEY_SERVER_SOCKET,
    output: Output = None,
) -> None:
    """Creates a handshake key, or a JWT authority's. X.509 authorities are made by `keyreeve init` and `keyreeve authority prepare` alone."""
    profile = arguments.jwt_profile(purpose or (), trust_domain, max_ttl)
    request = keyserver_pb2.CreateKeyRequest(
        request_id=request_id or f"cli-{secrets.token_hex(16)}",
        key_type=arguments.key_type(key_type),
        role=keyserver_pb2.KEY_ROLE_HANDSHAKE if profile is None else keyserver_pb2.KEY_ROLE_JWT_AUTHORITY,
        purposes=arguments.purposes(purpose or ("tls13_server_verify", "tls13_client_verify")),
        backend=backend,
        label=label,
        jwt_profile=profile,
    )
    with key_server(socket) as stubs:
        show_one(stubs.keys.CreateKey(request, timeout=TIMEOUT_S), output)


@app.command("disable")
def disable(key_id: KeyIdArgument, socket: KeyServerSocket = DEFAULT_KEY_SERVER_SOCKET, output: Output = None) -> None:
    """Stops a key from signing until it is enabled again."""
    request = keyserver_pb2.DisableKeyRequest(key_id=arguments.key_id(key_id))
    with key_server(socket) as stubs:
        show_one(stubs.keys.DisableKey(request, timeout=TIMEOUT_S), output)


@app.command("enable")
def enable(key_id: KeyIdArgument, socket: KeyServerSocket = DEFAULT_KEY_SERVER_SOCKET, output: Output = None) -> None:
    """Lets a disabled key sign again."""
    request = keyserver_pb2.EnableKeyRequest(key_id=arguments.key_id(key_id))
    with key_server(socket) as stubs:
        show_one(stubs.keys.EnableKey(request, timeout=TIMEOUT_S), output)


@app.command("destroy")
def destroy(
    key_id: KeyIdArgument,
    *,
    after: Annotated[
        str | None, typer.Option("--after", help="Waiting time, such as 30d; the server's shortest unless told.")
    ] = None,
    approval: Annotated[
        list[Path] | None, typer.Option("--approval", help="File of `keyreeve approval sign`; repeat it.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    socket: KeyServerSocket = DEFAULT_KEY_SERVER_SOCKET,
    output: Output = None,
) -> None:
    """Schedules the destruction of a disabled key; `cancel-destruction` stops it while the waiting time runs."""
    if not yes:
        typer.confirm(f"Destroy key {key_id} for ever, after the waiting time?", abort=True, err=True)
    request = keyserver_pb2.ScheduleKeyDestructionRequest(
        key_id=arguments.key_id(key_id),
        after=arguments.duration_proto(after),
        approvals=read_approvals(approval or []),
    )
    with key_server(socket) as stubs:
        show_one(stubs.keys.ScheduleKeyDestruction(request, timeout=TIMEOUT_S), output)


@app.command("cancel-destruction")
def cancel_destruction(
    key_id: KeyIdArgument, socket: KeyServerSocket = DEFAULT_KEY_SERVER_SOCKET, output: Output = None
) -> None:
    """Keeps a key that was to be destroyed; it stays disabled."""
    request = keyserver_pb2.CancelKeyDestructionRequest(key_id=arguments.key_id(key_id))
    with key_server(socket) as stubs:
        show_one(stubs.keys.CancelKeyDestruction(request, timeout=TIMEOUT_S), output)


@app.command("attest")
def attest(
    key_id: KeyIdArgument,
    *,
    nonce: Annotated[str, typer.Option("--nonce", help="From whoever asks: hex, 16 to 64 bytes.")],
    out: Annotated[Path, typer.Option("--out", help="Where to write the attestation.")],
    public_key_out: Annotated[
        Path | None, typer.Option("--public-key-out", help="Where to write the cluster's attestation public key, PEM.")
    ] = None,
    socket: KeyServerSocket = DEFAULT_KEY_SERVER_SOCKET,
) -> None:
    """Has the key cluster say, signed, what the token says now of a key."""
    request = keyserver_pb2.AttestKeyRequest(key_id=arguments.key_id(key_id), nonce=arguments.hexadecimal(nonce))
    with key_server(socket) as stubs:
        answer = stubs.keys.AttestKey(request, timeout=TIMEOUT_S)
    write_atomic(out, answer.attestation.encode())
    if public_key_out is not None:
        public_key = load_der_public_key(answer.public_key_der)
        write_atomic(public_key_out, public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


@app.command("verify-attestation")
def verify(
    attestation: Annotated[Path, typer.Argument(help="File of `keyreeve key attest`.")],
    *,
    public_key: Annotated[Path, typer.Option("--public-key", help="The cluster's attestation public key, PEM.")],
    nonce: Annotated[str | None, typer.Option("--nonce", help="The nonce that was asked with, hex.")] = None,
    output: Output = None,
) -> None:
    """Verifies an attestation and shows what it says. Needs no service."""
    try:
        key = load_pem_public_key(public_key.read_bytes())
    except (ValueError, UnsupportedAlgorithm):
        raise InvalidRequest(f"{public_key}: no public key in PEM") from None
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidRequest(f"{public_key}: an attestation key is Ed25519")
    wanted = None if nonce is None else arguments.hexadecimal(nonce)
    show_row(dict(verify_attestation(attestation.read_bytes(), key, nonce=wanted).statement), output)


@grants.command("list")
def list_grants(
    key_id: Annotated[str, typer.Option("--key-id", help="Only of this key.")] = "",
    holder: Annotated[str, typer.Option("--holder", help="Only of this holder.")] = "",
    socket: KeyServerSocket = DEFAULT_KEY_SERVER_SOCKET,
    output: Output = None,
) -> None:
    """All grants, revoked ones too."""
    with key_server(socket) as stubs:
        pages = all_pages(
            lambda token: stubs.grants.ListGrants(
                keyserver_pb2.ListGrantsRequest(key_id=key_id, holder=holder, page_size=PAGE_SIZE, page_token=token),
                timeout=TIMEOUT_S,
            )
        )
        show_list([grant for page in pages for grant in page.grants], _GRANT_COLUMNS, output)


@grants.command("create")
def create_grant(
    *,
    key_id: KeyIdOption,
    holder: Holder,
    purpose: Annotated[
        list[str] | None, typer.Option("--purpose", help="tls13_server_verify and tls13_client_verify unless told.")
    ] = None,
    expires: Annotated[str | None, typer.Option("--expires", help="A time, or from now, such as 24h.")] = None,
    rate: Annotated[
        str | None, typer.Option("--rate", help="Signatures at each replica, such as 500/s or 10/m.")
    ] = None,
    burst: Annotated[
        int | None, typer.Option("--burst", min=1, help="How many at once; twice the rate unless told.")
    ] = None,
    socket: KeyServerSocket = DEFAULT_KEY_SERVER_SOCKET,
    output: Output = None,
) -> None:
    """Lets a holder use a key, instead of what it had; a grant that was revoked works again."""
    request = keyserver_pb2.CreateGrantRequest(
        key_id=arguments.key_id(key_id),
        holder=arguments.spiffe_id(holder),
        purposes=arguments.purposes(purpose or ("tls13_server_verify", "tls13_client_verify")),
        expires_at=arguments.expiry_proto(expires),
        rate=arguments.rate_proto(rate, burst),
    )
    with key_server(socket) as stubs:
        show_one(stubs.grants.CreateGrant(request, timeout=TIMEOUT_S), output)


@grants.command("revoke")
def revoke_grant(
    key_id: KeyIdOption,
    holder: Holder,
    socket: KeyServerSocket = DEFAULT_KEY_SERVER_SOCKET,
    output: Output = None,
) -> None:
    """Ends a holder's use of a key, on every replica within a second."""
    request = keyserver_pb2.RevokeGrantRequest(key_id=arguments.key_id(key_id), holder=arguments.spiffe_id(holder))
    with key_server(socket) as stubs:
        show_one(stubs.grants.RevokeGrant(request, timeout=TIMEOUT_S), output)
