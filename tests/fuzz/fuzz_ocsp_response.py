"""ResponseData: only our refusals come out, and what is accepted passes a check written apart from the parser."""

from __future__ import annotations

import hashlib
import sys
from datetime import timedelta

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import ocsp
from der_mutation import mutate
from harness import main
from keyreeve_common.errors import ProfileViolation, PurposeMismatch
from keyreeve_common.schemes import SignatureScheme
from keyreeve_keyserver.domain.der import encode
from keyreeve_keyserver.domain.purposes.ocsp_response import check_ocsp_response
from keyreeve_testing.statements import HOUR, authority_record
from keyreeve_testing.tbs import AUTHORITY_KEY, AUTHORITY_NAME, NOW

_RECORD = authority_record()
_POINT = AUTHORITY_KEY.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
_ALGORITHM = bytes.fromhex("300a06082a8648ce3d040302")
_BASIC = bytes.fromhex("06092b0601050507300101")
_MINUTE = timedelta(minutes=1)


def target(data: bytes) -> str:
    try:
        check_ocsp_response(data, _RECORD, SignatureScheme.ECDSA_SECP256R1_SHA256, NOW)
    except (PurposeMismatch, ProfileViolation) as error:
        return error.detail[:70]
    recheck(data)
    return "accepted"


def recheck(data: bytes) -> None:
    basic = encode(0x30, data, _ALGORITHM, b"\x03\x01\x00")
    whole = encode(0x30, b"\x0a\x01\x00", encode(0xA0, encode(0x30, _BASIC, encode(4, basic))))
    response = ocsp.load_der_ocsp_response(whole)
    expect(response.tbs_response_bytes == data, "re-encoding differs")
    by_name = response.responder_name == AUTHORITY_NAME
    by_key = response.responder_key_hash == hashlib.sha1(_POINT).digest()  # noqa: S324 - RFC 6960's KeyHash
    expect(by_name != by_key, "responder")
    expect(-_MINUTE <= response.produced_at_utc - NOW <= _MINUTE, "producedAt")
    for single in response.responses:
        own = hashlib.new(single.hash_algorithm.name, _POINT).digest()
        name = hashlib.new(single.hash_algorithm.name, AUTHORITY_NAME.public_bytes()).digest()
        expect((single.issuer_key_hash, single.issuer_name_hash) == (own, name), "issuer")
        expect(0 < single.serial_number < 1 << 160, "serial number")
        expect(single.next_update_utc is not None, "nextUpdate")
        expect(-_MINUTE <= single.this_update_utc - NOW <= _MINUTE, "thisUpdate")
        if single.next_update_utc is not None:
            expect(timedelta(0) < single.next_update_utc - single.this_update_utc <= HOUR, "life")
        expect(single.revocation_time_utc is None or single.revocation_time_utc <= NOW + _MINUTE, "revocationTime")


def expect(condition: bool, rule: str) -> None:
    if not condition:
        raise AssertionError(f"accepted against the rule: {rule}")


if __name__ == "__main__":
    sys.exit(main(target, "ocsp_response", mutator=mutate))
