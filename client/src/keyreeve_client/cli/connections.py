"""Connections to the services' local admin sockets. Who may open the socket is an administrator: its file permissions decide (docs/adr/0005)."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import grpc
import typer
from google.protobuf.message import Message
from keyreeve_common.errors import PermissionDenied, Unavailable
from keyreeve_common.grpc_edge import error_from_rpc
from keyreeve_common.v1 import ca_pb2_grpc, keyserver_pb2_grpc

from keyreeve_client.channel import open_sync_local_channel

DEFAULT_CA_SOCKET = Path("/run/keyreeve-ca/admin.sock")
DEFAULT_KEY_SERVER_SOCKET = Path("/run/keyreeve-keyserver/admin.sock")
TIMEOUT_S = 30.0
PAGE_SIZE = 500

CaSocket = Annotated[
    Path, typer.Option("--ca-socket", envvar="KEYREEVE_CA_SOCKET", help="The CA's local admin socket.")
]
KeyServerSocket = Annotated[
    Path,
    typer.Option(
        "--key-server-socket", envvar="KEYREEVE_KEY_SERVER_SOCKET", help="The key server's local admin socket."
    ),
]

Request = TypeVar("Request", bound=Message)
Page = TypeVar("Page", bound=Message)


@contextmanager
def local_channel(socket: Path, service: str) -> Iterator[grpc.Channel]:
    """A channel to `service`'s admin socket. Raises: Unavailable, PermissionDenied; what the service refuses comes as its own error."""
    check_socket(socket, service)
    with open_sync_local_channel(socket) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error


def check_socket(socket: Path, service: str) -> None:
    """Raises: Unavailable, PermissionDenied, which say what to do."""
    try:
        mode = socket.stat().st_mode
    except FileNotFoundError:
        raise Unavailable(f"{socket}: no such socket: is {service} running? name another with an option") from None
    except PermissionError:
        raise PermissionDenied(f"{socket}: only administrators of {service} may open it; try as root") from None
    if not stat.S_ISSOCK(mode):
        raise Unavailable(f"{socket}: is not a socket")
    if not os.access(socket, os.W_OK):
        raise PermissionDenied(f"{socket}: only administrators of {service} may open it; try as root")


class CaStubs:
    """The CA's administrative services."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.entries = ca_pb2_grpc.EntriesStub(channel)
        self.nodes = ca_pb2_grpc.NodesStub(channel)
        self.svids = ca_pb2_grpc.SvidsStub(channel)
        self.authorities = ca_pb2_grpc.AuthoritiesStub(channel)
        self.health = ca_pb2_grpc.HealthStub(channel)


class KeyServerStubs:
    """The key server's administrative services."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.keys = keyserver_pb2_grpc.KeyAdminStub(channel)
        self.grants = keyserver_pb2_grpc.GrantsStub(channel)
        self.quarantines = keyserver_pb2_grpc.QuarantinesStub(channel)
        self.health = keyserver_pb2_grpc.HealthStub(channel)


@contextmanager
def ca(socket: Path) -> Iterator[CaStubs]:
    with local_channel(socket, "keyreeve-ca") as channel:
        yield CaStubs(channel)


@contextmanager
def key_server(socket: Path) -> Iterator[KeyServerStubs]:
    with local_channel(socket, "keyreeve-keyserver") as channel:
        yield KeyServerStubs(channel)


def all_pages(fetch: Callable[[str], Page]) -> Iterator[Page]:
    """Every page: `fetch` gets the token of the next one, "" for the first."""
    token = ""
    while True:
        page = fetch(token)
        yield page
        token = getattr(page, "next_page_token", "")
        if not token:
            return
