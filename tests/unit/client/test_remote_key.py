from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from keyreeve_client.remote_key import RemoteSigner, certificate_hash, make_remote_key
from keyreeve_common.errors import Internal, KeyTypeNotSupported, SchemeNotSupported
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import HASHES, KeyFamily, SignatureScheme, key_type_of
from keyreeve_common.verification import rsa_padding

LOCAL_KEYS: dict[str, Any] = {
    "ec-p256": ec.generate_private_key(ec.SECP256R1()),
    "ec-p384": ec.generate_private_key(ec.SECP384R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate(),
    "rsa-2048": rsa.generate_private_key(65537, 2048),
}
NOW = datetime(2026, 1, 1, tzinfo=UTC)
NAME = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])


def signing(local: Any, seen: list[tuple[SignatureScheme, Purpose, bytes]]) -> Callable[..., bytes]:
    def sign(key_id: str, scheme: SignatureScheme, purpose: Purpose, message: bytes) -> bytes:
        seen.append((scheme, purpose, message))
        facts = scheme.facts
        if facts.family is KeyFamily.ED25519:
            return bytes(local.sign(message))
        chosen = HASHES[facts.hash_name]()
        if facts.family is KeyFamily.RSA:
            return bytes(local.sign(message, rsa_padding(scheme), chosen))
        return bytes(local.sign(message, ec.ECDSA(chosen)))

    return sign


def spki(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def remote(kind: str, seen: list[Any] | None = None) -> Any:
    local = LOCAL_KEYS[kind]
    signer = RemoteSigner("key-1", Purpose.X509_CERTIFICATE, signing(local, [] if seen is None else seen))
    return make_remote_key(spki(local), signer)


@pytest.mark.parametrize("kind", LOCAL_KEYS)
def test_certificate_builder_signs_the_whole_tbs_through_it(kind: str) -> None:
    seen: list[Any] = []
    key = remote(kind, seen)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(NAME)
        .issuer_name(NAME)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
        .sign(key, certificate_hash(key_type_of(key.public_key())))
    )
    certificate.verify_directly_issued_by(certificate)
    assert [(purpose, message) for _, purpose, message in seen] == [
        (Purpose.X509_CERTIFICATE, certificate.tbs_certificate_bytes)
    ]


@pytest.mark.parametrize("kind", LOCAL_KEYS)
def test_csr_builder_signs_through_it(kind: str) -> None:
    key = remote(kind)
    builder = x509.CertificateSigningRequestBuilder().subject_name(NAME)
    assert builder.sign(key, certificate_hash(key_type_of(key.public_key()))).is_signature_valid


def test_rsa_pss_with_the_digest_as_salt() -> None:
    seen: list[Any] = []
    key = remote("rsa-2048", seen)
    for salt in (32, padding.PSS.DIGEST_LENGTH):
        key.sign(b"m", padding.PSS(padding.MGF1(hashes.SHA256()), salt), hashes.SHA256())
    assert {scheme for scheme, _, _ in seen} == {SignatureScheme.RSA_PSS_RSAE_SHA256}


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("ec-p256", (ec.ECDSA(utils.Prehashed(hashes.SHA256())),)),
        ("ec-p256", (ec.ECDSA(hashes.SHA384()),)),
        ("ec-p384", (ec.ECDSA(hashes.SHA1()),)),  # noqa: S303 - refused, that is the test
        ("rsa-2048", (padding.PKCS1v15(), utils.Prehashed(hashes.SHA256()))),
        ("rsa-2048", (padding.PKCS1v15(), utils.NoDigestInfo())),
        ("rsa-2048", (padding.PKCS1v15(), hashes.SHA1())),  # noqa: S303 - refused, that is the test
        ("rsa-2048", (padding.PSS(padding.MGF1(hashes.SHA256()), 20), hashes.SHA256())),
        ("rsa-2048", (padding.PSS(padding.MGF1(hashes.SHA1()), 32), hashes.SHA256())),  # noqa: S303 - refused, that is the test
        ("rsa-2048", (padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH), hashes.SHA256())),
    ],
)
def test_digests_and_odd_schemes_never_leave(kind: str, arguments: tuple[Any, ...]) -> None:
    seen: list[Any] = []
    with pytest.raises(SchemeNotSupported):
        remote(kind, seen).sign(b"m" * 32, *arguments)
    assert not seen


@pytest.mark.parametrize("kind", LOCAL_KEYS)
def test_private_half_is_not_here(kind: str) -> None:
    key = remote(kind)
    with pytest.raises(UnsupportedAlgorithm):
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for name, arguments in (
        ("private_numbers", ()),
        ("private_bytes_raw", ()),
        ("exchange", (ec.ECDH(), key.public_key())),
        ("decrypt", (b"", padding.PKCS1v15())),
    ):
        if hasattr(key, name):
            with pytest.raises(UnsupportedAlgorithm):
                getattr(key, name)(*arguments)
    assert copy.copy(key) is key
    assert copy.deepcopy(key) is key


def test_wrong_signature_is_not_released() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    signer = RemoteSigner("key-1", Purpose.X509_CERTIFICATE, signing(other, []))
    key: Any = make_remote_key(spki(LOCAL_KEYS["ec-p256"]), signer)
    with pytest.raises(Internal):
        key.sign(b"m", ec.ECDSA(hashes.SHA256()))


def test_unusable_public_keys() -> None:
    signer = RemoteSigner("key-1", Purpose.X509_CERTIFICATE, signing(None, []))
    for bad in (
        b"nonsense",
        spki(ec.generate_private_key(ec.SECP521R1())),
        spki(rsa.generate_private_key(65537, 1024)),  # noqa: S505 - refused, that is the test
    ):
        with pytest.raises(KeyTypeNotSupported):
            make_remote_key(bad, signer)
