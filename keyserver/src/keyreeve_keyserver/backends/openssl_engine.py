"""Signs with `cryptography`, one request at a time: on every processor, and wherever too few wait to fill lanes.

Spec: RFC 8017 (RSA results are verified before release, against faults in CRT), RFC 6979 is not used: OpenSSL takes nonces from the
operating system's generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key
from keyreeve_common.errors import Internal, KeyreeveError, SchemeNotSupported
from keyreeve_common.schemes import KeyFamily, KeyType, SignatureScheme, check_scheme_fits
from keyreeve_common.verification import hash_algorithm, rsa_padding

from keyreeve_keyserver.backends.engines import EngineHealth, Handle, Work
from keyreeve_keyserver.backends.ports import SignatureMismatch, SignOutcome, SignRequest

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
# How many requests one thread takes at a time: no piece takes much over two milliseconds, since that is what work of another type may have
# to wait for.
_PIECES = {
    KeyType.EC_P256: 32,
    KeyType.EC_P384: 8,
    KeyType.ED25519: 32,
    KeyType.RSA_2048: 4,
    KeyType.RSA_3072: 1,
    KeyType.RSA_4096: 1,
}


class OpenSslEngine:
    name = "openssl"

    def supports(self, key_type: KeyType) -> bool:
        return True

    def piece(self, key_type: KeyType, waiting: int) -> int:
        return min(waiting, _PIECES[key_type])

    def load(self, key_type: KeyType, pkcs8: bytes) -> Handle:
        return Handle(load_der_private_key(pkcs8, None, unsafe_skip_rsa_key_validation=True))

    def sign(self, key_type: KeyType, work: Sequence[Work]) -> list[SignOutcome]:
        return [_sign_one(cast("PrivateKey", handle), request) for handle, request in work]

    def health(self) -> EngineHealth:
        return EngineHealth(True)


def _sign_one(key: PrivateKey, request: SignRequest) -> SignOutcome:
    try:
        check_scheme_fits(request.scheme, request.record.key_type)
        return sign_with(key, request.scheme, request.message, prehashed=request.prehashed)
    except KeyreeveError as error:
        return error
    except InvalidSignature:
        return SignatureMismatch("the software key gave a signature that does not verify")
    except (ValueError, TypeError):
        return Internal("the software key failed to sign")


def sign_with(key: PrivateKey, scheme: SignatureScheme, message: bytes, *, prehashed: bool = False) -> bytes:
    """Raises: SchemeNotSupported; InvalidSignature where a result does not verify; ValueError, TypeError from `cryptography`."""
    return _SIGNERS[scheme.facts.family](key, scheme, message, prehashed)


def _sign_ec(key: PrivateKey, scheme: SignatureScheme, message: bytes, prehashed: bool) -> bytes:
    algorithm = ec.ECDSA(hash_algorithm(scheme, prehashed=prehashed))
    return cast("ec.EllipticCurvePrivateKey", key).sign(message, algorithm)


def _sign_ed25519(key: PrivateKey, _: SignatureScheme, message: bytes, prehashed: bool) -> bytes:
    if prehashed:
        raise SchemeNotSupported("ed25519 takes the message whole, never a digest")
    return cast("ed25519.Ed25519PrivateKey", key).sign(message)


def _sign_rsa(key: PrivateKey, scheme: SignatureScheme, message: bytes, prehashed: bool) -> bytes:
    """Verified before release: a fault in one half of the CRT would give the key away."""
    private_key = cast("rsa.RSAPrivateKey", key)
    algorithm, form = hash_algorithm(scheme, prehashed=prehashed), rsa_padding(scheme)
    signature = private_key.sign(message, form, algorithm)
    private_key.public_key().verify(signature, message, form, algorithm)
    return signature


_SIGNERS: dict[KeyFamily, Callable[[PrivateKey, SignatureScheme, bytes, bool], bytes]] = {
    KeyFamily.EC_P256: _sign_ec,
    KeyFamily.EC_P384: _sign_ec,
    KeyFamily.ED25519: _sign_ed25519,
    KeyFamily.RSA: _sign_rsa,
}
