"""A test PKI: a root, an issuing authority, and SVIDs good and bad. Independent of Keyreeve's own building of certificates."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

BACKDATE = timedelta(minutes=1)
DAY = timedelta(days=1)


def tls_name(spiffe_id: str) -> str:
    """The DNS name of a SPIFFE ID, worked out apart from keyreeve_common so that tests notice a change."""
    return f"id-{sha256(spiffe_id.encode()).hexdigest()[:40]}.keyreeve.invalid"


@dataclass(frozen=True)
class Svid:
    """A certificate chain (leaf first) and its key."""

    spiffe_id: str
    chain: tuple[x509.Certificate, ...]
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def chain_pem(self) -> bytes:
        return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in self.chain)

    @property
    def chain_der(self) -> list[bytes]:
        return [certificate.public_bytes(Encoding.DER) for certificate in self.chain]

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def write(self, directory: Path, stem: str = "svid") -> tuple[Path, Path]:
        """Writes chain and key; their paths."""
        chain, key = directory / f"{stem}.pem", directory / f"{stem}.key"
        chain.write_bytes(self.chain_pem)
        key.touch(mode=0o600)
        key.write_bytes(self.key_pem)
        return chain, key


class TestPki:
    """One trust domain with a root and one issuing authority (P-256); `lives` bounds both, before and after now."""

    __test__ = False

    def __init__(
        self, trust_domain: str = "example.org", *, lives: tuple[timedelta, timedelta] = (DAY, 30 * DAY)
    ) -> None:
        self.trust_domain = trust_domain
        self._lives = lives
        self.root_key = ec.generate_private_key(ec.SECP256R1())
        self.issuing_key = ec.generate_private_key(ec.SECP256R1())
        self._root_name = _name(f"{trust_domain} root")
        self._issuing_name = _name(f"{trust_domain} issuing")
        self.root = self._authority(self._root_name, self._root_name, self.root_key, self.root_key, path_length=None)
        self.issuing = self._authority(
            self._issuing_name, self._root_name, self.issuing_key, self.root_key, path_length=0
        )

    @property
    def bundle_pem(self) -> bytes:
        return self.root.public_bytes(Encoding.PEM)

    @property
    def bundle_der(self) -> list[bytes]:
        return [self.root.public_bytes(Encoding.DER)]

    def spiffe_id(self, path: str) -> str:
        return f"spiffe://{self.trust_domain}/{path.lstrip('/')}"

    def svid(
        self,
        path: str,
        *,
        key: ec.EllipticCurvePrivateKey | None = None,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
        dns_names: tuple[str, ...] = (),
        spiffe_id: str | None = None,
    ) -> Svid:
        """An SVID, good unless told otherwise; `spiffe_id` overrides the name (for one of a foreign trust domain)."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        spiffe_id = spiffe_id or self.spiffe_id(path)
        leaf = self.leaf(
            spiffe_id, key.public_key(), not_before=not_before, not_after=not_after, dns_names=dns_names, ca=False
        )
        return Svid(spiffe_id, (leaf, self.issuing), key)

    def expired_svid(self, path: str) -> Svid:
        now = datetime.now(UTC)
        return self.svid(path, not_before=now - timedelta(hours=2), not_after=now - timedelta(hours=1))

    def ca_leaf(self, path: str) -> Svid:
        """A certificate with a SPIFFE ID that is a CA certificate: never an SVID (X5-17)."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.leaf(self.spiffe_id(path), key.public_key(), ca=True, signer="root")
        return Svid(self.spiffe_id(path), (certificate,), key)

    def svid_for_csr(
        self, csr_der: bytes, spiffe_id: str, *, not_before: datetime | None = None, not_after: datetime | None = None
    ) -> list[bytes]:
        """The chain (DER, leaf first) that answers a CSR, with `spiffe_id` whatever the CSR says."""
        csr = x509.load_der_x509_csr(csr_der)
        if not csr.is_signature_valid:
            raise AssertionError("CSR is not signed by its own key")
        leaf = self.leaf(spiffe_id, csr.public_key(), not_before=not_before, not_after=not_after, ca=False)
        return [leaf.public_bytes(Encoding.DER), self.issuing.public_bytes(Encoding.DER)]

    def leaf(
        self,
        spiffe_id: str,
        public_key: CertificatePublicKeyTypes,
        *,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
        dns_names: tuple[str, ...] = (),
        ca: bool,
        signer: str = "issuing",
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        issuer_key, issuer_name = {
            "issuing": (self.issuing_key, self._issuing_name),
            "root": (self.root_key, self._root_name),
        }[signer]
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(spiffe_id)]
        names += [x509.DNSName(name) for name in (tls_name(spiffe_id), *dns_names)]
        builder = (
            _builder(_name("leaf"), issuer_name, public_key, not_before or now - BACKDATE, not_after)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(_key_usage(ca=ca, sign=True), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        )
        return builder.sign(issuer_key, SHA256())

    def _authority(
        self,
        name: x509.Name,
        issuer: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        issuer_key: ec.EllipticCurvePrivateKey,
        *,
        path_length: int | None,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        trust_domain_id = x509.UniformResourceIdentifier(f"spiffe://{self.trust_domain}")
        builder = (
            _builder(name, issuer, key.public_key(), now - self._lives[0], now + self._lives[1])
            .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
            .add_extension(_key_usage(ca=True, sign=False), critical=True)
            .add_extension(x509.SubjectAlternativeName([trust_domain_id]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        )
        return builder.sign(issuer_key, SHA256())


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: CertificatePublicKeyTypes,
    not_before: datetime,
    not_after: datetime | None,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after or datetime.now(UTC) + timedelta(hours=1))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, ca: bool, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
