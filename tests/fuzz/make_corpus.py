"""Writes the seeds under corpus/. Run it again when a form changes: `python tests/fuzz/make_corpus.py`."""

from __future__ import annotations

import ipaddress
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from harness import CORPUS
from keyreeve_common.errors import KeyNotFound, TokenUnavailable
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_common.sign_batch import pack_items, pack_results, with_count
from keyreeve_common.sign_socket import PingFrame, SignFrame
from keyreeve_common.transparency.checkpoint import Checkpoint, cosign
from keyreeve_common.transparency.journal import build_group
from keyreeve_common.transparency.note import COSIGNATURE_V1, VerifierKey, parse_note
from keyreeve_common.transparency.records import Mark, Source
from keyreeve_common.transparency.tiles import join_entries
from keyreeve_common.wire import bytes16
from keyreeve_keyserver import frames
from keyreeve_keyserver.backends import worker_frames as worker
from keyreeve_testing import statements, tbs, tls12
from keyreeve_testing.audit import audit_record

_SIGN_FRAME = SignFrame(1, 3000, 0x0403, 1, KeyId("key-1"), build_tls13_content(Purpose.TLS13_SERVER_VERIFY, bytes(32)))
_ITEM = frames.SignItem(1, KeyId("key-1"), 0x0403, 1, 2000, build_tls13_content(Purpose.TLS13_SERVER_VERIFY, bytes(32)))
_TRACED = _ITEM._replace(trace=b"\x01" * 24 + b"\x00")
_URI = x509.UniformResourceIdentifier(tbs.URI)
_SIGN = worker.TokenSignItem("key-1", SignatureScheme.ECDSA_SECP256R1_SHA256, 2_000_000, b"message")
_OCSP = statements.Ocsp()
_CRL = statements.Crl()
_REASON = (x509.CRLReason(x509.ReasonFlags.superseded), False)
_SINCE = (x509.InvalidityDate(datetime(2026, 1, 1)), False)
_POINT = x509.IssuingDistributionPoint(
    [x509.UniformResourceIdentifier("https://a")], None, False, False, None, False, False
)
_ADDRESS = x509.IPAddress(ipaddress.ip_address("10.0.0.1"))


def _failed(detail: bytes) -> bytes:
    """An answer of a worker whose `detail` this side did not write."""
    return bytes((worker.VERSION, worker.REFUSED, TokenUnavailable("").rendering.wire)) + bytes16(detail)


def _seal(covered: bytes) -> bytes:
    return bytes(32)


SEEDS: dict[str, dict[str, bytes]] = {
    "client_frames": {
        "two_signs_and_a_ping": _SIGN_FRAME.to_bytes() * 2 + PingFrame(b"ping").to_bytes(),
        "cut": _SIGN_FRAME.to_bytes()[:-1],
        "short_message": SignFrame(3, 1000, 0x0403, 1, KeyId("key-1"), bytes(4)).to_bytes(),
        "malformed_in_the_middle": _SIGN_FRAME.to_bytes() + b"\0\0\0\2\2\1" + _SIGN_FRAME.to_bytes(),
    },
    "frames": {
        "batch": frames.SignBatch(7, "spiffe://td.test/agent/a", (_ITEM,)).to_bytes()[4:],
        "batch_local": frames.SignBatch(8, "local", (_ITEM, _ITEM._replace(id=2, message=b""))).to_bytes()[4:],
        "control": frames.Control(1, "create_key", {"key_id": "k", "purposes": ["tls13_server_verify"]}).to_bytes()[4:],
        "results": frames.SignResults(7, (frames.Signed(1, b"s" * 70), frames.Refused(2, KeyNotFound()))).to_bytes()[
            4:
        ],
        "control_ok": frames.ControlOk(1, {"keys_loaded": 3}).to_bytes()[4:],
        "control_refused": frames.ControlRefused(1, TokenUnavailable("gone", retry_after=timedelta(1))).to_bytes()[4:],
        "malformed": frames.Malformed(KeyNotFound("why")).to_bytes()[4:],
        "stream": frames.Control(1, "health").to_bytes() * 2,
    },
    "sign_batch": {
        "items": with_count(2, pack_items([_TRACED, _TRACED._replace(id=2, message=b"")])),
        "results": with_count(2, pack_results([frames.Signed(1, b"s" * 70), frames.Refused(2, KeyNotFound())])),
    },
    "worker_frames": {
        "open": worker.Open().to_bytes()[4:],
        "create": worker.Create("ref-1", "key-1", KeyType.EC_P256).to_bytes()[4:],
        "find": worker.Find("key-1").to_bytes()[4:],
        "destroy": worker.Destroy("key-1").to_bytes()[4:],
        "ping": worker.Ping().to_bytes()[4:],
        "sign": worker.TokenSign((_SIGN, _SIGN)).to_bytes()[4:],
        "box": worker.Box(decrypt=True, label="kek", nonce=bytes(12), associated=b"h", data=b"d").to_bytes()[4:],
        "done": worker.Done({"key_types": ["ec-p256"]}).to_bytes()[4:],
        "failed": worker.Failed(TokenUnavailable("gone")).to_bytes()[4:],
        "failed_cut_at_a_space": _failed(
            b"\xff" * 339 + b"ab and more"
        ),  # each wrong byte becomes three: the cut falls on the space
        "signed": worker.TokenSigned((b"s" * 70, KeyNotFound())).to_bytes()[4:],
        "boxed": worker.Boxed(b"d" * 17).to_bytes()[4:],
    },
    "tls13": {
        f"{purpose.label}_{length}": build_tls13_content(purpose, bytes(range(length)))
        for purpose in (Purpose.TLS13_SERVER_VERIFY, Purpose.TLS13_CLIENT_VERIFY)
        for length in (32, 48)
    },
    "tls12": {
        **{f"exchange_{curve:04x}": tls12.key_exchange(curve) for curve in (*tls12.CURVES, *tls12.STRINGS)},
        "transcript": tls12.Transcript().to_bytes(),
        "transcript_x25519": tls12.Transcript(curve=0x001D, status=b"\x01" + tls12.vector(3, b"ocsp")).to_bytes(),
        "transcript_bare": tls12.Transcript(
            client_hello=tls12.hello(tail=b"\x00\x02\xc0\x2b\x01\x00", session=b"", extensions=None), authorities=b""
        ).to_bytes(),
        "transcript_other_key": tls12.Transcript(
            own_certificate=tls12.certificates(statements.authority_certificate().public_bytes(Encoding.DER))
        ).to_bytes(),
    },
    "x509_crl": {
        "revoked": _CRL.tbs(),
        "empty": statements.changed(_CRL, serials=()).tbs(),
        "entries": statements.changed(_CRL, entry_extensions=(_REASON, _SINCE)).tbs(),
        "point": statements.changed(_CRL, extensions=(*_CRL.extensions, (_POINT, True))).tbs(),
        "delta": statements.changed(_CRL, extensions=(*_CRL.extensions, (x509.DeltaCRLIndicator(1), True))).tbs(),
    },
    "ocsp_response": {
        name: statements.at_production(response.tbs())
        for name, response in {
            "good": _OCSP,
            "by_name": statements.changed(_OCSP, by_name=True, extensions=()),
            "unknown": statements.changed(_OCSP, status=ocsp.OCSPCertStatus.UNKNOWN),
            "revoked": statements.changed(
                _OCSP,
                status=ocsp.OCSPCertStatus.REVOKED,
                revoked_at=tbs.NOW - statements.HOUR,
                reason=x509.ReasonFlags.key_compromise,
                algorithm=hashes.SHA256,
            ),
        }.items()
    },
    "jwt_svid": {
        "token": statements.token(),
        "full": statements.token(statements.claims(aud="db", nbf=int(tbs.NOW.timestamp()), iss="https://a", jti="1")),
        "bare": statements.token(statements.claims(iat=None)),
        "foreign": statements.token(statements.claims(sub="spiffe://other.test/a")),
        "late": statements.token(statements.claims(exp=int(tbs.NOW.timestamp()) + 3600)),
    },
    "tbs_certificate": {
        "leaf": tbs.LEAF.tbs(),
        "ca": tbs.CA.tbs(),
        "leaf_bare": tbs.changed(tbs.LEAF, names=(_URI,), constraints=None).tbs(),
        "leaf_no_subject": tbs.changed(tbs.LEAF, subject=x509.Name([]), san_critical=True).tbs(),
        "leaf_address": tbs.changed(tbs.LEAF, names=(_URI, _ADDRESS)).tbs(),
        "ca_constraints": tbs.changed(tbs.CA, more=((x509.NameConstraints([_URI], None), True),)).tbs(),
    },
    "certificate_request": {
        "bare": tbs.certification_request_info(tbs.LEAF_KEY),
        "san": tbs.certification_request_info(tbs.LEAF_KEY, x509.SubjectAlternativeName([_URI])),
        "other_key": tbs.certification_request_info(tbs.AUTHORITY_KEY),
    },
}

_LOG_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
_PUBLIC = _LOG_KEY.public_key().public_bytes_raw()
_LOG, _WITNESS = VerifierKey("example.org/log", _PUBLIC), VerifierKey("example.org/witness", _PUBLIC, COSIGNATURE_V1)
_HEAD = Checkpoint(_LOG.name, 703, bytes(range(32))).sign(_LOG, _LOG_KEY.sign)
SEEDS |= {
    "audit_record": {
        "signature": audit_record(1).to_bytes(),
        "refusal": audit_record(
            2, event="refusal", code=16, signature_hash=b"", marks=Mark.DIGEST, purpose=10
        ).to_bytes(),
        "grant": audit_record(
            3, source=Source.FRONT_END, event="grant_created", details=(("a", ""), ("holder", "spiffe://example.org/x"))
        ).to_bytes(),
    },
    "checkpoint": {
        "checkpoint": _HEAD,
        "cosigned": cosign(parse_note(_HEAD), _WITNESS, timestamp=1_700_000_000, sign=_LOG_KEY.sign).to_bytes(),
        "vkey": f"{_LOG}\n".encode(),
        "witness_vkey": str(_WITNESS).encode(),
        "bundle": join_entries([audit_record(1).to_bytes(), b"", b"x"]),
        "journal": build_group(7, [b"one", b"two"], _seal) + build_group(9, [b"three"], _seal),
    },
}

if __name__ == "__main__":
    for name, seeds in SEEDS.items():
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        for seed, data in seeds.items():
            (CORPUS / name / seed).write_bytes(data)
