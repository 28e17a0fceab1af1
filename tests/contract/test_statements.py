"""What the real signer signs for CRLs, OCSP responses, JWT-SVIDs and digests, read and verified by others: `cryptography` and openssl(1)."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key
from cryptography.x509 import ocsp
from keyreeve_common.errors import InvalidRequest, ProfileViolation, PurposeMismatch, PurposeNotPermitted
from keyreeve_common.jws import build_jwt, build_jwt_signing_input
from keyreeve_common.key_id import KeyId
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import SignatureScheme
from keyreeve_keyserver import frames
from keyreeve_keyserver.domain.der import BIT_STRING, OCTET_STRING, SEQUENCE, encode
from keyreeve_keyserver.domain.purposes.tbs_certificate import ALGORITHM_DER
from keyreeve_testing.signer import SignerClient, running_signer, write_signer_config
from keyreeve_testing.statements import Crl, Ocsp, at_production, changed
from keyreeve_testing.tbs import AUTHORITY_KEY, AUTHORITY_NAME, LEAF, Draft

P256 = SignatureScheme.ECDSA_SECP256R1_SHA256
PSS256 = SignatureScheme.RSA_PSS_RSAE_SHA256
PROFILE = {
    "trust_domain": "td.test",
    "kind": "issuing",
    "subject_der": base64.b64encode(AUTHORITY_NAME.public_bytes()).decode(),
    "max_validity_s": 3600,
    "max_backdate_s": 60,
    "max_path_length": None,
}
AUTHORITY_PURPOSES = ["x509_certificate", "x509_crl", "ocsp_response"]


@dataclass(frozen=True)
class Signer:
    """The process with an authority, a JWT authority and a key that signs digests."""

    client: SignerClient
    spki: dict[str, bytes]
    log: Path

    def key(self, key_id: str) -> Any:
        return load_der_public_key(self.spki[key_id])

    def ask(self, key_id: str, purpose: int, message: bytes, scheme: SignatureScheme = P256) -> frames.SignResult:
        item = frames.SignItem(1, KeyId(key_id), scheme, purpose, 20_000, message)
        return self.client.sign(item, caller="spiffe://td.test/keyreeve/ca")[1]

    def sign(self, key_id: str, purpose: int, message: bytes, scheme: SignatureScheme = P256) -> bytes:
        result = self.ask(key_id, purpose, message, scheme)
        assert isinstance(result, frames.Signed), result
        return result.signature

    def refusal(self, key_id: str, purpose: int, message: bytes, scheme: SignatureScheme = P256) -> Exception:
        result = self.ask(key_id, purpose, message, scheme)
        assert isinstance(result, frames.Refused), "signed"
        return result.error


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signer]:
    directory = tmp_path_factory.mktemp("signer")
    log = directory / "signer.log"
    made: dict[str, dict[str, Any]] = {
        "authority": {"role": "authority", "purposes": AUTHORITY_PURPOSES, "authority_profile": PROFILE},
        "tokens": {
            "role": "jwt-authority",
            "purposes": ["jwt_svid"],
            "jwt_profile": {"trust_domain": "td.test", "max_ttl_s": 300},
        },
        "tokens-rsa": {
            "key_type": "rsa-2048",
            "role": "jwt-authority",
            "purposes": ["jwt_svid"],
            "jwt_profile": {"trust_domain": "td.test", "max_ttl_s": 300},
        },
        "digests": {"role": "handshake", "purposes": ["digest"]},
        "digests-rsa": {"key_type": "rsa-2048", "role": "handshake", "purposes": ["digest"]},
    }
    with running_signer(write_signer_config(directory / "etc"), log=log) as client:
        spki = {}
        for key_id, arguments in made.items():
            answer = client.control("create_key", **{"key_id": key_id, "key_type": "ec-p256", **arguments})
            client.control("load_key", record=answer["record"])
            spki[key_id] = base64.b64decode(answer["spki_der"])
        yield Signer(client, spki, log)


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def certificate_of(signer: Signer) -> x509.Certificate:
    """A certificate with the authority's name and key, signed by nobody who counts: the tools need it to hold the key."""
    builder = x509.CertificateBuilder().subject_name(AUTHORITY_NAME).issuer_name(AUTHORITY_NAME).serial_number(1)
    builder = builder.not_valid_before(now() - timedelta(hours=1)).not_valid_after(now() + timedelta(hours=1))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return builder.public_key(signer.key("authority")).sign(AUTHORITY_KEY, hashes.SHA256())


def signed(tbs: bytes, signature: bytes) -> bytes:
    return encode(SEQUENCE, tbs, ALGORITHM_DER[P256], encode(BIT_STRING, b"\x00" + signature))


def openssl(*arguments: str | Path) -> str:
    command = ["openssl", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def crl_of(**changes: Any) -> Crl:
    return changed(Crl(), this_update=now(), next_update=now() + timedelta(minutes=50), **changes)


def test_a_crl_verifies(signer: Signer, tmp_path: Path) -> None:
    tbs = crl_of(serials=(77,)).tbs()
    crl = x509.load_der_x509_crl(signed(tbs, signer.sign("authority", Purpose.X509_CRL, tbs)))
    assert crl.is_signature_valid(signer.key("authority"))
    assert crl.get_revoked_certificate_by_serial_number(77) is not None
    (tmp_path / "crl.pem").write_bytes(crl.public_bytes(Encoding.PEM))
    (tmp_path / "ca.pem").write_bytes(certificate_of(signer).public_bytes(Encoding.PEM))
    shown = openssl("crl", "-in", tmp_path / "crl.pem", "-CAfile", tmp_path / "ca.pem", "-noout", "-text")
    assert "verify OK" in shown
    assert "Serial Number: 4D" in shown


def response_of(signer: Signer, leaf: Draft, **changes: Any) -> bytes:
    authority = certificate_of(signer)
    draft = changed(
        Ocsp(),
        this_update=now(),
        next_update=now() + timedelta(minutes=50),
        leaf=leaf,
        issuer=authority,
        extensions=(),
        **changes,
    )
    # By name: `cryptography` takes a responder's key hash only with the private key at hand.
    tbs = changed(draft, by_name=True).tbs()
    return at_production(tbs, now())


def test_an_ocsp_response_verifies(signer: Signer, tmp_path: Path) -> None:
    tbs = response_of(signer, LEAF)
    basic = signed(tbs, signer.sign("authority", Purpose.OCSP_RESPONSE, tbs))
    inner = encode(SEQUENCE, bytes.fromhex("06092b0601050507300101"), encode(OCTET_STRING, basic))
    whole = encode(SEQUENCE, b"\x0a\x01\x00", encode(0xA0, inner))
    response = ocsp.load_der_ocsp_response(whole)
    signer.key("authority").verify(response.signature, response.tbs_response_bytes, ec.ECDSA(hashes.SHA256()))
    assert response.certificate_status is ocsp.OCSPCertStatus.GOOD
    for name, data in (
        ("response.der", whole),
        ("ca.pem", certificate_of(signer).public_bytes(Encoding.PEM)),
        ("leaf.pem", LEAF.certificate().public_bytes(Encoding.PEM)),
    ):
        (tmp_path / name).write_bytes(data)
    shown = openssl(
        "ocsp", "-respin", tmp_path / "response.der", "-issuer", tmp_path / "ca.pem", "-cert", tmp_path / "leaf.pem",
        "-VAfile", tmp_path / "ca.pem", "-no_nonce",
    )  # fmt: skip
    assert "Response verify OK" in shown
    assert "leaf.pem: good" in shown


def claims(**changes: Any) -> dict[str, Any]:
    clock = int(now().timestamp())
    return {"sub": "spiffe://td.test/ns/a", "aud": ["db"], "iat": clock, "exp": clock + 240} | changes


def test_tokens_verify_by_hand(signer: Signer) -> None:
    """Spec: RFC 7515 5.2 and appendix A.3: r and s of ES256 stand side by side."""
    message = build_jwt_signing_input(P256, "tokens", claims())
    token = build_jwt(P256, message, signer.sign("tokens", Purpose.JWT_SVID, message))
    head, body, last = token.split(".")
    signature = base64.urlsafe_b64decode(last + "==")
    assert len(signature) == 64
    der = encode_dss_signature(int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
    signer.key("tokens").verify(der, f"{head}.{body}".encode(), ec.ECDSA(hashes.SHA256()))
    assert json.loads(base64.urlsafe_b64decode(head + "==")) == {"alg": "ES256", "kid": "tokens", "typ": "JWT"}
    assert json.loads(base64.urlsafe_b64decode(body + "=="))["sub"] == "spiffe://td.test/ns/a"


@pytest.mark.parametrize("scheme", [SignatureScheme.RSA_PKCS1_SHA256, SignatureScheme.RSA_PSS_RSAE_SHA512])
def test_rsa_tokens_verify_by_hand(signer: Signer, scheme: SignatureScheme) -> None:
    message = build_jwt_signing_input(scheme, "tokens-rsa", claims())
    token = build_jwt(scheme, message, signer.sign("tokens-rsa", Purpose.JWT_SVID, message, scheme))
    signature = base64.urlsafe_b64decode(token.rpartition(".")[2] + "==")
    key = signer.key("tokens-rsa")
    assert isinstance(key, rsa.RSAPublicKey)
    if scheme is SignatureScheme.RSA_PKCS1_SHA256:
        key.verify(signature, message, padding.PKCS1v15(), hashes.SHA256())
    else:
        key.verify(signature, message, padding.PSS(padding.MGF1(hashes.SHA512()), 64), hashes.SHA512())


def test_digests_verify_and_each_batch_is_in_the_log(signer: Signer, tmp_path: Path) -> None:
    message = b"what the signer never sees"
    digest = hashlib.sha256(message).digest()
    signature = signer.sign("digests", Purpose.DIGEST, digest)
    signer.key("digests").verify(signature, digest, ec.ECDSA(Prehashed(hashes.SHA256())))
    der = signer.sign("digests-rsa", Purpose.DIGEST, digest, SignatureScheme.RSA_PKCS1_SHA256)
    for name, data in (("message", message), ("signature", der), ("key.der", signer.spki["digests-rsa"])):
        (tmp_path / name).write_bytes(data)
    shown = openssl("dgst", "-sha256", "-verify", tmp_path / "key.der", "-keyform", "DER", "-signature", tmp_path / "signature",
                    tmp_path / "message")  # fmt: skip
    assert "Verified OK" in shown
    lines = [json.loads(line) for line in signer.log.read_text().splitlines()]
    found = [line for line in lines if line["event"] == "signing_digest"]
    assert {line["key_id"] for line in found} >= {"digests", "digests-rsa"}
    assert all(line["level"] == "warning" and line["caller"] == "spiffe://td.test/keyreeve/ca" for line in found)
    assert any(line["event"] == "digest_key_created" and line["key_id"] == "digests" for line in lines)
    assert digest.hex() not in signer.log.read_text()


def test_the_ca_cannot_go_beyond_the_profile(signer: Signer) -> None:
    late = now() + timedelta(hours=2)
    beyond = changed(Crl(), this_update=now(), next_update=late).tbs()
    assert isinstance(signer.refusal("authority", Purpose.X509_CRL, beyond), ProfileViolation)
    foreign = crl_of(issuer=x509.Name([])).tbs()
    assert isinstance(signer.refusal("authority", Purpose.X509_CRL, foreign), ProfileViolation)
    for wrong in (claims(sub="spiffe://other.test/a"), claims(exp=int(now().timestamp()) + 3000)):
        message = build_jwt_signing_input(P256, "tokens", wrong)
        assert isinstance(signer.refusal("tokens", Purpose.JWT_SVID, message), ProfileViolation)
    message = build_jwt_signing_input(P256, "authority", claims())
    assert isinstance(signer.refusal("authority", Purpose.JWT_SVID, message), PurposeNotPermitted)
    assert isinstance(signer.refusal("tokens", Purpose.JWT_SVID, message), PurposeMismatch)
    assert isinstance(signer.refusal("tokens", Purpose.DIGEST, bytes(32)), PurposeNotPermitted)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"role": "jwt-authority", "purposes": ["jwt_svid"]}, "needs a jwt_profile"),
        ({"role": "jwt-authority", "purposes": ["jwt_svid", "digest"]}, "cannot have purpose digest"),
        ({"role": "authority", "purposes": ["x509_crl"]}, "x509_crl needs an authority_profile"),
        ({"role": "authority", "purposes": ["jwt_svid"]}, "cannot have purpose jwt_svid"),
        ({"role": "handshake", "purposes": ["digest"], "key_type": "ed25519"}, "ed25519 cannot have purpose digest"),
        (
            {"role": "handshake", "purposes": ["digest"], "jwt_profile": {"trust_domain": "td.test", "max_ttl_s": 9}},
            "only for",
        ),
        (
            {
                "role": "jwt-authority",
                "purposes": ["jwt_svid"],
                "jwt_profile": {"trust_domain": "td.test", "max_ttl_s": 86_401},
            },
            "max_ttl_s is not from 1 to 86400",
        ),
        (
            {
                "role": "jwt-authority",
                "purposes": ["jwt_svid"],
                "jwt_profile": {"trust_domain": "td.test", "max_ttl_s": 9, "x": 1},
            },
            "field missing or unknown: x",
        ),
    ],
)
def test_keys_that_cannot_be_are_refused(signer: Signer, arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(InvalidRequest, match=rule):
        signer.client.control("create_key", **{"key_id": "impossible", "key_type": "ec-p256", **arguments})
