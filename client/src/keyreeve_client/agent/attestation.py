"""The node's own identity: attested once with a join token, kept in the state directory, renewed at half life with a fresh key.

An agent whose SVID expired, or that was evicted, needs a new join token; it looks for one in join_token_file before each attempt.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from keyreeve_common.errors import (
    AttestationFailed,
    ConfigInvalid,
    DeadlineExceeded,
    FailedPrecondition,
    KeyreeveError,
    NotFound,
    PermissionDenied,
    RateLimited,
    SvidInvalid,
    Unauthenticated,
    Unavailable,
)
from keyreeve_common.files import read_secret, write_atomic
from keyreeve_common.grpc_edge import error_from_rpc
from keyreeve_common.telemetry import log, log_error, log_warning
from keyreeve_common.v1 import ca_pb2, ca_pb2_grpc
from keyreeve_common.x509_svid import X509Svid, load_chain_der, load_chain_pem, to_pem, verify_chain

from keyreeve_client.agent.assignments import Clock, parse_bundle, utc_now
from keyreeve_client.agent.backoff import Backoff
from keyreeve_client.agent.config import AgentConfig
from keyreeve_client.agent.state_dir import StateDir
from keyreeve_client.channel import ReloadingChannel, SvidFiles, TlsIdentity, open_channel

VERSION = "0.1.0"
REFUSALS = (
    Unauthenticated,
    PermissionDenied,
    NotFound,
)  # the CA does not know this agent any more; waiting will not help
NEW_TOKEN = "a new join token is needed: run `keyreeve token create` and put the token into join_token_file"  # noqa: S105
_RPC_TIMEOUT = 15.0
_LONGEST_NAP = 60.0


@dataclass
class NodeIdentity:
    """The agent's SVID; `svid` is there once `establish` has returned."""

    config: AgentConfig
    state: StateDir
    clock: Clock = utc_now
    on_change: Callable[[], None] = lambda: None
    on_renewed: Callable[[], None] = lambda: None
    current: X509Svid | None = None
    refusal: KeyreeveError | None = None
    _obtained: datetime | None = None
    _random: random.Random = field(default_factory=random.SystemRandom)

    @property
    def svid(self) -> X509Svid:
        if self.current is None:
            raise FailedPrecondition("agent is not attested yet")
        return self.current

    def files(self) -> SvidFiles:
        return SvidFiles(key=self.state.svid, chain=self.state.svid, bundle=self.state.bundle)

    def authorities(self) -> list[x509.Certificate]:
        """Raises: SvidInvalid, FailedPrecondition."""
        try:
            return load_chain_pem(self.state.bundle.read_bytes())
        except OSError as error:
            raise FailedPrecondition(f"{self.state.bundle}: cannot be read: {error.strerror}") from error

    async def establish(self) -> None:
        """Takes up the SVID in the state directory, or attests; waits for a CA that is away.

        Raises: FailedPrecondition when a new join token is needed, AttestationFailed, ConfigInvalid.
        """
        why = self._take_up()
        if why is None:
            log("agent_svid_kept", agent_id=str(self.svid.spiffe_id), not_after=self.svid.not_after.isoformat())
            return
        log_warning("agent_svid_absent", detail=why)
        backoff = Backoff(timedelta(milliseconds=500), timedelta(seconds=30))
        while True:
            if not self._token_is_there():
                raise FailedPrecondition(f"agent has no usable SVID ({why}); {NEW_TOKEN}")
            try:
                await self.attest()
            except REFUSALS as error:
                raise AttestationFailed(f"CA refused the join token: {error.detail}; {NEW_TOKEN}") from error
            except (Unavailable, DeadlineExceeded, RateLimited) as error:
                log_warning("attestation_waits_for_ca", address=self.config.ca.attest_address, detail=error.detail)
            else:
                return
            await asyncio.sleep(backoff.next())

    def _take_up(self) -> str | None:
        """None when the kept SVID serves, else why it does not."""
        try:
            chain = load_chain_pem(self.state.svid.read_bytes())
            self.files().read()
            self.current = verify_chain(
                chain,
                trust_domain=self.config.trust_domain,
                authorities=self.authorities(),
                now=self.clock(),
            )
        except FileNotFoundError:
            return "none was issued since the last boot"
        except (KeyreeveError, OSError) as error:
            return error.detail if isinstance(error, KeyreeveError) else str(error.strerror)
        return None

    def _token_is_there(self) -> bool:
        return self.config.join_token_file is not None and self.config.join_token_file.exists()

    async def attest(self) -> None:
        """Trades the join token for an SVID. Raises: KeyreeveError as the CA said it; Unavailable; SvidInvalid for a wrong answer."""
        path = self.config.join_token_file
        assert path is not None  # noqa: S101 - callers looked
        token = read_secret(path).decode("ascii", errors="replace")
        bundle = self._configured_bundle()
        key = ec.generate_private_key(ec.SECP256R1())
        request = ca_pb2.AttestNodeRequest(
            join_token=ca_pb2.JoinTokenAttestation(token=token), csr_der=_csr(key), agent_version=VERSION
        )
        channel = open_channel(self.config.ca.attest_address, TlsIdentity(to_pem(bundle)), server_id=self.config.ca_id)
        try:
            answer = await _unary(ca_pb2_grpc.NodeAttestationStub(channel).AttestNode, request)
        finally:
            await channel.close()
        authorities = parse_bundle(answer.bundle, self.config.trust_domain) if answer.HasField("bundle") else bundle
        svid = self._checked(answer.chain_der, key, authorities)
        if str(svid.spiffe_id) != answer.spiffe_id:
            raise SvidInvalid(f"CA attested this node as {answer.spiffe_id[:256]!r}, the SVID says {svid.spiffe_id}")
        write_atomic(self.state.bundle, to_pem(authorities))
        self._install(svid, key, list(answer.chain_der))
        log("node_attested", agent_id=str(svid.spiffe_id), not_after=svid.not_after.isoformat())
        try:
            path.unlink()
        except OSError as error:
            log_warning("join_token_kept", path=str(path), detail=error.strerror, reason="it was used and is worthless")

    def _configured_bundle(self) -> list[x509.Certificate]:
        """Raises: ConfigInvalid."""
        path = self.config.bundle_file
        try:
            return load_chain_pem(path.read_bytes())
        except OSError as error:
            raise ConfigInvalid(f"{path}: bundle_file cannot be read: {error.strerror}") from error
        except SvidInvalid as error:
            raise ConfigInvalid(f"{path}: bundle_file {error.detail.removeprefix('file ')}") from error

    async def renew(self, channel: ReloadingChannel) -> None:
        """Raises: KeyreeveError as the CA said it; Unavailable; SvidInvalid for a wrong answer."""
        key = ec.generate_private_key(ec.SECP256R1())
        stub = ca_pb2_grpc.AgentsStub(await channel.current())
        answer = await _unary(stub.RenewAgentSvid, ca_pb2.RenewAgentSvidRequest(csr_der=_csr(key)))
        svid = self._checked(answer.chain_der, key, self.authorities())
        if svid.spiffe_id != self.svid.spiffe_id:
            raise SvidInvalid(f"renewed SVID is of {svid.spiffe_id}, this agent is {self.svid.spiffe_id}")
        self._install(svid, key, list(answer.chain_der))
        log("agent_svid_renewed", agent_id=str(svid.spiffe_id), not_after=svid.not_after.isoformat())

    async def renew_forever(self, channel: ReloadingChannel) -> None:
        backoff = Backoff(timedelta(seconds=1), timedelta(minutes=1))
        while True:
            await self._until_renewal()
            try:
                await self.renew(channel)
                backoff.reset()
                continue
            except KeyreeveError as error:
                log_warning("agent_svid_renewal_failed", code=error.code.value, detail=error.detail)
                if isinstance(error, REFUSALS) or self.clock() >= self.svid.not_after:
                    await self.recover(error)
            await asyncio.sleep(backoff.next())

    async def recover(self, refusal: KeyreeveError) -> None:
        """After the CA refused this agent: attests anew if there is a join token, else says once that one is needed."""
        if not self._token_is_there():
            if self.refusal is None:
                log_error("agent_refused_by_ca", code=refusal.code.value, detail=refusal.detail, what_to_do=NEW_TOKEN)
            self.refusal = refusal
            self.on_change()
            return
        try:
            await self.attest()
        except KeyreeveError as error:
            self.refusal = error
            log_error("attestation_failed", code=error.code.value, detail=error.detail)

    async def _until_renewal(self) -> None:
        """To half life less up to a tenth; for an SVID that came past that, to half of what it had left."""
        svid = self.svid
        due = svid.half_life - (svid.not_after - svid.not_before) * 0.1 * self._random.random()
        if self._obtained is not None and due <= self._obtained:
            due = self._obtained + (svid.not_after - self._obtained) / 2
        while self.clock() < due and self.current is svid:  # noqa: ASYNC110 - the clock may jump, the machine may sleep
            await asyncio.sleep(min(_LONGEST_NAP, max(0.0, (due - self.clock()).total_seconds())))

    def _checked(
        self, chain_der: Any, key: ec.EllipticCurvePrivateKey, authorities: list[x509.Certificate]
    ) -> X509Svid:
        chain = load_chain_der(list(chain_der))
        svid = verify_chain(chain, trust_domain=self.config.trust_domain, authorities=authorities, now=self.clock())
        form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if svid.certificate.public_key().public_bytes(*form) != key.public_key().public_bytes(*form):
            raise SvidInvalid("CA answered with an SVID of another key than the one asked for")
        return svid

    def _install(self, svid: X509Svid, key: ec.EllipticCurvePrivateKey, chain_der: list[bytes]) -> None:
        key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_atomic(self.state.svid, key_pem + to_pem(load_chain_der(chain_der)), mode=0o600)
        self.current, self._obtained, self.refusal = svid, self.clock(), None
        self.on_renewed()


def _csr(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Only its public key counts: the CA decides the name."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, SHA256())
    return request.public_bytes(Encoding.DER)


async def _unary(method: Any, request: object) -> Any:
    try:
        return await method(request, timeout=_RPC_TIMEOUT)
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Unavailable(
            "channel to the CA was closed"
        ) from None  # grpc.aio cancels the calls of a channel that is closed
