"""Node attestation by join token, and what is read from a node's certificate request.

A token is 256 random bits, shown once; only its SHA-256 is kept. It works once: whoever takes it proves that exactly one row went away. Unknown,
used and expired tokens are refused with the same words.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from keyreeve_common.errors import InvalidRequest, JoinTokenInvalid, KeyTypeNotSupported
from keyreeve_common.identity import SpiffeId, TrustDomain
from keyreeve_common.schemes import key_type_of

from keyreeve_ca.domain.entries import AGENT_PATH, is_agent_id

TOKEN_BYTES = 32
DEFAULT_TOKEN_TTL = timedelta(minutes=10)
MAX_TOKEN_TTL = timedelta(hours=24)
MAX_CSR_BYTES = 16_384
MAX_VERSION_BYTES = 255
ATTESTATION_TYPE = "join_token"
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)
_REFUSAL = "join token is unknown, used or expired; ask for a new one"


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What is kept of a token."""

    token_hash: bytes
    agent_id: SpiffeId
    expires_at: datetime


def token_text(entropy: bytes) -> str:
    """The token as it is shown, once."""
    if len(entropy) != TOKEN_BYTES:
        raise ValueError(f"a join token needs {TOKEN_BYTES} bytes of entropy")
    return base64.urlsafe_b64encode(entropy).rstrip(b"=").decode("ascii")


def token_hash(token: str) -> bytes:
    """The hash by which a token is looked up. Raises: JoinTokenInvalid for what cannot be a token."""
    if _TOKEN.fullmatch(token) is None:
        raise refused_token()
    return sha256(token.encode("ascii")).digest()


def refused_token() -> JoinTokenInvalid:
    """The one refusal, whatever is wrong with the token."""
    return JoinTokenInvalid(_REFUSAL)


def check_token_ttl(ttl: timedelta | None) -> timedelta:
    """Raises: InvalidRequest."""
    chosen = DEFAULT_TOKEN_TTL if ttl is None else ttl
    if not timedelta(seconds=1) <= chosen <= MAX_TOKEN_TTL:
        raise InvalidRequest("ttl of a join token is not between 1 second and 24 hours")
    return chosen


def agent_id_for(text: str, trust_domain: TrustDomain, entropy: bytes) -> SpiffeId:
    """The agent's SPIFFE ID: as asked for, or a random one. Raises: InvalidRequest, InvalidSpiffeId."""
    if not text:
        return SpiffeId(trust_domain, AGENT_PATH + entropy[:16].hex())
    agent_id = SpiffeId.parse(text)
    if not agent_id.member_of(trust_domain):
        raise InvalidRequest(f"agent_id is not in trust domain {trust_domain}")
    if not is_agent_id(agent_id):
        raise InvalidRequest(f"agent_id is not {AGENT_PATH}<name>")
    return agent_id


def public_key_of_csr(csr_der: bytes) -> CertificatePublicKeyTypes:
    """The public key in a PKCS#10 request that is signed by that very key; nothing else in it counts.

    Raises: InvalidRequest, KeyTypeNotSupported.
    """
    if len(csr_der) > MAX_CSR_BYTES:
        raise InvalidRequest(f"CSR is longer than {MAX_CSR_BYTES} bytes")
    try:
        csr = x509.load_der_x509_csr(csr_der)
        signed, public_key = csr.is_signature_valid, csr.public_key()
    except UnsupportedAlgorithm as error:
        raise KeyTypeNotSupported("CSR is signed with an algorithm that is not offered") from error
    except ValueError as error:
        raise InvalidRequest("CSR is not a DER PKCS#10 request") from error
    if not signed:
        raise InvalidRequest("CSR is not signed by its own key")
    key_type_of(public_key)
    return public_key


def check_agent_version(text: str) -> str:
    """Raises: InvalidRequest."""
    if len(text.encode(errors="replace")) > MAX_VERSION_BYTES or not (text.isprintable() or not text):
        raise InvalidRequest("agent_version is longer than 255 bytes or not printable")
    return text
