"""`keyreeve approval`: requests that need the agreement of several people, and their signatures.

Signing needs no service: it runs on the approver's own machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from keyreeve_common.approvals import (
    PrivateKey,
    describe_request,
    is_approver_key,
    parse_request,
    sign_request,
)
from keyreeve_common.errors import InvalidRequest
from keyreeve_common.files import check_secret_file, write_atomic
from keyreeve_common.v1 import keyserver_pb2

from keyreeve_client.cli import arguments
from keyreeve_client.cli.connections import DEFAULT_KEY_SERVER_SOCKET, TIMEOUT_S, KeyServerSocket, key_server
from keyreeve_client.cli.output import Output, show_one, show_text

app = typer.Typer(no_args_is_help=True, help="Approvals of key destructions and of authorities' keys.")
requests = typer.Typer(no_args_is_help=True, help="What is to be approved, to be signed by each approver.")
app.add_typer(requests, name="request")

Expires = Annotated[str, typer.Option("--expires", help="Until when approvals hold: a time, or from now; at most 30d.")]


@requests.command("destroy")
def request_destroy(
    key_id: Annotated[str, typer.Argument(help="The key to destroy.")],
    *,
    after: Annotated[
        str | None, typer.Option("--after", help="Waiting time, as it will be given to `key destroy`.")
    ] = None,
    expires: Expires = "24h",
    socket: KeyServerSocket = DEFAULT_KEY_SERVER_SOCKET,
) -> None:
    """Prints the request to destroy a key."""
    _show_request(
        keyserver_pb2.GetApprovalRequestRequest(
            key_id=arguments.key_id(key_id),
            after=arguments.duration_proto(after),
            expires=arguments.expiry_proto(expires),
        ),
        socket,
    )


@requests.command("create")
def request_create(
    request_id: Annotated[str, typer.Argument(help="Request id of the creation, as `approval_required` said it.")],
    *,
    expires: Expires = "24h",
    socket: KeyServerSocket = DEFAULT_KEY_SERVER_SOCKET,
) -> None:
    """Prints the request to make a key that was asked for and needs approvals."""
    request = keyserver_pb2.GetApprovalRequestRequest(request_id=request_id, expires=arguments.expiry_proto(expires))
    _show_request(request, socket)


def _show_request(request: keyserver_pb2.GetApprovalRequestRequest, socket: Path) -> None:
    with key_server(socket) as stubs:
        show_text(stubs.keys.GetApprovalRequest(request, timeout=TIMEOUT_S).request)


@app.command("sign")
def sign(
    request: Annotated[Path, typer.Argument(help="File with the request.")],
    *,
    key: Annotated[Path, typer.Option("--key", help="The approver's private key, PEM; a passphrase is asked for.")],
    name: Annotated[str, typer.Option("--name", help="The approver's name in signer.toml.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write the approval; standard output if not.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Shows what a request says, and signs it."""
    wanted = parse_request(request.read_bytes())
    lines = list(describe_request(wanted))
    width = max(len(label) for label, _ in lines)
    for label, value in lines:
        typer.echo(f"{label:<{width}}  {_visible(value)}", err=True)
    if not yes:
        typer.confirm("Approve this?", abort=True, err=True)
    text = sign_request(wanted, name, _private_key(key)).to_text()
    if out is None:
        show_text(text.rstrip("\n"))
    else:
        write_atomic(out, text.encode())


@app.command("submit")
def submit(
    approvals: Annotated[list[Path], typer.Argument(help="Files with approvals of one creation.")],
    socket: KeyServerSocket = DEFAULT_KEY_SERVER_SOCKET,
    output: Output = None,
) -> None:
    """Hands in approvals of a creation; ask for the key again after that."""
    request = keyserver_pb2.SubmitApprovalsRequest(approvals=read_approvals(approvals))
    with key_server(socket) as stubs:
        show_one(stubs.keys.SubmitApprovals(request, timeout=TIMEOUT_S), output)


def read_approvals(paths: list[Path]) -> list[str]:
    """Raises: InvalidRequest for a file that is no text."""
    try:
        return [path.read_text(encoding="utf-8") for path in paths]
    except UnicodeDecodeError:
        raise InvalidRequest("a file of approvals is not text") from None


def _visible(value: str) -> str:
    """What is signed must be what is seen: no control characters, no text that runs the other way."""
    return "".join(each if each.isascii() and each.isprintable() else ascii(each)[1:-1] for each in value)


def _private_key(path: Path) -> PrivateKey:
    """Raises: InvalidRequest, which names the file and never what is in it; ConfigInvalid where others can read a key that is not encrypted."""
    data = path.read_bytes()
    try:
        try:
            key = load_pem_private_key(data, None)
            if path.is_file():  # a pipe has no mode that matters
                check_secret_file(path)
        except TypeError:  # it is encrypted
            passphrase = typer.prompt(f"Passphrase of {path}", hide_input=True, err=True)
            key = load_pem_private_key(data, str(passphrase).encode())
    except (ValueError, UnsupportedAlgorithm):
        raise InvalidRequest(f"{path}: no private key in PEM, or another passphrase") from None
    if not is_approver_key(key):
        raise InvalidRequest(f"{path}: approvals are signed with Ed25519, P-256 or P-384")
    return key  # type: ignore[return-value]  # is_approver_key looked
