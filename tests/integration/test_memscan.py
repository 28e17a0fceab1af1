"""The memory scan finds a key that is there, in each form, and none where there is none; it never calls unread memory clean."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd, lcm

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from keyreeve_engine import available
from keyreeve_testing.memscan import PrivateKey, needles_of, scan_process

KEYS: dict[str, PrivateKey] = {
    "ec-p256": ec.generate_private_key(ec.SECP256R1()),
    "ec-p384": ec.generate_private_key(ec.SECP384R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate(),
    "rsa-2048": rsa.generate_private_key(65537, 2048),
}
HOLDER = """
import sys
from cryptography.hazmat.primitives.serialization import load_der_private_key
key = load_der_private_key(sys.stdin.buffer.read(int(sys.argv[1])), None)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(key: PrivateKey) -> Iterator[int]:
    """A process that loaded the key as a signer does: into OpenSSL, from PKCS#8."""
    der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(len(der))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(der)
        process.stdin.flush()
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        process.stdin.close()


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_that_is_in_use_is_found_and_another_is_not(kind: str) -> None:
    other = {"ec-p256": "ec-p384"}.get(kind, "ec-p256")
    with holder(KEYS[kind]) as pid:
        found = scan_process(pid, needles_of(KEYS[kind]))
        assert found.hits
        assert found.scanned_bytes > 1_000_000
        assert not scan_process(pid, needles_of(KEYS[other])).hits


@pytest.mark.parametrize("kind", KEYS)
def test_every_form_is_found_where_it_stands(kind: str) -> None:
    """The forms lie in a child's memory, each after one odd byte."""
    needles = needles_of(KEYS[kind])
    content = b"|".join(needle.data for needle in needles)
    code = "import sys; data = sys.stdin.buffer.read(int(sys.argv[1])); print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(len(content))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(content)
        process.stdin.flush()
        process.stdout.readline()
        scan = scan_process(process.pid, needles)
        process.stdin.close()
    assert set(scan.forms) == {needle.form for needle in needles}


def test_base64_is_found_at_each_alignment() -> None:
    key = KEYS["ec-p256"]
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    scalar = key.private_numbers().private_value.to_bytes(32, "big")
    forms = {needle.form: needle.data for needle in needles_of(key)}
    for shift in range(3):
        for after in range(3):
            assert forms[f"scalar, base64 at {shift}"] in base64.b64encode(b"\xff" * shift + scalar + b"\xff" * after)


@pytest.mark.parametrize("kind", KEYS)
def test_no_form_is_in_what_is_public(kind: str) -> None:
    """Else every process with the certificate would look guilty."""
    der = KEYS[kind].public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    texts = [der, *(base64.b64encode(b"\0" * shift + der) for shift in range(3)), der.hex().encode()]
    assert not [needle for needle in needles_of(KEYS[kind]) for text in texts if needle.data in text]


def test_a_short_secret_number_makes_nothing_public_a_needle() -> None:
    """DER writes a number that begins with a zero byte shorter: one RSA key of some hundred has such a `d`."""
    numbers = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_numbers()
    p, q, e = numbers.p, numbers.q, 65537
    order = lcm(p - 1, q - 1)
    while gcd(e, order) != 1 or pow(e, -1, order).bit_length() > 2039:
        e += 2
    d = pow(e, -1, order)
    public = rsa.RSAPublicNumbers(e, p * q)
    key = rsa.RSAPrivateNumbers(p, q, d, d % (p - 1), d % (q - 1), numbers.iqmp, public).private_key()
    der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    texts = [der, *(base64.b64encode(b"\0" * shift + der) for shift in range(3))]
    assert not [needle for needle in needles_of(key) for text in texts if needle.data in text]


def test_a_needle_does_not_show_itself() -> None:
    needle = needles_of(KEYS["ec-p256"])[0]
    assert needle.data.hex() not in repr(needle)


def test_a_process_that_is_gone_is_an_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(ProcessLookupError):
        scan_process(process.pid, needles_of(KEYS["ec-p256"]))


LANES = """
import ctypes, sys
from keyreeve_engine import multibuffer
kind, length = int(sys.argv[1]), int(sys.argv[2])
buffer = bytearray(length)
sys.stdin.buffer.raw.readinto(buffer)
key = multibuffer.load(kind, buffer)
assert isinstance(multibuffer.sign(kind, [key], [b"message"], bytes([int(sys.argv[3])]))[0], bytes)
ctypes.memset((ctypes.c_char * length).from_buffer(buffer), 0, length)
print("loaded", flush=True)
sys.stdin.buffer.raw.read(1)
del key
print("dropped", flush=True)
sys.stdin.buffer.raw.read(1)
"""


@pytest.mark.skipif(not available().usable, reason=available().reason)
@pytest.mark.parametrize(
    ("kind", "number", "form"), [("ec-p256", 0, 1), ("ec-p384", 1, 2), ("ed25519", 2, 0), ("rsa-2048", 3, 0x41)]
)
def test_a_key_in_lanes_lies_in_their_own_pages_alone_and_is_wiped(kind: str, number: int, form: int) -> None:
    """Also after it has signed. The only copies are the arena's; with the last reference there is none, nor of what libcrypto read it with."""
    key = KEYS[kind]
    der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    with subprocess.Popen(
        [sys.executable, "-c", LANES, str(number), str(len(der)), str(form)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(der)
        process.stdin.flush()
        assert process.stdout.readline() == b"loaded\n"
        loaded = scan_process(process.pid, needles_of(key))
        process.stdin.write(b".")
        process.stdin.flush()
        assert process.stdout.readline() == b"dropped\n"
        dropped = scan_process(process.pid, needles_of(key))
        process.stdin.close()
    assert loaded.hits
    assert {hit.mapping for hit in loaded.hits} == {"anonymous"}, loaded.hits
    assert not dropped.hits, dropped.hits
