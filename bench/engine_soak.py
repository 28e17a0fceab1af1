"""Millions of signatures of the multi-buffer engine, each verified by `cryptography`: `python bench/engine_soak.py [--signatures 1000000]`.

Keys are mixed within every call and made anew all the time; messages have random lengths; one in eight is a digest. It ends with 1 at the first
signature that does not verify, or the first nonce that came twice, and shows the request. Not for CI: a million take some minutes of processor.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import resource
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from keyreeve_common.errors import KeyreeveError
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType, schemes_of
from keyreeve_common.verification import verify_signature
from keyreeve_keyserver.backends.engines import Handle
from keyreeve_keyserver.backends.multibuffer_engine import open_multibuffer
from keyreeve_keyserver.backends.openssl_engine import PrivateKey
from keyreeve_keyserver.backends.ports import SignRequest
from keyreeve_keyserver.domain.keys import KeyRecord

# Shares of the signatures: fast types more often, so that each type takes some of the time.
SHARES = {
    KeyType.EC_P256: 60,
    KeyType.EC_P384: 12,
    KeyType.ED25519: 24,
    KeyType.RSA_2048: 3,
    KeyType.RSA_3072: 0.5,
    KeyType.RSA_4096: 0.5,
}
KEYS_AT_A_TIME, PIECES_PER_KEY = 13, 5


@dataclass(slots=True)
class Held:
    """Keys of one type, one of which is replaced now and then."""

    record: KeyRecord
    keys: list[tuple[PrivateKey, Handle]] = field(default_factory=list)
    pieces: int = 0


def make_key(key_type: KeyType) -> PrivateKey:
    if key_type is KeyType.EC_P256:
        return ec.generate_private_key(ec.SECP256R1())
    if key_type is KeyType.EC_P384:
        return ec.generate_private_key(ec.SECP384R1())
    if key_type is KeyType.ED25519:
        return ed25519.Ed25519PrivateKey.generate()
    return rsa.generate_private_key(65537, key_type.rsa_bits)


def record_of(key_type: KeyType) -> KeyRecord:
    """What a request says of its key's type; the key itself is another each time."""
    spki_der = make_key(key_type).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    purposes, made = frozenset({Purpose.TLS13_SERVER_VERIFY}), datetime(2026, 1, 1, tzinfo=UTC)
    return KeyRecord(KeyId("k"), key_type, KeyRole.HANDSHAKE, purposes, "software", "k", spki_der, "", made)


def request_for(record: KeyRecord, choose: random.Random) -> SignRequest:
    scheme = choose.choice(schemes_of(record.key_type))
    message = choose.randbytes(choose.choice((0, 1, 55, 56, 64, 111, 112, 128, 130, choose.randrange(5000))))
    prehashed = record.key_type is not KeyType.ED25519 and choose.randrange(8) == 0
    if prehashed:
        message = hashlib.new(scheme.facts.hash_name, message).digest()
    return SignRequest(record, scheme, message, 0.0, prehashed)


def soak(signatures: int, seed: int) -> int:
    engine, choose = open_multibuffer(), random.Random(seed)  # noqa: S311 - what is signed, not with what
    held = {key_type: Held(record_of(key_type)) for key_type in SHARES}
    done = dict.fromkeys(SHARES, 0)
    r_seen: set[bytes] = set()
    while sum(done.values()) < signatures:
        (key_type,) = choose.choices(list(SHARES), [share / 32 for share in SHARES.values()])
        lot = held[key_type]
        if len(lot.keys) < KEYS_AT_A_TIME or lot.pieces % PIECES_PER_KEY == 0:
            key = make_key(key_type) if not key_type.rsa_bits or len(lot.keys) < 2 else None
            if key is not None:
                pkcs8 = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
                lot.keys = [*lot.keys[-KEYS_AT_A_TIME + 1 :], (key, engine.load(key_type, pkcs8))]
        lot.pieces += 1
        pairs = [(choose.choice(lot.keys), request_for(lot.record, choose)) for _ in range(choose.randrange(1, 65))]
        outcomes = engine.sign(key_type, [(handle, request) for (_, handle), request in pairs])
        for ((key, _), request), outcome in zip(pairs, outcomes, strict=True):
            problem = fault_of(key, request, outcome, r_seen)
            if problem:
                sys.stdout.write(f"FAULT {problem}: {key_type.value} {request.scheme.name} {request.message.hex()}\n")
                return 1
        done[key_type] += len(pairs)
    used = resource.getrusage(resource.RUSAGE_SELF)
    shown = ", ".join(f"{key_type.value} {count}" for key_type, count in done.items())
    sys.stdout.write(f"{sum(done.values())} signatures, all right, no nonce twice: {shown}\n")
    sys.stdout.write(
        f"processor seconds {used.ru_utime + used.ru_stime:.0f}, most memory {used.ru_maxrss // 1024} MiB\n"
    )
    return 0


def fault_of(key: PrivateKey, request: SignRequest, outcome: object, r_seen: set[bytes]) -> str:
    """ "" where the signature is right and its nonce new."""
    if not isinstance(outcome, bytes):
        return f"no signature but {outcome}"
    try:
        verify_signature(
            key.public_key(), request.scheme, request.message, signature=outcome, prehashed=request.prehashed
        )
    except KeyreeveError as error:
        return str(error)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        r, _ = decode_dss_signature(outcome)
        short = r.to_bytes(48, "big")[-16:]
        if short in r_seen:
            return "a nonce came twice"
        r_seen.add(short)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--signatures", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=time.time_ns(), help="of keys' order and messages")
    arguments = parser.parse_args()
    sys.stdout.write(f"seed {arguments.seed}\n")
    sys.stdout.flush()
    return soak(arguments.signatures, arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
