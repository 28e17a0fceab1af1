"""Writes the seeds under corpus/. Run it again when a form changes: `python tests/fuzz/make_corpus.py`."""

from __future__ import annotations

import ipaddress
from datetime import timedelta

from cryptography import x509
from harness import CORPUS
from keyreeve_common.errors import KeyNotFound, TokenUnavailable
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import Purpose, build_tls13_content
from keyreeve_common.schemes import KeyType, SignatureScheme
from keyreeve_keyserver import frames
from keyreeve_keyserver.backends import worker_frames as worker
from keyreeve_testing import tbs

_ITEM = frames.SignItem(1, KeyId("key-1"), 0x0403, 1, 2000, build_tls13_content(Purpose.TLS13_SERVER_VERIFY, bytes(32)))
_URI = x509.UniformResourceIdentifier(tbs.URI)
_SIGN = worker.TokenSignItem("key-1", SignatureScheme.ECDSA_SECP256R1_SHA256, 2000, b"message")
_ADDRESS = x509.IPAddress(ipaddress.ip_address("10.0.0.1"))
SEEDS: dict[str, dict[str, bytes]] = {
    "frames": {
        "batch": frames.SignBatch(7, "spiffe://td.test/agent/a", (_ITEM,)).to_bytes()[4:],
        "batch_local": frames.SignBatch(8, "local", (_ITEM, tbs.changed(_ITEM, id=2, message=b""))).to_bytes()[4:],
        "control": frames.Control(1, "create_key", {"key_id": "k", "purposes": ["tls13_server_verify"]}).to_bytes()[4:],
        "results": frames.SignResults(7, (frames.Signed(1, b"s" * 70), frames.Refused(2, KeyNotFound()))).to_bytes()[
            4:
        ],
        "control_ok": frames.ControlOk(1, {"keys_loaded": 3}).to_bytes()[4:],
        "control_refused": frames.ControlRefused(1, TokenUnavailable("gone", retry_after=timedelta(1))).to_bytes()[4:],
        "malformed": frames.Malformed(KeyNotFound("why")).to_bytes()[4:],
        "stream": frames.Control(1, "health").to_bytes() * 2,
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
        "signed": worker.TokenSigned((b"s" * 70, KeyNotFound())).to_bytes()[4:],
        "boxed": worker.Boxed(b"d" * 17).to_bytes()[4:],
    },
    "tls13": {
        f"{purpose.label}_{length}": build_tls13_content(purpose, bytes(range(length)))
        for purpose in (Purpose.TLS13_SERVER_VERIFY, Purpose.TLS13_CLIENT_VERIFY)
        for length in (32, 48)
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

if __name__ == "__main__":
    for name, seeds in SEEDS.items():
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        for seed, data in seeds.items():
            (CORPUS / name / seed).write_bytes(data)
