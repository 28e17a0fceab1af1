"""What is measured: a scheme of Keyreeve beside the algorithm of `openssl speed` that it is held against."""

from __future__ import annotations

from dataclasses import dataclass

from keyreeve_common.schemes import KeyType, SignatureScheme


@dataclass(frozen=True, slots=True)
class BenchScheme:
    """`name` stands in the output; `speed` is an argument of openssl-speed(1)."""

    name: str
    key_type: KeyType
    scheme: SignatureScheme
    speed: str

    @property
    def ratio_name(self) -> str:
        return f"{self.name}_vs_openssl"


P256 = BenchScheme("p256", KeyType.EC_P256, SignatureScheme.ECDSA_SECP256R1_SHA256, "ecdsap256")
RSA2048 = BenchScheme("rsa2048", KeyType.RSA_2048, SignatureScheme.RSA_PSS_RSAE_SHA256, "rsa2048")
ED25519 = BenchScheme("ed25519", KeyType.ED25519, SignatureScheme.ED25519, "ed25519")
P384 = BenchScheme("p384", KeyType.EC_P384, SignatureScheme.ECDSA_SECP384R1_SHA384, "ecdsap384")
RSA3072 = BenchScheme("rsa3072", KeyType.RSA_3072, SignatureScheme.RSA_PSS_RSAE_SHA256, "rsa3072")
QUICK = (P256, RSA2048, ED25519, P384)
FULL = (*QUICK, RSA3072)
