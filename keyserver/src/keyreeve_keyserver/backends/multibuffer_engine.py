"""Signs up to eight requests in the time of one, in the lanes of AVX-512: `keyreeve_engine`, in C.

A call costs the same with one lane filled as with eight, so it pays from a number of waiting requests on that depends on the type of key and on
the processor. That number is measured with the first key of each type, in processor time, against OpenSSL on the same core. A type whose
first signature is wrong is not signed with here at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_private_key
from keyreeve_common.errors import Internal, KeyreeveError, KeySelfTestFailed
from keyreeve_common.schemes import DEFAULT_SCHEMES, KeyType, Padding, SignatureScheme, schemes_of
from keyreeve_common.telemetry import log, log_warning
from keyreeve_common.verification import verify_signature

from keyreeve_keyserver.backends.engines import EngineHealth, EngineUnusable, Handle, KeyUnsuited, Work
from keyreeve_keyserver.backends.openssl_engine import PrivateKey, sign_with
from keyreeve_keyserver.backends.ports import SignatureMismatch, SignOutcome

try:
    import keyreeve_engine
except ImportError:  # the extra `engine` is not installed
    keyreeve_engine = None  # type: ignore[assignment]

LANES = 8
# The numbers of native/multibuffer/{key,piece,status}.h.
_KINDS = {key_type: number for number, key_type in enumerate(KeyType)}
_HASHES = {"": 0, "sha256": 1, "sha384": 2, "sha512": 3}
_PSS, _PREHASHED, _UNKNOWN = 0x40, 0x80, 0x0F
_MISMATCH = 7
_FORMS: dict[KeyType, dict[SignatureScheme, int]] = {
    key_type: {
        scheme: _HASHES[scheme.facts.hash_name] | (_PSS if scheme.facts.padding is Padding.PSS else 0)
        for scheme in schemes_of(key_type)
    }
    for key_type in KeyType
}
# How many requests a thread takes at once: enough to make the hand-over cheap, few enough to leave some to another thread. One call for RSA-4096
# takes five to ten milliseconds, more than any piece of OpenSSL's; the express thread is what P-256 has against it.
_PIECES = {
    KeyType.EC_P256: 64,
    KeyType.EC_P384: 16,
    KeyType.ED25519: 64,
    KeyType.RSA_2048: 8,
    KeyType.RSA_3072: 8,
    KeyType.RSA_4096: 8,
}
_PROBE = b"keyreeve multibuffer self-test"
_MEASUREMENTS = 3


class MultiBuffer(Protocol):
    """What this engine uses of `keyreeve_engine._multibuffer`."""

    KeyInvalid: type[Exception]
    KeyUnsuited: type[Exception]
    PIECE_MAX: int

    def kinds(self) -> list[int]: ...
    def load(self, kind: int, pkcs8: bytes, /) -> object: ...
    def sign(self, kind: int, keys: list[object], messages: list[bytes], forms: bytes, /) -> list[bytes | int]: ...


def open_multibuffer() -> MultiBufferEngine:
    """Raises: EngineUnusable."""
    if keyreeve_engine is None:
        raise EngineUnusable("keyreeve-engine is not installed: install keyreeve-keyserver[engine]")
    found = keyreeve_engine.available()
    if not found.usable:
        raise EngineUnusable(found.reason)
    engine = MultiBufferEngine(cast("MultiBuffer", keyreeve_engine.multibuffer))
    engine.test()
    return engine


class MultiBufferEngine:
    name = "multibuffer"

    def __init__(self, module: MultiBuffer, *, least: Mapping[KeyType, int] | None = None) -> None:
        """`least`: from how many waiting requests on it signs, by type; what is not given is measured."""
        self._module = module
        self._kinds = {key_type: kind for key_type, kind in _KINDS.items() if kind in module.kinds()}
        self._least = dict(least or {})
        self._failed: dict[KeyType, str] = {}

    def test(self) -> None:
        """Signs with keys of each type that are quickly made; types of RSA prove themselves with their first key. Raises: EngineUnusable."""
        makers: dict[KeyType, Callable[[], PrivateKey]] = {
            KeyType.EC_P256: lambda: ec.generate_private_key(ec.SECP256R1()),
            KeyType.EC_P384: lambda: ec.generate_private_key(ec.SECP384R1()),
            KeyType.ED25519: ed25519.Ed25519PrivateKey.generate,
        }
        for key_type in makers.keys() & self._kinds.keys():
            key = makers[key_type]()
            try:
                self.load(key_type, key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))
            except (KeyUnsuited, KeySelfTestFailed) as failed:
                raise EngineUnusable(f"self-test failed for {key_type.value}: {failed}") from failed

    def supports(self, key_type: KeyType) -> bool:
        return key_type in self._kinds and key_type not in self._failed

    def piece(self, key_type: KeyType, waiting: int) -> int:
        least = self._least.get(key_type, LANES)
        if waiting < least:
            return 0
        calls, rest = divmod(min(waiting, _PIECES[key_type]), LANES)
        return calls * LANES + (rest if rest >= least or not calls else 0)

    def load(self, key_type: KeyType, pkcs8: bytes) -> Handle:
        try:
            handle = Handle(self._module.load(self._kinds[key_type], pkcs8))
        except self._module.KeyUnsuited as unsuited:
            raise KeyUnsuited(str(unsuited)) from None
        except self._module.KeyInvalid as invalid:
            raise KeySelfTestFailed(f"the sealed key is not sound: {invalid}") from None
        except MemoryError:
            raise KeyUnsuited("no memory for the key") from None
        self._prove(key_type, handle, pkcs8)
        return handle

    def sign(self, key_type: KeyType, work: Sequence[Work]) -> list[SignOutcome | None]:
        """None for what a lane refuses or fails at: OpenSSL decides (crypto_mb signs no digest that is 0 modulo n, say)."""
        most = self._module.PIECE_MAX
        outcomes: list[SignOutcome | None] = []
        for at in range(0, len(work), most):
            outcomes += self._sign_piece(key_type, work[at : at + most])
        return outcomes

    def _sign_piece(self, key_type: KeyType, work: Sequence[Work]) -> list[SignOutcome | None]:
        forms = _FORMS[key_type]
        codes = bytes(
            [forms.get(request.scheme, _UNKNOWN) | (_PREHASHED if request.prehashed else 0) for _, request in work]
        )
        keys, messages = [handle for handle, _ in work], [request.message for _, request in work]
        try:
            results = self._module.sign(self._kinds[key_type], cast("list[object]", keys), messages, codes)
        except (MemoryError, ValueError, TypeError):
            return [None] * len(work)
        return [result if isinstance(result, bytes) else _refused(result) for result in results]

    def health(self) -> EngineHealth:
        return EngineHealth(True, "; ".join(f"{key_type.value}: {why}" for key_type, why in self._failed.items()))

    def _prove(self, key_type: KeyType, handle: Handle, pkcs8: bytes) -> None:
        """Raises: KeyUnsuited where the signature of a lane does not verify, after which no key of this type is signed with here."""
        key = cast("PrivateKey", load_der_private_key(pkcs8, None, unsafe_skip_rsa_key_validation=True))
        scheme = DEFAULT_SCHEMES[key_type.family]

        def by_lanes() -> bytes | int:
            form = bytes([_FORMS[key_type][scheme]])
            return self._module.sign(self._kinds[key_type], [cast("object", handle)], [_PROBE], form)[0]

        signature = by_lanes()
        try:
            if not isinstance(signature, bytes):
                raise Internal(f"a lane answered {signature}")
            verify_signature(key.public_key(), scheme, _PROBE, signature=signature)
        except KeyreeveError as error:
            self._failed[key_type] = "its self-test failed"
            log_warning("engine_failed", engine=self.name, key_type=key_type.value, detail=error.detail)
            raise KeyUnsuited("the self-test of its type failed") from error
        if key_type not in self._least:
            self._least[key_type] = _pays_from(by_lanes, lambda: sign_with(key, scheme, _PROBE))
            log("engine_measured", engine=self.name, key_type=key_type.value, pays_from=self._least[key_type])


def _pays_from(by_lanes: Callable[[], object], one: Callable[[], object]) -> int:
    """The number of requests from which a call of the lanes is cheaper than OpenSSL one by one; over LANES: never."""
    return max(1, math.ceil(_processor_seconds(by_lanes) / _processor_seconds(one)))


def _processor_seconds(work: Callable[[], object]) -> float:
    """The least of a few runs: what else the machine does only adds."""
    taken: list[float] = []
    for _ in range(_MEASUREMENTS):
        began = time.thread_time()
        work()
        taken.append(time.thread_time() - began)
    return max(min(taken), 1e-9)


def _refused(status: int) -> KeyreeveError | None:
    """A wrong result of RSA is not tried again: it is a fault that somebody has to hear of."""
    if status == _MISMATCH:
        return SignatureMismatch("the software key gave a signature that does not verify")
    return None
