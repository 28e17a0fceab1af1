"""CertificationRequestInfos: only our refusal comes out, and what is accepted asks for this very key."""

from __future__ import annotations

import sys

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from der_mutation import mutate
from harness import main
from keyreeve_common.errors import PurposeMismatch
from keyreeve_keyserver.domain.purposes.certificate_request import check_certificate_request
from keyreeve_testing.tbs import LEAF_KEY, handshake_record

_RECORD = handshake_record()
_SPKI = LEAF_KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def target(data: bytes) -> str:
    try:
        check_certificate_request(data, _RECORD)
    except PurposeMismatch as error:
        return error.detail[:60]
    at = data.find(_SPKI)
    if at < 0 or load_der_public_key(data[at : at + len(_SPKI)]) != LEAF_KEY.public_key():
        raise AssertionError("accepted a request that does not hold this key")
    if data[0] != 0x30 or data.count(_SPKI) < 1:
        raise AssertionError("accepted something other than a SEQUENCE")
    return "accepted"


if __name__ == "__main__":
    sys.exit(main(target, "certificate_request", mutator=mutate))
