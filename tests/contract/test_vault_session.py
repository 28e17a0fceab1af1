"""The connection to Vault against servers that are no Vault: what leaves us, what we believe, and how long we wait."""

from __future__ import annotations

import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from keyreeve_common.errors import KeyreeveError, TokenUnavailable
from keyreeve_common.vault.config import VaultConfig, VaultLogin
from keyreeve_common.vault.session import VaultSession
from keyreeve_testing.openbao import write_secret

TOKEN = "s.the-token"
LOOKUP = {"data": {"ttl": 0, "expire_time": None, "renewable": False}}
Behaviour = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def server(behave: Behaviour) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Answers the look-up of the token honestly, and all else as `behave` does; gives its address and the headers that it saw."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            seen.append(dict(self.headers))
            if self.path == "/v1/auth/token/lookup-self":
                answer(self, 200, LOOKUP)
            else:
                behave(self)

        def log_message(self, format: str, *args: Any) -> None:
            return

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            return

    made = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_address[1]}", seen
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


def answer(handler: BaseHTTPRequestHandler, status: int, body: Any, **headers: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


@contextmanager
def session(address: str, tmp_path: Path, **changes: Any) -> Iterator[VaultSession]:
    token_file = write_secret(tmp_path / "token", TOKEN)
    fields: dict[str, Any] = {
        "address": address,
        "login": VaultLogin.TOKEN,
        "token_file": token_file,
        "insecure_http": True,
        "request_timeout": timedelta(milliseconds=500),
    }
    made = VaultSession(VaultConfig(**{**fields, **changes}))
    try:
        yield made
    finally:
        made.close()


def refusal(behave: Behaviour, tmp_path: Path) -> KeyreeveError:
    with server(behave) as (address, _), session(address, tmp_path) as made:
        with pytest.raises(KeyreeveError) as refused:
            made.get("transit/keys/x", doing="reading the key")
    assert TOKEN not in str(refused.value)
    return refused.value


def test_token_is_not_carried_to_where_a_redirect_points(tmp_path: Path) -> None:
    with server(lambda handler: answer(handler, 200, {"data": {}})) as (elsewhere, seen):
        error = refusal(lambda handler: answer(handler, 307, {}, Location=f"{elsewhere}/v1/transit/keys/x"), tmp_path)
    assert "sends us to another" in error.detail
    assert seen == []


@pytest.mark.parametrize("body", [b"<html>sign in</html>", b"[1, 2]", b"\xff\xfe", b"{", b"[" * 100_000])
def test_what_is_no_vault_is_named(tmp_path: Path, body: bytes) -> None:
    error = refusal(lambda handler: answer(handler, 200, body), tmp_path)
    assert isinstance(error, TokenUnavailable)
    assert "does not speak as Vault" in error.detail
    assert isinstance(refusal(lambda handler: answer(handler, 503, body), tmp_path), TokenUnavailable)


@pytest.mark.parametrize("compressed", [False, True])
def test_answer_without_end_is_not_read_to_its_end(tmp_path: Path, compressed: bool) -> None:
    sent = 0

    def flood(handler: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        handler.send_response(200)
        if compressed:
            handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Connection", "close")
        handler.end_headers()
        zipped = zlib.compressobj(wbits=31)
        for _ in range(64 * 64):  # 4 GiB: more than any memory here that is not bounded
            plain = b" " * 1_048_576
            handler.wfile.write(zipped.compress(plain) + zipped.flush(zlib.Z_SYNC_FLUSH) if compressed else plain)
            sent += len(plain)

    patient = timedelta(seconds=20)
    with server(flood) as (address, _), session(address, tmp_path, request_timeout=patient) as made:
        with pytest.raises(TokenUnavailable, match="does not speak as Vault"):
            made.get("transit/keys/x", doing="reading the key")
    assert sent < 4096 * 1_048_576


def test_server_that_never_answers_costs_one_request_timeout(tmp_path: Path) -> None:
    release = threading.Event()
    began = time.monotonic()
    error = refusal(lambda _handler: (release.wait(30), None)[1], tmp_path)
    release.set()
    assert "did not answer within 0.5s" in error.detail
    assert time.monotonic() - began < 20


def test_connection_that_the_server_closed_is_opened_again(tmp_path: Path) -> None:
    closed: list[bool] = []

    def once_closed(handler: BaseHTTPRequestHandler) -> None:
        if closed:
            answer(handler, 200, {"data": {"name": "x"}})
        else:
            closed.append(True)
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)

    with server(once_closed) as (address, _), session(address, tmp_path) as made:
        assert made.get("transit/keys/x", doing="reading the key") == {"data": {"name": "x"}}
    assert closed


def test_environment_names_neither_proxy_nor_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("VAULT_TOKEN", "s.another")
    monkeypatch.setenv("VAULT_NAMESPACE", "another")
    with server(lambda handler: answer(handler, 200, {"data": {}})) as (address, seen):
        with session(address, tmp_path, namespace="team/one") as made:
            made.get("transit/keys/x", doing="reading the key")
    assert {headers["X-Vault-Token"] for headers in seen} == {TOKEN}
    assert {headers["X-Vault-Namespace"] for headers in seen} == {"team/one"}
