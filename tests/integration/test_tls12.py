"""TLS 1.2 with real parts: nginx serves and curl authenticates with keys that opted in, and one that did not is refused by name."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from keyreeve_testing.stack import CURL, Served, Stack, StackConfig

pytestmark = [pytest.mark.native, pytest.mark.softhsm, pytest.mark.timeout(300)]

SERVER = ("tls13_server_verify", "tls12_server_key_exchange")
SERVED = (
    Served("p256", "/ns/web/sa/p256", "ec-p256", mutual=True, protocols="TLSv1.2", purposes=SERVER),
    Served("rsa", "/ns/web/sa/rsa", "rsa-2048", protocols="TLSv1.2", purposes=SERVER),
    Served(
        "p384",
        "/ns/web/sa/p384",
        "ec-p384",
        "software",
        protocols="TLSv1.2 TLSv1.3",
        settings="ssl_conf_command SignatureAlgorithms ECDSA+SHA384;",
        purposes=SERVER,
    ),
    Served("modern", "/ns/web/sa/modern", "ec-p256", protocols="TLSv1.2"),
)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    config = StackConfig(
        tmp_path_factory.mktemp("tls12") / "keyreeve",
        served=SERVED,
        client_purposes=("tls13_client_verify", "tls12_client_verify"),
    )
    with Stack(config) as running:
        yield running


@dataclass(frozen=True)
class Fetched:
    code: int
    errors: str


def fetch(stack: Stack, name: str, *options: str, client: bool = False) -> Fetched:
    """One request by curl; with `client` it shows the client's keyless SVID."""
    host, port = stack.dns_name(name), stack.ports[name]
    command = [
        CURL,
        "--silent",
        "--show-error",
        "--max-time",
        "30",
        "--output",
        "/dev/null",
        "--cacert",
        str(stack.bundle),
    ]
    command += ["--resolve", f"{host}:{port}:127.0.0.1", *options, f"https://{host}:{port}/"]
    if client:
        files = stack.svid_dir("client")
        command += ["--cert", str(files / "chain.pem"), "--key", str(files / "key.pem")]
    done = subprocess.run(command, env=stack.openssl_env(), capture_output=True, text=True, timeout=60, check=False)
    return Fetched(done.returncode, done.stderr)


TLS12 = ("--tlsv1.2", "--tls-max", "1.2")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("rsa", (), id="rsa"),
        pytest.param("rsa", ("--ciphers", "ECDHE-RSA-AES128-GCM-SHA256"), id="one-cipher"),
        pytest.param("rsa", ("--curves", "P-384"), id="p-384"),
        pytest.param("rsa", ("--curves", "X25519"), id="x25519"),
        pytest.param("rsa", ("--curves", "X448"), id="x448"),
        pytest.param("rsa", ("--curves", "P-521"), id="p-521"),
    ],
)
def test_nginx_serves_tls12_with_a_key_that_opted_in(stack: Stack, name: str, options: tuple[str, ...]) -> None:
    before = stack.key_of(f"/ns/web/sa/{name}")["signatures"]
    fetched = fetch(stack, name, *TLS12, *options)
    assert fetched.code == 0, fetched.errors
    assert stack.key_of(f"/ns/web/sa/{name}")["signatures"] == before + 1


def test_both_ends_sign_tls12_remotely(stack: Stack) -> None:
    """libssl hands the provider the client's whole transcript, and the signer reads it to the end."""
    paths = ("/ns/web/sa/p256", "/ns/web/sa/client")
    before = [stack.key_of(path)["signatures"] for path in paths]
    fetched = fetch(stack, "p256", *TLS12, client=True)
    assert fetched.code == 0, fetched.errors
    assert [stack.key_of(path)["signatures"] for path in paths] == [count + 1 for count in before]


def test_one_server_speaks_both_versions(stack: Stack) -> None:
    """A P-384 key signs with SHA-384 alone; TLS 1.2 lets a client prefer another hash, unless the server says what it signs with."""
    before = stack.key_of("/ns/web/sa/p384")["signatures"]
    for options in (TLS12, ("--tlsv1.3",)):
        fetched = fetch(stack, "p384", *options)
        assert fetched.code == 0, fetched.errors
    assert stack.key_of("/ns/web/sa/p384")["signatures"] == before + 2


def test_a_key_that_did_not_opt_in_is_refused_by_name(stack: Stack) -> None:
    before = stack.key_of("/ns/web/sa/modern")["signatures"]
    assert fetch(stack, "modern", *TLS12).code != 0
    assert stack.key_of("/ns/web/sa/modern")["signatures"] == before
    log = stack.directory / "log" / "nginx-error.log"
    refusal = "the grant does not cover purpose tls12_server_key_exchange for this key"
    stack.wait_until(lambda: refusal in log.read_text(errors="replace"), "the refusal in nginx's log")
    assert fetch(stack, "rsa", *TLS12).code == 0
