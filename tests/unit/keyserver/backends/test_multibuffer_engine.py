"""Lanes against `cryptography`: every type and scheme with mixed keys, numbers at the edges, keys that are refused, and what nobody gets out."""

from __future__ import annotations

import copy
import hashlib
import pickle
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from itertools import cycle, islice
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from keyreeve_common.errors import KeySelfTestFailed
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import DEFAULT_SCHEMES, KeyType, SignatureScheme, schemes_of
from keyreeve_common.verification import verify_signature
from keyreeve_keyserver.backends import multibuffer_engine
from keyreeve_keyserver.backends.engines import Handle, KeyUnsuited
from keyreeve_keyserver.backends.multibuffer_engine import EngineUnusable, MultiBufferEngine, open_multibuffer
from keyreeve_keyserver.backends.openssl_engine import OpenSslEngine, PrivateKey
from keyreeve_keyserver.backends.ports import SignatureMismatch, SignRequest
from keyreeve_keyserver.domain.keys import KeyRecord

P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
P384_ORDER = int("F" * 48 + "C7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973", 16)
CURVES = {KeyType.EC_P256: (ec.SECP256R1(), P256_ORDER), KeyType.EC_P384: (ec.SECP384R1(), P384_ORDER)}
PROBABLE_PRIME_BASES = (2, 3, 5, 7, 11, 13)


def _unusable() -> str:
    try:
        open_multibuffer()
    except EngineUnusable as missing:
        return str(missing)
    return ""


needs_lanes = pytest.mark.skipif(bool(_unusable()), reason=_unusable())


@pytest.fixture
def engine() -> MultiBufferEngine:
    return open_multibuffer()


def pkcs8_of(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


@lru_cache
def keys_of(key_type: KeyType) -> list[PrivateKey]:
    """A few keys, made once: more than one in a call, and their number does not divide that of the lanes."""
    if key_type.rsa_bits:
        count = 3 if key_type is KeyType.RSA_2048 else 2
        return [rsa.generate_private_key(65537, key_type.rsa_bits) for _ in range(count)]
    if key_type is KeyType.ED25519:
        return [ed25519.Ed25519PrivateKey.generate() for _ in range(11)]
    return [ec.generate_private_key(CURVES[key_type][0]) for _ in range(11)]


def request_for(
    key: PrivateKey, key_type: KeyType, scheme: SignatureScheme, message: bytes, *, prehashed: bool = False
) -> SignRequest:
    spki_der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    record = KeyRecord(
        KeyId("k"),
        key_type,
        KeyRole.HANDSHAKE,
        frozenset({Purpose.TLS13_SERVER_VERIFY}),
        "software",
        "k",
        spki_der,
        "",
        datetime(2026, 1, 1, tzinfo=UTC),
    )
    return SignRequest(record, scheme, message, time.monotonic() + 60, prehashed)


def check_all(
    engine: MultiBufferEngine, key_type: KeyType, keys: list[PrivateKey], requests: list[SignRequest]
) -> list[bytes]:
    """Signs `requests` by `keys` in turn, verifies each, and gives the signatures."""
    handles = [engine.load(key_type, pkcs8_of(key)) for key in keys]
    outcomes = engine.sign(key_type, list(zip(cycle(handles), requests, strict=False)))
    signatures = []
    for key, request, outcome in zip(cycle(keys), requests, outcomes, strict=False):
        assert isinstance(outcome, bytes), outcome
        verify_signature(
            key.public_key(), request.scheme, request.message, signature=outcome, prehashed=request.prehashed
        )
        signatures.append(outcome)
    assert len(signatures) == len(requests)
    return signatures


@needs_lanes
@pytest.mark.parametrize(
    ("key_type", "count"),
    [
        (KeyType.EC_P256, 4000),
        (KeyType.EC_P384, 800),
        (KeyType.ED25519, 3000),
        (KeyType.RSA_2048, 600),
        (KeyType.RSA_3072, 60),
        (KeyType.RSA_4096, 60),
    ],
)
def test_thousands_of_signatures_verify(engine: MultiBufferEngine, key_type: KeyType, count: int) -> None:
    """By every scheme of the type, of messages of every length around the blocks of the hashes, whole and as digests."""
    keys = keys_of(key_type)
    requests = []
    for number, (key, scheme) in enumerate(islice(zip(cycle(keys), cycle(schemes_of(key_type)), strict=False), count)):
        message = number.to_bytes(4, "big") * (number % 70)
        prehashed = number % 5 == 0 and key_type is not KeyType.ED25519
        if prehashed:
            message = hashlib.new(scheme.facts.hash_name, message).digest()
        requests.append(request_for(key, key_type, scheme, message, prehashed=prehashed))
    check_all(engine, key_type, keys, requests)


@needs_lanes
@pytest.mark.parametrize("key_type", CURVES)
def test_scalars_and_digests_at_the_edges(engine: MultiBufferEngine, key_type: KeyType) -> None:
    curve, order = CURVES[key_type]
    bits = order.bit_length()
    scalars = [1, 2, 3, order - 1, order - 2, order // 2, order // 2 + 1, 1 << (bits - 1), (1 << (bits - 1)) - 1]
    scalars += [1 << 64, 1 << 128, (1 << 128) - 1, int("55" * (bits // 8), 16), int("AA" * (bits // 8), 16)]
    digests = [1, order - 1, order + 1, order + 2, (1 << bits) - 1, 1 << (bits - 1), order // 2]
    keys: list[PrivateKey] = [ec.derive_private_key(scalar, curve) for scalar in scalars]
    scheme = DEFAULT_SCHEMES[key_type.family]
    requests = [
        request_for(keys[number % len(keys)], key_type, scheme, digest.to_bytes(bits // 8, "big"), prehashed=True)
        for number, digest in enumerate(islice(cycle(digests), len(scalars) * len(digests) + 5))
    ]
    check_all(engine, key_type, keys, requests)


@needs_lanes
@pytest.mark.parametrize("key_type", CURVES)
def test_no_nonce_comes_twice_and_short_numbers_are_encoded_short(engine: MultiBufferEngine, key_type: KeyType) -> None:
    """r is the nonce's point: equal nonces give equal r. One r in 256 begins with a zero byte, which DER leaves out."""
    (key, *_) = keys_of(key_type)
    request = request_for(key, key_type, DEFAULT_SCHEMES[key_type.family], b"always the same")
    signatures = check_all(engine, key_type, [key], [request] * 3000)
    r_values = [decode_dss_signature(signature)[0] for signature in signatures]
    assert len(set(r_values)) == len(r_values)
    short = 8 * (CURVES[key_type][1].bit_length() // 8 - 1)
    assert any(r.bit_length() <= short for r in r_values)


def prime_of(bits: int, start: int, e: int = 65537) -> int:
    """The first probable prime after `start` with its two top bits set, for which e has an inverse."""
    candidate = start | (3 << (bits - 2)) | 1
    while candidate % e == 1 or any(pow(base, candidate - 1, candidate) != 1 for base in PROBABLE_PRIME_BASES):
        candidate += 2
    return candidate


def rsa_key(p: int, q: int, e: int = 65537) -> rsa.RSAPrivateKey:
    d = pow(e, -1, (p - 1) * (q - 1))
    public = rsa.RSAPublicNumbers(e, p * q)
    return rsa.RSAPrivateNumbers(p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p), public).private_key()


@needs_lanes
def test_primes_in_either_order(engine: MultiBufferEngine) -> None:
    (key, *_) = keys_of(KeyType.RSA_2048)
    assert isinstance(key, rsa.RSAPrivateKey)
    numbers = key.private_numbers()
    large, small = max(numbers.p, numbers.q), min(numbers.p, numbers.q)
    pair: list[PrivateKey] = [rsa_key(large, small), rsa_key(small, large)]
    requests = [
        request_for(pair[number % 2], KeyType.RSA_2048, scheme, b"either way")
        for number, scheme in enumerate(schemes_of(KeyType.RSA_2048) * 3)
    ]
    check_all(engine, KeyType.RSA_2048, pair, requests)


@needs_lanes
def test_keys_that_lanes_cannot_use_are_left_to_openssl(engine: MultiBufferEngine) -> None:
    seed = int.from_bytes(hashlib.sha512(b"seed of test primes").digest() * 2, "big")
    unlike = rsa_key(prime_of(1100, seed % (1 << 1098)), prime_of(948, seed % (1 << 946)))
    assert unlike.key_size == 2048
    small_exponent = rsa.generate_private_key(3, 2048)
    for key in (unlike, small_exponent):
        with pytest.raises(KeyUnsuited):
            engine.load(KeyType.RSA_2048, pkcs8_of(key))
        openssl, request = (
            OpenSslEngine(),
            request_for(key, KeyType.RSA_2048, SignatureScheme.RSA_PSS_RSAE_SHA256, b"all the same"),
        )
        (signature,) = openssl.sign(KeyType.RSA_2048, [(openssl.load(KeyType.RSA_2048, pkcs8_of(key)), request)])
        assert isinstance(signature, bytes)


def _with_scalar(key_type: KeyType, value: int) -> bytes:
    """A PKCS#8 whose scalar was replaced; its public point stays."""
    (key, *_) = keys_of(key_type)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    size = CURVES[key_type][1].bit_length() // 8
    scalar = key.private_numbers().private_value.to_bytes(size, "big")
    return pkcs8_of(key).replace(scalar, value.to_bytes(size, "big"))


def _rsa_with(**changes: Callable[[rsa.RSAPrivateNumbers], int]) -> bytes:
    """A PKCS#8 with parts that do not belong together, which no library would write."""
    (key, *_) = keys_of(KeyType.RSA_2048)
    assert isinstance(key, rsa.RSAPrivateKey)
    numbers = key.private_numbers()
    der = pkcs8_of(key)
    for name, change in changes.items():
        old = getattr(numbers, name)
        size = (old.bit_length() + 7) // 8
        assert der.count(old.to_bytes(size, "big")) == 1
        der = der.replace(old.to_bytes(size, "big"), change(numbers).to_bytes(size, "big"))
    return der


BAD_KEYS: dict[str, tuple[KeyType, Callable[[], bytes]]] = {
    "scalar 0": (KeyType.EC_P256, lambda: _with_scalar(KeyType.EC_P256, 0)),
    "scalar n": (KeyType.EC_P256, lambda: _with_scalar(KeyType.EC_P256, P256_ORDER)),
    "scalar n + 1": (KeyType.EC_P256, lambda: _with_scalar(KeyType.EC_P256, P256_ORDER + 1)),
    "scalar 2^256 - 1": (KeyType.EC_P256, lambda: _with_scalar(KeyType.EC_P256, (1 << 256) - 1)),
    "scalar of another point": (KeyType.EC_P256, lambda: _with_scalar(KeyType.EC_P256, 12345)),
    "P-384 scalar 0": (KeyType.EC_P384, lambda: _with_scalar(KeyType.EC_P384, 0)),
    "P-384 scalar n": (KeyType.EC_P384, lambda: _with_scalar(KeyType.EC_P384, P384_ORDER)),
    "another curve": (KeyType.EC_P256, lambda: pkcs8_of(keys_of(KeyType.EC_P384)[0])),
    "a curve that we do not have": (KeyType.EC_P256, lambda: pkcs8_of(ec.generate_private_key(ec.SECP256K1()))),
    "another size": (KeyType.RSA_3072, lambda: pkcs8_of(keys_of(KeyType.RSA_2048)[0])),
    "another family": (KeyType.ED25519, lambda: pkcs8_of(keys_of(KeyType.EC_P256)[0])),
    "X25519": (
        KeyType.ED25519,
        lambda: x25519.X25519PrivateKey.generate().private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
    ),
    "p is composite": (KeyType.RSA_2048, lambda: _rsa_with(p=lambda numbers: numbers.p + 2)),
    "p and q are one": (KeyType.RSA_2048, lambda: _rsa_with(q=lambda numbers: numbers.p)),
    "p is 0": (KeyType.RSA_2048, lambda: _rsa_with(p=lambda numbers: 0)),
    "p is 1": (KeyType.RSA_2048, lambda: _rsa_with(p=lambda numbers: 1)),
    "n is even": (KeyType.RSA_2048, lambda: _rsa_with(q=lambda numbers: numbers.q - 1)),
    "dp is wrong": (KeyType.RSA_2048, lambda: _rsa_with(dmp1=lambda numbers: numbers.dmp1 ^ 2)),
    "dq is wrong": (KeyType.RSA_2048, lambda: _rsa_with(dmq1=lambda numbers: numbers.dmq1 ^ 2)),
    "qinv is wrong": (KeyType.RSA_2048, lambda: _rsa_with(iqmp=lambda numbers: numbers.iqmp ^ 2)),
    "qinv is 0": (KeyType.RSA_2048, lambda: _rsa_with(iqmp=lambda numbers: 0)),
    "nothing": (KeyType.EC_P256, lambda: b""),
    "zeros": (KeyType.EC_P256, lambda: bytes(200)),
    "more after it": (KeyType.EC_P256, lambda: pkcs8_of(keys_of(KeyType.EC_P256)[0]) + b"\0"),
    "PEM": (
        KeyType.EC_P256,
        lambda: keys_of(KeyType.EC_P256)[0].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    ),
    "encrypted": (
        KeyType.EC_P256,
        lambda: keys_of(KeyType.EC_P256)[0].private_bytes(
            Encoding.DER, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
        ),
    ),
}


@needs_lanes
def test_a_key_of_three_primes_is_left_to_openssl(engine: MultiBufferEngine) -> None:
    """Made by OpenSSL, since `cryptography` makes none."""
    make = [
        "openssl",
        "genpkey",
        "-algorithm",
        "RSA",
        "-pkeyopt",
        "rsa_keygen_bits:2048",
        "-pkeyopt",
        "rsa_keygen_primes:3",
    ]
    pem = subprocess.run(make, capture_output=True, check=True).stdout
    convert = ["openssl", "pkcs8", "-topk8", "-nocrypt", "-outform", "DER"]
    three = subprocess.run(convert, input=pem, capture_output=True, check=True).stdout
    with pytest.raises(KeyUnsuited):
        engine.load(KeyType.RSA_2048, three)


@needs_lanes
@pytest.mark.parametrize("what", BAD_KEYS)
def test_bad_keys_are_refused(engine: MultiBufferEngine, what: str) -> None:
    key_type, make = BAD_KEYS[what]
    with pytest.raises(KeySelfTestFailed, match="not sound"):
        engine.load(key_type, make())


@needs_lanes
def test_a_handle_gives_nothing_away(engine: MultiBufferEngine) -> None:
    (key, *_) = keys_of(KeyType.EC_P256)
    handle: Any = engine.load(KeyType.EC_P256, pkcs8_of(key))
    assert repr(handle) == str(handle) == "Key()"
    for leak in (copy.copy, copy.deepcopy, pickle.dumps, memoryview, bytes, type(handle), vars, iter):
        with pytest.raises(TypeError):
            leak(handle)
    with pytest.raises(TypeError):
        type(handle)()
    with pytest.raises(TypeError):
        type("Sub", (type(handle),), {})
    with pytest.raises(TypeError):
        type(handle).__repr__ = lambda self: "changed"
    assert [name for name in dir(handle) if not name.startswith("__")] == []


@needs_lanes
def test_misuse_from_python_is_an_error_and_no_crash(engine: MultiBufferEngine) -> None:
    module: Any = multibuffer_engine.keyreeve_engine.multibuffer
    handle = engine.load(KeyType.EC_P256, pkcs8_of(keys_of(KeyType.EC_P256)[0]))
    for arguments in (
        (0, [handle], [b"m", b"m"], b"\1"),
        (0, [handle], [b"m"], b""),
        (0, [handle] * 65, [b"m"] * 65, b"\1" * 65),
        (6, [handle], [b"m"], b"\1"),
        (-1, [handle], [b"m"], b"\1"),
    ):
        with pytest.raises(ValueError, match=r"keys, messages|kind"):
            module.sign(*arguments)
    for arguments in (
        (0, [object()], [b"m"], b"\1"),
        (0, [None], [b"m"], b"\1"),
        (0, [handle], ["m"], b"\1"),
        (0, [handle], [bytearray(b"m")], b"\1"),
        (0, (handle,), [b"m"], b"\1"),
    ):
        with pytest.raises(TypeError):
            module.sign(*arguments)
    assert module.sign(0, [], [], b"") == []
    assert [module.sign(0, [handle], [b"m"], bytes([form]))[0] for form in (0, 2, 4, 0x0F, 0x41, 0x81, 0xFF)] == [1] * 7


@needs_lanes
def test_keys_are_loaded_signed_with_and_dropped_by_many_threads(engine: MultiBufferEngine) -> None:
    """While one thread signs with a key another drops its own reference: the piece holds it until it is done."""
    (key, *_) = keys_of(KeyType.EC_P256)
    request = request_for(key, KeyType.EC_P256, SignatureScheme.ECDSA_SECP256R1_SHA256, b"at once")
    faults: list[object] = []

    def work() -> None:
        for _ in range(30):
            handle = engine.load(KeyType.EC_P256, pkcs8_of(key))
            for outcome in engine.sign(KeyType.EC_P256, [(handle, request)] * 20):
                try:
                    assert isinstance(outcome, bytes)
                    verify_signature(key.public_key(), request.scheme, request.message, signature=outcome)
                except Exception as fault:
                    faults.append(fault)

    before = multibuffer_engine.keyreeve_engine.multibuffer.memory()[2]  # type: ignore[union-attr]
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert multibuffer_engine.keyreeve_engine.multibuffer.memory()[2] == before  # type: ignore[union-attr]


@needs_lanes
def test_lanes_take_the_work_from_the_number_on_that_pays(engine: MultiBufferEngine) -> None:
    chosen = MultiBufferEngine(engine._module, least={KeyType.EC_P256: 3, KeyType.EC_P384: 1, KeyType.RSA_3072: 9})
    assert [chosen.piece(KeyType.EC_P256, waiting) for waiting in (0, 1, 2, 3, 8, 9, 10, 11, 63, 64, 500)] == [
        0, 0, 0, 3, 8, 8, 8, 11, 63, 64, 64,
    ]  # fmt: skip
    assert [chosen.piece(KeyType.EC_P384, waiting) for waiting in (1, 9, 500)] == [1, 9, 16]
    assert [chosen.piece(KeyType.RSA_3072, waiting) for waiting in (8, 500)] == [0, 8]


class Faulty:
    """A module whose lanes answer what the test wants; keys are those of the real one where there is one."""

    PIECE_MAX = 64

    class KeyInvalid(ValueError):
        pass

    class KeyUnsuited(ValueError):
        pass

    def __init__(self, answer: bytes | int | Exception) -> None:
        self.answer = answer

    def kinds(self) -> list[int]:
        return [0, 1, 2, 3, 4, 5]

    def load(self, kind: int, pkcs8: bytes, /) -> object:
        return object()

    def sign(self, kind: int, keys: list[object], messages: list[bytes], forms: bytes, /) -> list[bytes | int]:
        if isinstance(self.answer, Exception):
            raise self.answer
        return [self.answer] * len(keys)


def test_an_engine_that_signs_wrongly_is_not_used() -> None:
    for answer in (b"0" * 70, 6, 7):
        with pytest.raises(EngineUnusable, match="self-test failed"):
            MultiBufferEngine(Faulty(answer)).test()


def test_a_type_whose_first_signature_is_wrong_is_left_to_openssl() -> None:
    engine = MultiBufferEngine(Faulty(bytes(256)))
    assert engine.supports(KeyType.RSA_2048)
    with pytest.raises(KeyUnsuited):
        engine.load(KeyType.RSA_2048, pkcs8_of(keys_of(KeyType.RSA_2048)[0]))
    assert not engine.supports(KeyType.RSA_2048)
    assert engine.supports(KeyType.EC_P256)
    assert "rsa-2048" in engine.health().detail


def test_a_wrong_result_is_an_error_and_all_else_is_left_to_openssl() -> None:
    request = request_for(
        keys_of(KeyType.RSA_2048)[0], KeyType.RSA_2048, SignatureScheme.RSA_PSS_RSAE_SHA256, b"message"
    )
    for answer in (1, 4, 5, 6, MemoryError(), ValueError()):
        outcomes = MultiBufferEngine(Faulty(answer)).sign(KeyType.RSA_2048, [(Handle(object()), request)] * 70)
        assert outcomes == [None] * 70
    outcomes = MultiBufferEngine(Faulty(7)).sign(KeyType.RSA_2048, [(Handle(object()), request)] * 70)
    assert len(outcomes) == 70
    assert {type(outcome) for outcome in outcomes} == {SignatureMismatch}


@needs_lanes
def test_a_digest_that_lanes_do_not_sign_is_left_to_openssl(engine: MultiBufferEngine) -> None:
    for key_type, (_, order) in CURVES.items():
        key, scheme = keys_of(key_type)[0], DEFAULT_SCHEMES[key_type.family]
        for digest in (0, order):
            message = digest.to_bytes(order.bit_length() // 8, "big")
            request = request_for(key, key_type, scheme, message, prehashed=True)
            fine = request_for(key, key_type, scheme, b"beside it")
            handle = engine.load(key_type, pkcs8_of(key))
            left, signed = engine.sign(key_type, [(handle, request), (handle, fine)])
            assert left is None
            assert isinstance(signed, bytes)


def test_without_the_extension_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multibuffer_engine, "keyreeve_engine", None)
    with pytest.raises(EngineUnusable, match="install keyreeve-keyserver"):
        open_multibuffer()
