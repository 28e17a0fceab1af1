"""The services' own SVIDs: the CA's, whose key is a file on its host, and the key servers', whose keys are theirs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from keyreeve_client.channel import SvidFiles
from keyreeve_common.errors import KeyreeveError, SvidInvalid
from keyreeve_common.files import write_atomic
from keyreeve_common.identity import SpiffeId
from keyreeve_common.telemetry import log
from keyreeve_common.x509_svid import X509Svid, load_chain_pem, to_pem, verify_chain

from keyreeve_ca.domain.attestation import public_key_of_csr
from keyreeve_ca.domain.records import SvidRecord, digest_of
from keyreeve_ca.issuance_service import issue_x509_svid
from keyreeve_ca.ports import KeyServerIdentity
from keyreeve_ca.service import Ca, SvidOrder, current_bundle


@dataclass(frozen=True)
class OwnSvid:
    """The CA's own SVID in its files."""

    ca: Ca
    files: SvidFiles

    def read(self) -> X509Svid:
        """The SVID in the files, verified to the current bundle. Raises: FailedPrecondition, SvidInvalid, SvidExpired."""
        identity = self.files.read()
        if identity.chain_pem is None:
            raise SvidInvalid("file holds no certificate")
        svid = verify_chain(
            load_chain_pem(identity.chain_pem),
            trust_domain=self.ca.policy.trust_domain,
            authorities=current_bundle(self.ca).authorities,
            now=self.ca.clock(),
        )
        if svid.spiffe_id != self.ca.policy.ca_id:
            raise SvidInvalid(f"SVID is of {svid.spiffe_id}, expected is {self.ca.policy.ca_id}")
        return svid

    def renew(self) -> X509Svid:
        """A fresh key and SVID; the key never leaves this host and its file is 0600."""
        key = ec.generate_private_key(ec.SECP256R1())
        record = issue_service_svid(self.ca, self.ca.policy.ca_id, key.public_key())
        chain = [x509.load_der_x509_certificate(der) for der in record.chain_der]
        key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self.write_bundle()
        write_atomic(self.files.key, key_pem + to_pem(chain), mode=0o600)
        log("own_svid_renewed", serial=record.serial, not_after=record.not_after.isoformat())
        return self.read()

    def write_bundle(self) -> None:
        write_atomic(self.files.bundle, current_bundle(self.ca).to_pem())

    def is_due(self) -> bool:
        """Whether half its life is over, or it cannot be used."""
        try:
            return self.ca.clock() >= self.read().half_life
        except KeyreeveError:
            return True


def issue_service_svid(ca: Ca, spiffe_id: SpiffeId, public_key: object, *, subject: str = "") -> SvidRecord:
    order = SvidOrder(
        profile=ca.policy.service,
        spiffe_id=spiffe_id,
        public_key=public_key,  # type: ignore[arg-type]  # of a key made here, or checked by public_key_of_csr
        subject=subject or f"service-{digest_of(spiffe_id)}",
    )
    return issue_x509_svid(ca, order)


def certify_key_server(ca: Ca, server: KeyServerIdentity, spiffe_id: SpiffeId) -> datetime:
    """GetCsr, issue, InstallSvid; when the new SVID ends."""
    public_key = public_key_of_csr(server.get_csr(spiffe_id))
    record = issue_service_svid(ca, spiffe_id, public_key, subject=f"server-{digest_of(spiffe_id, server.name)}")
    not_after = server.install_svid(record.chain_der, current_bundle(ca))
    log("key_server_certified", key_server=server.name, serial=record.serial, not_after=not_after.isoformat())
    return not_after


def key_server_is_due(ca: Ca, server: KeyServerIdentity, life: timedelta) -> bool:
    """Whether less than half of the usual life is left. Raises: Unavailable."""
    not_after = server.check_health().svid_not_after
    return not_after is None or ca.clock() >= not_after - life / 2
