"""A real key server under test: its files, its process, an SVID from the test PKI, and stubs to call it with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key
from google.protobuf.timestamp_pb2 import Timestamp
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.v1 import keyserver_pb2, keyserver_pb2_grpc, types_pb2

from keyreeve_testing.pki import Svid, TestPki, tls_name
from keyreeve_testing.processes import ManagedProcess, free_port
from keyreeve_testing.softhsm import SoftHsmToken

_FAST_KDF = {"kdf": "scrypt", "n": 16_384, "p": 1, "r": 8, "salt": "5a" * 32, "version": 1}
SERVER_PATH = "keyreeve/keyserver"
ECDSA_P256 = 0x0403
MESSAGE = build_tls13_content(Purpose.TLS13_SERVER_VERIFY, bytes(range(32)))


@dataclass
class Stubs:
    """All services over one channel, blocking."""

    channel: grpc.Channel

    def __post_init__(self) -> None:
        self.signing = keyserver_pb2_grpc.SigningStub(self.channel)
        self.keys = keyserver_pb2_grpc.KeyAdminStub(self.channel)
        self.grants = keyserver_pb2_grpc.GrantsStub(self.channel)
        self.quarantines = keyserver_pb2_grpc.QuarantinesStub(self.channel)
        self.identity = keyserver_pb2_grpc.ServiceIdentityStub(self.channel)
        self.health = keyserver_pb2_grpc.HealthStub(self.channel)

    def sign(self, key_id: str, **changes: Any) -> bytes:
        """One TLS 1.3 server signature, unless told otherwise."""
        request = sign_request(key_id, **changes)
        return self.signing.Sign(request, timeout=20).signature


def sign_request(key_id: str, **changes: Any) -> keyserver_pb2.SignRequest:
    fields = {"scheme": ECDSA_P256, "purpose": types_pb2.PURPOSE_TLS13_SERVER_VERIFY, "message": MESSAGE, **changes}
    return keyserver_pb2.SignRequest(key_id=key_id, **fields)


def sign_item(item_id: int, key_id: str, **changes: Any) -> keyserver_pb2.SignItem:
    fields = {"scheme": ECDSA_P256, "purpose": types_pb2.PURPOSE_TLS13_SERVER_VERIFY, "message": MESSAGE, **changes}
    return keyserver_pb2.SignItem(id=item_id, key_id=key_id, **fields)


def verify_p256(spki_der: bytes, signature: bytes, message: bytes = MESSAGE) -> None:
    key = load_der_public_key(spki_der)
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(signature, message, ec.ECDSA(hashes.SHA256()))


@dataclass
class KeyServerRig:
    """Files under `directory`; `process` is the supervisor. `pki` certifies it and its callers."""

    directory: Path
    pki: TestPki = field(default_factory=TestPki)
    extra: str = ""
    catalog: str = ""
    token: SoftHsmToken | None = None
    default_backend: str = "software"

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.signer_toml = self._write_signer_config()
        self.config = self.directory / "keyserver.toml"
        self.write_config()
        self.process = ManagedProcess.python_module(
            "keyreeve_keyserver", "--config", self.config, name="keyserver", log_path=self.directory / "log"
        )

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def audit_directory(self) -> Path:
        return self.directory / "audit"

    @property
    def admin_socket(self) -> Path:
        return self.directory / "run" / "admin.sock"

    @property
    def spiffe_id(self) -> str:
        return self.pki.spiffe_id(SERVER_PATH)

    def write_config(self) -> None:
        self.config.write_text(
            f'trust_domain = "{self.pki.trust_domain}"\n'
            f'state_dir = "state"\nadmin_socket = "run/admin.sock"\nlisten = "127.0.0.1:{self.port}"\n'
            f'signer_config = "{self.signer_toml}"\nsigner_socket = "signer.sock"\n{self.extra}\n'
            f"[catalog]\n{self.catalog}\n"
        )

    def _write_signer_config(self) -> Path:
        passphrase = self.directory / "passphrase"
        passphrase.touch(mode=0o600)
        passphrase.write_text("a passphrase that is long enough\n")
        (self.directory / "passphrase.kdf").write_text(json.dumps(_FAST_KDF))
        lines = [f'default_backend = "{self.default_backend}"', "[sealing]", 'passphrase_file = "passphrase"']
        lines += ["[[backend]]", 'name = "software"', 'kind = "software"', "workers = 1"]
        if self.token is not None:
            lines += ["[[backend]]", 'name = "hsm"', 'kind = "pkcs11"', "workers = 1"]
            lines += [f'module = "{self.token.module}"', f'token_label = "{self.token.label}"']
            lines += [f'pin_file = "{self.token.pin_file}"', f'softhsm_conf = "{self.token.conf}"']
        lines += ["[audit]", 'directory = "audit"', 'checkpoint_interval = "500ms"']
        path = self.directory / "signer.toml"
        path.write_text("\n".join(lines) + "\n")
        return path

    @contextmanager
    def running(self, *, initialised: bool = True) -> Iterator[KeyServerRig]:
        with self.process:
            self.process.start_ready()
            if initialised and not (self.state / "svid.pem").exists():
                self.install_svid()
            yield self

    @contextmanager
    def local(self) -> Iterator[Stubs]:
        """The operator, through the admin socket."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"unix:{self.admin_socket}", options=options) as channel:
            yield Stubs(channel)

    @contextmanager
    def caller(self, svid: Svid | None, *, bundle_pem: bytes | None = None) -> Iterator[Stubs]:
        """Whoever holds this SVID; None: a client without a certificate."""
        roots = bundle_pem or self.pki.bundle_pem
        credentials = grpc.ssl_channel_credentials(
            roots, svid.key_pem if svid else None, svid.chain_pem if svid else None
        )
        options: list[tuple[str, Any]] = [
            ("grpc.ssl_target_name_override", tls_name(self.spiffe_id)),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.min_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 200),
        ]
        with grpc.secure_channel(f"127.0.0.1:{self.port}", credentials, options=options) as channel:
            yield Stubs(channel)

    def install_svid(self, **options: Any) -> None:
        """What `keyreeve init` does: CSR, certificate, installation."""
        with self.local() as local:
            csr = local.identity.GetCsr(keyserver_pb2.GetCsrRequest(spiffe_id=self.spiffe_id), timeout=20).csr_der
            chain = self.pki.svid_for_csr(csr, self.spiffe_id, **options)
            local.identity.InstallSvid(self.install_request(chain), timeout=20)

    def install_request(self, chain_der: list[bytes]) -> keyserver_pb2.InstallSvidRequest:
        bundle = types_pb2.Bundle(trust_domain=self.pki.trust_domain, x509_authorities_der=self.pki.bundle_der)
        return keyserver_pb2.InstallSvidRequest(chain_der=chain_der, bundle=bundle)

    def create_key(self, request_id: str = "r1", **changes: Any) -> keyserver_pb2.Key:
        with self.local() as local:
            return local.keys.CreateKey(create_request(request_id, **changes), timeout=60)

    def grant(
        self,
        key_id: str,
        holder: str,
        *,
        expires_at: Timestamp | None = None,
        purposes: Sequence[types_pb2.Purpose.ValueType] = (types_pb2.PURPOSE_TLS13_SERVER_VERIFY,),
    ) -> keyserver_pb2.Grant:
        request = keyserver_pb2.CreateGrantRequest(
            key_id=key_id, holder=holder, purposes=purposes, expires_at=expires_at
        )
        with self.local() as local:
            return local.grants.CreateGrant(request, timeout=20)

    def revoke(self, key_id: str, holder: str) -> None:
        with self.local() as local:
            local.grants.RevokeGrant(keyserver_pb2.RevokeGrantRequest(key_id=key_id, holder=holder), timeout=20)

    def pids(self) -> tuple[int, int]:
        """Signer and front end of the newest generation."""
        started = self.process.events_named("started")[-1]
        return int(started["signer_pid"]), int(started["front_end_pid"])


def create_request(request_id: str, **changes: Any) -> keyserver_pb2.CreateKeyRequest:
    fields = {
        "key_type": types_pb2.KEY_TYPE_EC_P256,
        "role": keyserver_pb2.KEY_ROLE_HANDSHAKE,
        "purposes": [types_pb2.PURPOSE_TLS13_SERVER_VERIFY, types_pb2.PURPOSE_TLS13_CLIENT_VERIFY],
        "label": "spiffe://example.org/web",
        **changes,
    }
    return keyserver_pb2.CreateKeyRequest(request_id=request_id, **fields)
