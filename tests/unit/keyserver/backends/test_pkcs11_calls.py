"""The short road to a signature: it gives what the token gives, and nothing where the token refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from keyreeve_common.schemes import SignatureScheme
from keyreeve_testing.softhsm import make_softhsm_token, softhsm_is_installed

calls = pytest.importorskip("keyreeve_keyserver.backends.pkcs11_calls")
needs_softhsm = pytest.mark.skipif(not softhsm_is_installed(), reason="softhsm2 is not installed")
SHA256 = 0x250


def test_parameters_that_are_not_known_go_the_long_road() -> None:
    assert calls.mechanism_of(0x1041, None).parameter is None
    assert calls.mechanism_of(0x43, (SHA256, 2, 32)).parameter_bytes == 24
    assert calls.mechanism_of(0x1057, (False, None)) is None


def test_a_library_that_is_no_module_is_refused() -> None:
    with pytest.raises((OSError, AttributeError)):
        calls.SignCalls("libc.so.6")


ROADS = """
import sys
from cryptography.hazmat.primitives.serialization import load_der_public_key
from keyreeve_common.schemes import KeyType, SignatureScheme, schemes_of
from keyreeve_common.verification import verify_signature
from keyreeve_keyserver.backends.pkcs11_token import Token, TokenSettings
from keyreeve_keyserver.backends.worker_frames import TokenSignItem
from keyreeve_keyserver.domain.secret import Secret

module, uri, conf, pin = sys.argv[1:]
token = Token(TokenSettings(module, uri, conf), Secret(pin.encode()))


class LongRoad(Exception):
    pass


class Closed:
    def __init__(self, handle):
        self.handle = handle

    def sign(self, *_args, **_kwargs):
        raise LongRoad


for key_type in KeyType:
    ref = key_type.value
    spki = bytes.fromhex(token.create(ref, ref, key_type)["spki_der"])
    token._keys[ref] = Closed(token._private_key(ref, b"").handle)
    for scheme in schemes_of(key_type):
        signature = token.sign(TokenSignItem(ref, scheme, 2**63, b"message"))
        verify_signature(load_der_public_key(spki), scheme, b"message", signature=signature)
        print(scheme.name)
token._keys[KeyType.EC_P256.value] = Closed(4_000_000)
try:
    token.sign(TokenSignItem(KeyType.EC_P256.value, SignatureScheme.ECDSA_SECP256R1_SHA256, 2**63, b"message"))
except LongRoad:
    print("long road")
"""


@pytest.mark.softhsm
@needs_softhsm
def test_every_scheme_takes_the_short_road_and_a_refusal_the_long_one(tmp_path: Path) -> None:
    """python-pkcs11's own road is closed: what signs, signs without it; what the token refuses is asked there."""
    token = make_softhsm_token(tmp_path / "softhsm")
    arguments = [str(token.module), f"pkcs11:serial={token.serial}", str(token.conf), token.pin]
    ended = subprocess.run([sys.executable, "-c", ROADS, *arguments], check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    signed = ended.stdout.split("\n")
    assert {scheme.name for scheme in SignatureScheme} == set(signed[:-2])
    assert signed[-2:] == ["long road", ""]
