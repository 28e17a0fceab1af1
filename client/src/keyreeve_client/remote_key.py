"""Private keys whose private half is elsewhere: subclasses of cryptography's key classes, so that its builders accept them.

`sign()` sends the whole message with the key's purpose and verifies what comes back; a digest is never sent, so `Prehashed` is refused. The
call blocks: build from a worker thread. Whatever would show or use the private half in another way raises UnsupportedAlgorithm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.serialization import load_der_public_key
from cryptography.utils import Buffer
from keyreeve_common.errors import KeyTypeNotSupported, SchemeNotSupported
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import HASHES, REGISTRY, KeyFamily, KeyType, Padding, SignatureScheme, key_type_of
from keyreeve_common.verification import verify_signature

SignFunction: TypeAlias = Callable[[str, SignatureScheme, Purpose, bytes], bytes]
"""(key id, scheme, purpose, whole message) to signature; raises KeyreeveError."""

_BY_RSA_HASH = {
    (facts.hash_name, facts.padding): scheme for scheme, facts in REGISTRY.items() if facts.family is KeyFamily.RSA
}
_BY_EC_HASH: dict[tuple[KeyFamily, str], SignatureScheme] = {
    (facts.family, facts.hash_name): scheme
    for scheme, facts in REGISTRY.items()
    if facts.family in (KeyFamily.EC_P256, KeyFamily.EC_P384)
}


class Signer(Protocol):
    """Who gives the signatures of a key object."""

    def signature(self, public_key: Any, scheme: SignatureScheme, message: bytes) -> bytes: ...


@dataclass(frozen=True, slots=True)
class RemoteSigner:
    """What a remote key knows: its name, what it is used for here, and how to reach it."""

    key_id: str
    purpose: Purpose
    sign: SignFunction

    def signature(self, public_key: Any, scheme: SignatureScheme, message: bytes) -> bytes:
        signature = self.sign(self.key_id, scheme, self.purpose, message)
        verify_signature(public_key, scheme, message, signature=signature)
        return signature


def _not_here(*_: object, **__: object) -> NoReturn:
    raise UnsupportedAlgorithm("the private key is in the key cluster and never leaves it")


class RemoteEcKey(ec.EllipticCurvePrivateKey):
    """An EC P-256 or P-384 key in the key cluster."""

    def __init__(self, public_key: ec.EllipticCurvePublicKey, signer: Signer) -> None:
        self._public_key = public_key
        self._signer = signer
        self._family = key_type_of(public_key).family

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._public_key

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._public_key.curve

    @property
    def key_size(self) -> int:
        return self._public_key.key_size

    def sign(self, data: Buffer, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        algorithm = signature_algorithm.algorithm
        if isinstance(algorithm, utils.Prehashed):
            raise SchemeNotSupported("a remote key signs whole messages, never digests")
        scheme = _BY_EC_HASH.get((self._family, _hash_name(algorithm)))
        if scheme is None:
            raise SchemeNotSupported(f"{self.curve.name} does not sign with {algorithm.name}")
        return self._signer.signature(self._public_key, scheme, bytes(data))

    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> bytes:
        _not_here()

    def private_numbers(self) -> ec.EllipticCurvePrivateNumbers:
        _not_here()

    def private_bytes(self, encoding: Any, format: Any, encryption_algorithm: Any) -> bytes:
        _not_here()

    def __copy__(self) -> RemoteEcKey:
        return self

    def __deepcopy__(self, memo: dict[Any, Any]) -> RemoteEcKey:
        return self


class RemoteRsaKey(rsa.RSAPrivateKey):
    """An RSA key in the key cluster. It signs and does nothing else."""

    def __init__(self, public_key: rsa.RSAPublicKey, signer: Signer) -> None:
        self._public_key = public_key
        self._signer = signer

    def public_key(self) -> rsa.RSAPublicKey:
        return self._public_key

    @property
    def key_size(self) -> int:
        return self._public_key.key_size

    def sign(self, data: bytes, padding: Any, algorithm: Any) -> bytes:
        if not isinstance(algorithm, hashes.HashAlgorithm):
            raise SchemeNotSupported("a remote key signs whole messages, never digests")
        scheme = _BY_RSA_HASH.get((_hash_name(algorithm), _padding_kind(padding, algorithm)))
        if scheme is None:
            raise SchemeNotSupported(f"RSA does not sign with {algorithm.name} here")
        return self._signer.signature(self._public_key, scheme, bytes(data))

    def decrypt(self, ciphertext: bytes, padding: padding.AsymmetricPadding) -> bytes:
        _not_here()

    def private_numbers(self) -> rsa.RSAPrivateNumbers:
        _not_here()

    def private_bytes(self, encoding: Any, format: Any, encryption_algorithm: Any) -> bytes:
        _not_here()

    def __copy__(self) -> RemoteRsaKey:
        return self

    def __deepcopy__(self, memo: dict[Any, Any]) -> RemoteRsaKey:
        return self


class RemoteEd25519Key(ed25519.Ed25519PrivateKey):
    """An Ed25519 key in the key cluster."""

    def __init__(self, public_key: ed25519.Ed25519PublicKey, signer: Signer) -> None:
        self._public_key = public_key
        self._signer = signer

    def public_key(self) -> ed25519.Ed25519PublicKey:
        return self._public_key

    def sign(self, data: Buffer) -> bytes:
        return self._signer.signature(self._public_key, SignatureScheme.ED25519, bytes(data))

    def private_bytes(self, encoding: Any, format: Any, encryption_algorithm: Any) -> bytes:
        _not_here()

    def private_bytes_raw(self) -> bytes:
        _not_here()

    def __copy__(self) -> RemoteEd25519Key:
        return self

    def __deepcopy__(self, memo: dict[Any, Any]) -> RemoteEd25519Key:
        return self


RemoteKey: TypeAlias = RemoteEcKey | RemoteRsaKey | RemoteEd25519Key


def make_remote_key(spki_der: bytes, signer: Signer) -> RemoteKey:
    """The remote key with this public half. Raises: KeyTypeNotSupported."""
    try:
        public_key = load_der_public_key(spki_der)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyTypeNotSupported("public key is not a SubjectPublicKeyInfo that can be read") from error
    return remote_key_of(public_key, signer)


def remote_key_of(public_key: Any, signer: Signer) -> RemoteKey:
    """The remote key with this public half. Raises: KeyTypeNotSupported."""
    key_type_of(public_key)
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        return RemoteEcKey(public_key, signer)
    if isinstance(public_key, rsa.RSAPublicKey):
        return RemoteRsaKey(public_key, signer)
    assert isinstance(public_key, ed25519.Ed25519PublicKey)  # noqa: S101 - key_type_of knows no fourth kind
    return RemoteEd25519Key(public_key, signer)


def certificate_hash(key_type: KeyType) -> hashes.SHA256 | hashes.SHA384 | None:
    """The hash to give `CertificateBuilder.sign` for an issuer of this type; RSA issuers sign PKCS#1 v1.5, which every verifier knows."""
    match key_type.family:
        case KeyFamily.ED25519:
            return None
        case KeyFamily.EC_P384:
            return hashes.SHA384()
        case _:
            return hashes.SHA256()


def _hash_name(algorithm: Any) -> str:
    return next((name for name, kind in HASHES.items() if isinstance(algorithm, kind)), "")


def _padding_kind(value: Any, algorithm: hashes.HashAlgorithm) -> Padding:
    """PSS only as TLS and our profiles have it: MGF1 with the same hash, salt as long as the digest. Spec: RFC 8446 4.2.3."""
    if isinstance(value, padding.PKCS1v15):
        return Padding.PKCS1_V15
    if isinstance(value, padding.PSS):
        digest_lengths = (algorithm.digest_size, padding.PSS.DIGEST_LENGTH)
        # cryptography has no public names for these two attributes of the object that its caller made
        same_hash = value.mgf._algorithm.name == algorithm.name
        if same_hash and value._salt_length in digest_lengths:
            return Padding.PSS
    return Padding.NONE
