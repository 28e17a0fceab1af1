"""TBSCertLists: only our refusals come out, and what is accepted passes a check written apart from the parser."""

from __future__ import annotations

import sys
from datetime import timedelta

from cryptography import x509
from der_mutation import mutate
from harness import main
from keyreeve_common.errors import ProfileViolation, PurposeMismatch
from keyreeve_common.schemes import SignatureScheme
from keyreeve_keyserver.domain.purposes.x509_crl import check_x509_crl
from keyreeve_testing.statements import HOUR, authority_record
from keyreeve_testing.tbs import AUTHORITY_NAME, NOW

_RECORD = authority_record()
_ALGORITHM = bytes.fromhex("300a06082a8648ce3d040302")
_KNOWN = {x509.AuthorityKeyIdentifier.oid, x509.CRLNumber.oid, x509.IssuingDistributionPoint.oid}
_MINUTE = timedelta(minutes=1)


def target(data: bytes) -> str:
    try:
        check_x509_crl(data, _RECORD, SignatureScheme.ECDSA_SECP256R1_SHA256, NOW)
    except (PurposeMismatch, ProfileViolation) as error:
        return error.detail[:70]
    recheck(data)
    return "accepted"


def recheck(data: bytes) -> None:
    body = data + _ALGORITHM + b"\x03\x01\x00"
    length = len(body).to_bytes(4, "big")
    crl = x509.load_der_x509_crl(_outer(body, length))
    expect(crl.tbs_certlist_bytes == data, "re-encoding differs")
    expect(crl.issuer == AUTHORITY_NAME, "issuer")
    expect(crl.next_update_utc is not None, "nextUpdate")
    expect(-_MINUTE <= crl.last_update_utc - NOW <= _MINUTE, "thisUpdate")
    if crl.next_update_utc is not None:
        expect(timedelta(0) < crl.next_update_utc - crl.last_update_utc <= HOUR, "life")
        expect(crl.next_update_utc > NOW, "ended")
    found = {extension.oid: extension.value for extension in crl.extensions}
    expect({x509.AuthorityKeyIdentifier.oid, x509.CRLNumber.oid} <= found.keys() <= _KNOWN, "extensions")
    point = found.get(x509.IssuingDistributionPoint.oid)
    expect(not isinstance(point, x509.IssuingDistributionPoint) or not point.indirect_crl, "indirect")
    serials = [entry.serial_number for entry in crl]
    expect(len(set(serials)) == len(serials) and all(0 < serial < 1 << 160 for serial in serials), "serial numbers")
    for entry in crl:
        expect(entry.revocation_date_utc <= NOW + _MINUTE, "revocationDate")
        kinds = {extension.oid for extension in entry.extensions}
        expect(kinds <= {x509.CRLReason.oid, x509.InvalidityDate.oid}, "extensions of an entry")


def _outer(body: bytes, length: bytes) -> bytes:
    octets = length.lstrip(b"\x00")
    head = octets if len(body) < 0x80 else bytes((0x80 | len(octets),)) + octets
    return b"\x30" + head + body


def expect(condition: bool, rule: str) -> None:
    if not condition:
        raise AssertionError(f"accepted against the rule: {rule}")


if __name__ == "__main__":
    sys.exit(main(target, "x509_crl", mutator=mutate))
