"""The trust domain of one benchmark: one authority in memory, SVIDs for the key server and for the agents that load it.

It stands in for the CA's ceremony, so that a key server alone can be measured. Keys of agents are files of mode 0600 in the benchmark's folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from keyreeve_client.channel import SvidFiles
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.x509_svid import tls_name_of

_BACKDATE, _LIFE = timedelta(minutes=5), timedelta(hours=12)


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@dataclass(frozen=True, slots=True)
class BenchPki:
    trust_domain: TrustDomain
    key: ec.EllipticCurvePrivateKey = field(default_factory=_new_key, repr=False)

    @property
    def authority(self) -> x509.Certificate:
        """Self-signed, the only one in the bundle."""
        name = x509.UniformResourceIdentifier(f"spiffe://{self.trust_domain.name}")
        return (
            self._builder(self.key.public_key(), "keyreeve bench authority")
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(ca=True), critical=True)
            .add_extension(x509.SubjectAlternativeName([name]), critical=False)
            .sign(self.key, SHA256())
        )

    def svid(self, spiffe_id: SpiffeId, public_key: CertificatePublicKeyTypes) -> x509.Certificate:
        """A leaf for client and server use. Spec: X509-SVID 4."""
        names = [x509.UniformResourceIdentifier(str(spiffe_id)), x509.DNSName(tls_name_of(spiffe_id))]
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return (
            self._builder(public_key, "keyreeve bench")
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(issuer, critical=False)
            .sign(self.key, SHA256())
        )

    def write_agent(self, directory: Path, spiffe_id: SpiffeId) -> SvidFiles:
        """Key, chain and bundle of an agent as files in `directory`, which is created."""
        directory.mkdir(mode=0o700)
        files = SvidFiles(directory / "key.pem", directory / "chain.pem", directory / "bundle.pem")
        key = _new_key()
        files.key.touch(mode=0o600)
        files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        files.chain.write_bytes(self.svid(spiffe_id, key.public_key()).public_bytes(Encoding.PEM))
        files.bundle.write_bytes(self.authority.public_bytes(Encoding.PEM))
        return files

    @staticmethod
    def _builder(public_key: CertificatePublicKeyTypes, subject: str) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(_name(subject))
            .issuer_name(_name("keyreeve bench authority"))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATE)
            .not_valid_after(now + _LIFE)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
