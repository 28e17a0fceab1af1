"""What the signer makes of a worker's answers: a token that signs wrongly."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_keyserver.backends import worker_frames as frames
from keyreeve_keyserver.backends.launch import WorkerSpec
from keyreeve_keyserver.backends.pkcs11_backend import PROGRAM
from keyreeve_keyserver.backends.ports import SignatureMismatch, SignRequest
from keyreeve_keyserver.backends.worker_backend import WorkerBackend
from keyreeve_keyserver.backends.worker_place import PoolPolicy
from keyreeve_keyserver.backends.worker_queue import Job, Lane
from keyreeve_keyserver.domain.keys import Custody, KeyRecord
from keyreeve_keyserver.hardening.lockdown import Reach

MESSAGE = b"the message"


class PlayedPool:
    """Finds every key, and signs everything with `signature`."""

    fault = None

    def __init__(self, signature: bytes) -> None:
        self.signature = signature

    async def ask(self, _question: frames.Question, **_: object) -> frames.Answer:
        return frames.Done({})

    def share(self, _lane: Lane, items: int) -> int:
        return items

    def submit(self, question: frames.TokenSign, **_: object) -> Job:
        job = Job(question, asyncio.get_running_loop().create_future(), None)
        job.answer.set_result(frames.TokenSigned((self.signature,) * len(question.items)))
        return job


def _flipped(signature: bytes) -> bytes:
    return signature[:-1] + bytes((signature[-1] ^ 1,))


ED25519, RSA, P256 = (
    ed25519.Ed25519PrivateKey.generate(),
    rsa.generate_private_key(65537, 2048),
    ec.generate_private_key(ec.SECP256R1()),
)
CASES = [
    (ED25519, KeyType.ED25519, SignatureScheme.ED25519, ED25519.sign(MESSAGE), True),
    (
        RSA,
        KeyType.RSA_2048,
        SignatureScheme.RSA_PKCS1_SHA256,
        RSA.sign(MESSAGE, padding.PKCS1v15(), hashes.SHA256()),
        True,
    ),
    (
        P256,
        KeyType.EC_P256,
        SignatureScheme.ECDSA_SECP256R1_SHA256,
        P256.sign(MESSAGE, ec.ECDSA(hashes.SHA256())),
        False,
    ),
]


@pytest.mark.parametrize(("key", "key_type", "scheme", "right", "verified"), CASES, ids=["ed25519", "rsa", "p256"])
async def test_a_wrong_signature_of_a_token_is_released_only_where_it_tells_nothing_of_the_key(
    key: Any, key_type: KeyType, scheme: SignatureScheme, right: bytes, verified: bool
) -> None:
    nothing = Reach(network=False)
    backend = WorkerBackend(
        WorkerSpec("hsm", PROGRAM, {}, {}, nothing), custody=Custody.TOKEN_RESIDENT, workers=1, policy=PoolPolicy()
    )
    pool: Any = PlayedPool(right)
    backend._started = pool
    spki_der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    purposes = frozenset({Purpose.TLS13_SERVER_VERIFY})
    record = KeyRecord(
        KeyId("k"), key_type, KeyRole.HANDSHAKE, purposes, "hsm", "ref", spki_der, "", datetime(2026, 1, 1, tzinfo=UTC)
    )
    await backend.load(record, None)
    request = SignRequest(record, scheme, MESSAGE, time.monotonic() + 60)
    assert await backend.sign([request]) == [right]
    pool.signature = _flipped(right)
    (outcome,) = await backend.sign([request])
    assert isinstance(outcome, SignatureMismatch) == verified
