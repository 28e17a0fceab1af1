"""A signer whose Vault is sealed, killed or stopped: clear errors meanwhile, software keys unharmed, and recovery by itself."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_der_public_key
from keyreeve_common.errors import DeadlineExceeded, KeyreeveError, TokenUnavailable
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_common.verification import verify_signature
from keyreeve_keyserver import frames
from keyreeve_testing.openbao import PREFIX, SEALING_POLICY, TRANSIT_POLICY, OpenBao
from keyreeve_testing.signer import SignerClient, running_signer, write_signer_config

pytestmark = pytest.mark.openbao
CONTENT = build_tls13_content(Purpose.TLS13_SERVER_VERIFY, bytes(range(32)))
KEK = "records"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenBao]:
    """A server that these tests may hurt."""
    made = OpenBao(tmp_path_factory.mktemp("openbao"))
    try:
        made.start()
        made.enable("transit", "transit")
        yield made
    finally:
        made.close()


def config_of(server: OpenBao, directory: Path, *, sealing: str = "", faults: int = 1000) -> Path:
    policies = [
        server.policy(TRANSIT_POLICY, mount="transit", prefix=PREFIX),
        server.policy(SEALING_POLICY, mount="transit", key=KEK),
    ]
    role = server.approle(*policies, directory=directory, token_ttl="1h")
    path = write_signer_config(directory / "etc", sealing=sealing)
    lines = [
        "[[backend]]",
        'name = "vault"',
        'kind = "vault"',
        "workers = 2",
        f"breaker_faults = {faults}",
        'breaker_pause = "200ms"',
        "[backend.vault]",
        f'address = "{server.address}"',
        f'ca_file = "{server.ca_file}"',
        'login = "approle"',
        f'login_mount = "{role.mount}"',
        f'role_id = "{role.role_id}"',
        f'secret_id_file = "{role.secret_id_file}"',
        'request_timeout = "1s"',
    ]
    path.write_text(path.read_text() + "\n".join(lines) + "\n")
    return path


class Keys:
    """One key in Vault and one sealed software key, in a running signer."""

    def __init__(self, signer: SignerClient) -> None:
        self.signer = signer
        self.spki: dict[str, Any] = {}
        self.sealed: dict[str, str] = {}

    def make(self, backend: str) -> None:
        answer = self.signer.control(
            "create_key",
            key_id=backend,
            key_type=str(KeyType.EC_P256),
            role="handshake",
            purposes=["tls13_server_verify"],
            backend=backend,
            label="test",
        )
        self.sealed[backend] = answer["record"]
        self.spki[backend] = load_der_public_key(base64.b64decode(answer["spki_der"]))
        self.load(backend)

    def load(self, backend: str) -> None:
        self.signer.control("load_key", record=self.sealed[backend])

    def sign(self, *backends: str, deadline_ms: int = 10_000) -> list[bytes | KeyreeveError]:
        """What one batch gives; signatures have been verified."""
        items = [
            frames.SignItem(
                id=number,
                key_id=KeyId(backend),
                scheme=SignatureScheme.ECDSA_SECP256R1_SHA256,
                purpose=Purpose.TLS13_SERVER_VERIFY,
                deadline_ms=deadline_ms,
                message=CONTENT,
            )
            for number, backend in enumerate(backends)
        ]
        results = self.signer.sign(*items)
        outcomes: list[bytes | KeyreeveError] = []
        for number, backend in enumerate(backends):
            result = results[number]
            if isinstance(result, frames.Refused):
                outcomes.append(result.error)
                continue
            verify_signature(
                self.spki[backend], SignatureScheme.ECDSA_SECP256R1_SHA256, CONTENT, signature=result.signature
            )
            outcomes.append(result.signature)
        return outcomes

    def until_vault(self, *, signs: bool, text: str = "") -> None:
        """Batches for both keys until Vault's signs, or is refused with `text`; the software key signs in each."""
        deadline = time.monotonic() + 60
        while True:
            vault, software = self.sign("vault", "software")
            assert isinstance(software, bytes), software
            if signs and isinstance(vault, bytes):
                return
            if isinstance(vault, KeyreeveError):
                assert isinstance(vault, TokenUnavailable), vault
                if not signs and text in vault.detail:
                    return
            assert time.monotonic() < deadline, vault
            time.sleep(0.02)


@contextmanager
def running(config: Path, log: Path) -> Iterator[Keys]:
    with running_signer(config, log=log) as signer:
        keys = Keys(signer)
        keys.make("software")
        keys.make("vault")
        yield keys


def test_sealed_vault_is_named_and_comes_back(server: OpenBao, tmp_path: Path) -> None:
    with running(config_of(server, tmp_path), tmp_path / "log") as keys:
        keys.until_vault(signs=True)
        server.seal()
        keys.until_vault(signs=False, text="Vault is sealed")
        server.unseal()
        keys.until_vault(signs=True)


def test_killed_vault_is_named_and_its_keys_are_there_after_a_restart(server: OpenBao, tmp_path: Path) -> None:
    with running(config_of(server, tmp_path), tmp_path / "log") as keys:
        server.kill()
        keys.until_vault(signs=False, text="Vault cannot be reached")
        server.start()
        keys.until_vault(signs=True)
        keys.load("vault")


def test_stopped_vault_costs_each_caller_its_deadline_until_the_breaker_opens(server: OpenBao, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(config_of(server, tmp_path, faults=2), log) as keys:
        with server.stopped():
            (outcome,) = keys.sign("vault", deadline_ms=200)
            assert isinstance(outcome, DeadlineExceeded)
            assert isinstance(keys.sign("software")[0], bytes)
            keys.until_vault(signs=False, text="rests after faults in a row; the last: signing: Vault did not answer")
        keys.until_vault(signs=True)
    assert '"event": "breaker_opened"' in log.read_text()


def test_records_sealed_by_vault_need_it_to_load_and_not_to_sign(server: OpenBao, tmp_path: Path) -> None:
    config = config_of(server, tmp_path, sealing=f'vault_backend = "vault"\nvault_key_name = "{KEK}"')
    with running(config, tmp_path / "log") as keys:
        spki, sealed = keys.spki, keys.sealed
        server.seal()
        try:
            keys.until_vault(signs=False, text="Vault is sealed")
            assert isinstance(keys.sign("software")[0], bytes)
            keys.signer.control("forget_key", key_id="software")
            with pytest.raises(TokenUnavailable, match="unsealing: Vault is sealed"):
                keys.load("software")
        finally:
            server.unseal()
    with running_signer(config, log=tmp_path / "second.log") as signer:
        again = Keys(signer)
        again.spki, again.sealed = spki, sealed
        again.load("software")
        again.load("vault")
        assert all(isinstance(outcome, bytes) for outcome in again.sign("software", "vault"))
