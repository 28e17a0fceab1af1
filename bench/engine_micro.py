"""What the signing engines cost: `python bench/engine_micro.py [--seconds 0.5] [--output json]`, beside `openssl speed` in the same run.

Processor time of one thread, through the Python extension and the whole engine, 64 requests handed in at once; the last column is what Python
adds to the extension's call, in microseconds a request. A machine that is shared gives other figures each time: only ratios of one run count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import KeyRole, Purpose
from keyreeve_common.schemes import DEFAULT_SCHEMES, KeyType
from keyreeve_keyserver.backends import multibuffer_engine
from keyreeve_keyserver.backends.multibuffer_engine import LANES, open_multibuffer
from keyreeve_keyserver.backends.openssl_engine import OpenSslEngine, PrivateKey
from keyreeve_keyserver.backends.ports import SignRequest
from keyreeve_keyserver.domain.keys import KeyRecord

MESSAGE = bytes(130)
AT_ONCE = 64
SPEED_NAMES = {
    KeyType.EC_P256: "ecdsap256",
    KeyType.EC_P384: "ecdsap384",
    KeyType.ED25519: "ed25519",
    KeyType.RSA_2048: "rsa2048",
    KeyType.RSA_3072: "rsa3072",
    KeyType.RSA_4096: "rsa4096",
}


def make_key(key_type: KeyType) -> PrivateKey:
    if key_type is KeyType.ED25519:
        return ed25519.Ed25519PrivateKey.generate()
    if key_type.rsa_bits:
        return rsa.generate_private_key(65537, key_type.rsa_bits)
    return ec.generate_private_key(ec.SECP256R1() if key_type is KeyType.EC_P256 else ec.SECP384R1())


def seconds_of(work: Callable[[], object], seconds: float) -> float:
    """Processor time of one call: the least of three means."""
    means = []
    for _ in range(3):
        calls, began = 0, time.thread_time()
        while time.thread_time() - began < seconds / 3:
            work()
            calls += 1
        means.append((time.thread_time() - began) / calls)
    return min(means)


def openssl_speed(key_type: KeyType, seconds: float) -> float:
    """Signatures a second of processor time. OpenSSL counts that itself."""
    command = ["openssl", "speed", "-seconds", str(max(1, round(seconds))), SPEED_NAMES[key_type]]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(shown.splitlines()[-1].split()[-2])


def measure(key_type: KeyType, seconds: float) -> dict[str, Any]:
    lanes, openssl, key = open_multibuffer(), OpenSslEngine(), make_key(key_type)
    pkcs8 = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    spki_der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    purposes, made = frozenset({Purpose.TLS13_SERVER_VERIFY}), datetime(2026, 1, 1, tzinfo=UTC)
    record = KeyRecord(KeyId("k"), key_type, KeyRole.HANDSHAKE, purposes, "software", "k", spki_der, "", made)
    scheme = DEFAULT_SCHEMES[key_type.family]
    request = SignRequest(record, scheme, MESSAGE, 0.0)
    handle, plain = lanes.load(key_type, pkcs8), openssl.load(key_type, pkcs8)
    module: Any = multibuffer_engine.keyreeve_engine.multibuffer
    kind, form = multibuffer_engine._KINDS[key_type], bytes([multibuffer_engine._FORMS[key_type][scheme]])
    keys, messages, forms = [handle] * AT_ONCE, [MESSAGE] * AT_ONCE, form * AT_ONCE
    one_call = seconds_of(lambda: module.sign(kind, keys[:LANES], messages[:LANES], forms[:LANES]), seconds)
    extension = seconds_of(lambda: module.sign(kind, keys, messages, forms), seconds) / AT_ONCE
    engine = seconds_of(lambda: lanes.sign(key_type, [(handle, request)] * AT_ONCE), seconds) / AT_ONCE
    single = seconds_of(lambda: openssl.sign(key_type, [(plain, request)]), seconds)
    speed = openssl_speed(key_type, seconds)
    return {
        "us_per_call_of_8": round(one_call * 1e6, 1),
        "extension_per_s": round(1 / extension),
        "engine_per_s": round(1 / engine),
        "openssl_engine_per_s": round(1 / single),
        "openssl_speed_per_s": round(speed),
        "ratio_to_openssl_speed": round(1 / engine / speed, 2),
        "pays_from": lanes._least[key_type],
        "python_us": round((engine - extension) * 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of processor time for each figure")
    parser.add_argument("--output", choices=("text", "json"), default="text")
    arguments = parser.parse_args()
    found = {key_type.value: measure(key_type, arguments.seconds) for key_type in KeyType}
    if arguments.output == "json":
        sys.stdout.write(json.dumps(found) + "\n")
        return
    columns = list(next(iter(found.values())))
    sys.stdout.write(" | ".join(["key type", *columns]) + "\n")
    for name, figures in found.items():
        sys.stdout.write(" | ".join([name, *(str(figures[column]) for column in columns)]) + "\n")


if __name__ == "__main__":
    main()
