"""The front end's own TLS identity: a P-256 key that never leaves its directory, and the SVID and bundle that others install.

Files in the state directory: tls-key.pem (0600), svid.pem (leaf first), bundle.pem, spiffe-id (the one that the last CSR was for). The bundle is
written before the chain: a crash between them leaves the old chain under a bundle that still holds its authority.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from keyreeve_common.errors import ConfigInvalid, FailedPrecondition, InvalidRequest, KeyreeveError, SvidInvalid
from keyreeve_common.files import read_secret, write_atomic
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.telemetry import log, log_warning
from keyreeve_common.x509_svid import X509Svid, load_chain_der, load_chain_pem, tls_name_of, to_pem, verify_chain

FOLLOW_S = 1.0


@dataclass(frozen=True, slots=True)
class Installed:
    """One generation of the identity, as the TLS listener uses it."""

    svid: X509Svid
    configuration: grpc.ServerCertificateConfiguration


class TlsIdentity:
    def __init__(
        self, directory: Path, *, trust_domain: TrustDomain, spiffe_id: SpiffeId | None, clock: Callable[[], datetime]
    ) -> None:
        self._directory = directory
        self._trust_domain = trust_domain
        self._configured_id = spiffe_id
        self._clock = clock
        self._key_pem = self._load_or_make_key()
        self.installed: Installed | None = None
        self._seen: tuple[int, int] | None = None

    def load(self) -> None:
        """Takes up what was installed before; what is missing, expired or foreign is logged, and waits for a new SVID."""
        self._seen = self._mark()
        chain_file, bundle_file = self._directory / "svid.pem", self._directory / "bundle.pem"
        if not chain_file.exists() or not bundle_file.exists():
            return
        try:
            chain, authorities = load_chain_pem(chain_file.read_bytes()), load_chain_pem(bundle_file.read_bytes())
            # What the last CSR was for counts only when its certificate comes: it was asked after this one was installed.
            self._use(self._verified(chain, authorities, expected=self._configured_id))
        except KeyreeveError as error:
            log_warning("installed_svid_not_usable", code=error.code.value, detail=error.detail)
        except OSError as error:
            raise ConfigInvalid(
                f"{self._directory}: svid.pem or bundle.pem cannot be read: {error.strerror}"
            ) from error

    async def follow(self, on_installed: Callable[[], Awaitable[None]]) -> None:
        """Takes up what another front end on the same directory installs: certificates come to one of them."""
        told = ""
        while True:
            await asyncio.sleep(FOLLOW_S)
            if await asyncio.to_thread(self._mark) == self._seen:
                continue
            before = self.installed
            try:
                await asyncio.to_thread(self.load)
                if self.installed is not before:
                    await on_installed()
                told = ""
            except KeyreeveError as error:
                self._seen = None  # once more, until somebody has mended it
                if error.detail != told:
                    told = error.detail
                    log_warning("installed_svid_not_usable", code=error.code.value, detail=told)

    def _mark(self) -> tuple[int, int] | None:
        """Changes with each installation: a file that is written whole gets a new inode."""
        try:
            status = (self._directory / "svid.pem").stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def build_csr(self, asked: str) -> bytes:
        """A CSR (DER) for `asked`, or for the configured SPIFFE ID when that is empty. Raises: InvalidRequest, FailedPrecondition."""
        spiffe_id = self._id_for_csr(asked)
        names = [x509.UniformResourceIdentifier(str(spiffe_id)), x509.DNSName(tls_name_of(spiffe_id))]
        csr = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([]))
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .sign(self._key(), SHA256())
        )
        write_atomic(self._directory / "spiffe-id", f"{spiffe_id}\n".encode("ascii"))
        return csr.public_bytes(Encoding.DER)

    def install(self, chain_der: Sequence[bytes], trust_domain: str, authorities_der: Sequence[bytes]) -> X509Svid:
        """Verifies, writes, and takes into use. Raises: SvidInvalid, SvidExpired, ForeignTrustDomain, InvalidRequest, StorageFull."""
        if trust_domain != self._trust_domain.name:
            raise InvalidRequest(f"bundle is not of trust domain {self._trust_domain}, the one of this key server")
        chain, authorities = load_chain_der(chain_der), load_chain_der(authorities_der)
        installed = self._verified(chain, authorities, expected=self._expected_id())
        write_atomic(self._directory / "bundle.pem", to_pem(authorities))
        write_atomic(self._directory / "svid.pem", to_pem(chain))
        self._seen = self._mark()
        self._use(installed)
        return installed.svid

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """For gRPC, which asks at each new connection. Raises: FailedPrecondition while nothing is installed."""
        if self.installed is None:
            raise FailedPrecondition("no SVID is installed; run: keyreeve init")
        return self.installed.configuration

    def _use(self, installed: Installed) -> None:
        self.installed = installed
        svid = installed.svid
        log("svid_in_use", spiffe_id=str(svid.spiffe_id), serial=svid.serial, not_after=svid.not_after.isoformat())

    def _verified(
        self,
        chain: Sequence[x509.Certificate],
        authorities: Sequence[x509.Certificate],
        *,
        expected: SpiffeId | None,
    ) -> Installed:
        svid = verify_chain(chain, trust_domain=self._trust_domain, authorities=authorities, now=self._clock())
        if _spki(svid.certificate.public_key()) != _spki(self._key().public_key()):
            raise SvidInvalid("the SVID is not of this key server's key; ask for a CSR with GetCsr and certify that")
        if expected is not None and svid.spiffe_id != expected:
            raise SvidInvalid(f"the SVID is of {svid.spiffe_id}, expected is {expected}")
        pair = (self._key_pem, to_pem(chain))
        return Installed(svid, grpc.ssl_server_certificate_configuration([pair], to_pem(authorities)))

    def _id_for_csr(self, asked: str) -> SpiffeId:
        known = self._expected_id()
        if not asked:
            if known is None:
                raise InvalidRequest("spiffe_id: is missing, and spiffe_id is not configured either")
            return known
        spiffe_id = SpiffeId.parse(asked)
        if not spiffe_id.member_of(self._trust_domain) or spiffe_id.is_trust_domain_id:
            raise InvalidRequest(f"spiffe_id: is not a SPIFFE ID with a path in trust domain {self._trust_domain}")
        if self._configured_id is not None and spiffe_id != self._configured_id:
            raise FailedPrecondition(f"this key server is configured as {self._configured_id}")
        return spiffe_id

    def _expected_id(self) -> SpiffeId | None:
        if self._configured_id is not None:
            return self._configured_id
        try:
            return SpiffeId.parse((self._directory / "spiffe-id").read_text(encoding="ascii").strip())
        except FileNotFoundError:
            return None

    def _key(self) -> ec.EllipticCurvePrivateKey:
        key = load_pem_private_key(self._key_pem, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigInvalid(
                f"{self._directory / 'tls-key.pem'}: is not an EC key; remove it and run: keyreeve init"
            )
        return key

    def _load_or_make_key(self) -> bytes:
        path = self._directory / "tls-key.pem"
        if not path.exists():
            made = ec.generate_private_key(ec.SECP256R1())
            write_atomic(path, made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
        pem = read_secret(path) + b"\n"
        try:
            load_pem_private_key(pem, None)
        except (ValueError, TypeError):
            raise ConfigInvalid(f"{path}: is not a PEM key; remove it and run: keyreeve init") from None
        return pem


def _spki(key: object) -> bytes:
    public_bytes: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]
    return public_bytes
