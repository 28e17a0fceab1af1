"""Canary signatures: one key for each backend that signs now and then, through link, signer and backend, as an agent's would.

So health says whether signatures are made, not whether processes run. A canary key is an ordinary handshake key that no certificate names, and
what it signs is the CertificateVerify of a handshake that never was: its signatures are of no use to anybody. All replicas share it: it is found
by its request id; where it was destroyed the next request id has a new one.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from time import monotonic
from typing import Any

from cryptography.hazmat.primitives.serialization import load_der_public_key
from keyreeve_common.errors import KeyreeveError, Unavailable
from keyreeve_common.purposes import KeyRole, Purpose, build_tls13_content
from keyreeve_common.schemes import DEFAULT_SCHEMES, KeyType
from keyreeve_common.telemetry import log, log_exception, log_warning
from keyreeve_common.trace import make_trace
from keyreeve_common.verification import verify_signature

from keyreeve_keyserver.catalog.records import KeyEntry, NewKey
from keyreeve_keyserver.domain.keys import KeyState
from keyreeve_keyserver.frames import LOCAL_CALLER, Signed, SignItem, SignResult
from keyreeve_keyserver.frontend.engine import SigningEngine
from keyreeve_keyserver.frontend.metrics import FrontEndMetrics
from keyreeve_keyserver.frontend.signer_link import SignerLink

LABEL = "keyreeve canary"
_PURPOSE = Purpose.TLS13_SERVER_VERIFY
_MESSAGE = build_tls13_content(_PURPOSE, hashlib.sha256(b"keyreeve canary").digest())
_PREFERRED = (KeyType.EC_P256, KeyType.ED25519, KeyType.EC_P384, KeyType.RSA_2048)
_MOST_GENERATIONS = 1000  # one for each time that somebody destroyed it
MakeKey = Callable[[NewKey], Awaitable[KeyEntry]]


@dataclass(frozen=True, slots=True)
class CanaryState:
    """The last canary signature of one backend. `error` is "" when it was good."""

    at: datetime
    seconds: float
    error: str = ""


class Canaries:
    """`states` by the backend's name; a backend that has not been tried yet is not in it."""

    def __init__(
        self,
        link: SignerLink,
        engine: SigningEngine,
        make_key: MakeKey,
        *,
        metrics: FrontEndMetrics,
        clock: Callable[[], datetime],
    ) -> None:
        self._link = link
        self._engine = engine
        self._make_key = make_key
        self._metrics = metrics
        self._clock = clock
        self._keys: dict[str, KeyEntry] = {}
        self.states: dict[str, CanaryState] = {}
        metrics.gauges(
            "keyreeve_keyserver_canary_up",
            lambda: [((name,), float(not state.error)) for name, state in self.states.items()],
        )

    async def run_forever(self, interval: timedelta, within: timedelta) -> None:
        while True:
            await self._link.ready.wait()
            await asyncio.gather(*(self.sing(backend, within) for backend in self._backends()))
            await asyncio.sleep(interval.total_seconds())

    async def sing(self, backend: dict[str, Any], within: timedelta) -> None:
        """One canary signature of this backend; its outcome is in `states`, the log and the metrics."""
        name, began = str(backend.get("name", "")), monotonic()
        try:
            key = await self._key(name, backend)
            await self._sign(key, within)
            error = ""
        except KeyreeveError as failure:
            error = str(failure)
        except Exception:
            log_exception("canary_failed", backend=name)
            error = "internal: the canary met a fault of ours; the log has the cause"
        seconds = monotonic() - began
        before = self.states.get(name)
        self.states[name] = CanaryState(self._clock(), seconds, error)
        if error and (before is None or before.error != error):
            log_warning("canary_silent", backend=name, detail=error)
        elif not error:
            self._metrics.observe("keyreeve_keyserver_canary_seconds", name, seconds=seconds)
            if before is not None and before.error:
                log("canary_sings_again", backend=name)

    def _backends(self) -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = self._link.capabilities.get("backends", [])
        except Unavailable:
            return []
        return found

    async def _key(self, name: str, backend: dict[str, Any]) -> KeyEntry:
        """The backend's canary key, made where there is none. Raises: Unavailable, and what CreateKey raises."""
        known = self._keys.get(name)
        if known is not None:
            return known
        offered = backend.get("key_types", [])
        key_type = next((kind for kind in _PREFERRED if kind.value in offered), None)
        if key_type is None:
            raise Unavailable(f"backend {name} offered no key type when the signer was connected; see its health")
        purposes = frozenset({_PURPOSE})
        request_id = f"keyreeve/canary/{name}/{key_type.value}"
        new = NewKey(request_id, key_type, KeyRole.HANDSHAKE, purposes, name, LABEL)
        entry = await self._make_key(new)
        for number in range(2, _MOST_GENERATIONS):
            if entry.state is not KeyState.DESTROYED:
                break
            entry = await self._make_key(replace(new, request_id=f"{request_id}/{number}"))
        if entry.state is not KeyState.ENABLED:
            raise Unavailable(f"canary key {entry.key_id} is not enabled; run: keyreeve key enable {entry.key_id}")
        self._keys[name] = entry
        return entry

    async def _sign(self, key: KeyEntry, within: timedelta) -> None:
        """Raises: what the signer refused with; Internal for a signature that does not verify."""
        scheme = DEFAULT_SCHEMES[key.key_type.family]
        deadline_ms = int(within / timedelta(milliseconds=1))
        item = SignItem(0, key.key_id, int(scheme), int(_PURPOSE), deadline_ms, _MESSAGE, make_trace())
        answer: asyncio.Future[SignResult] = asyncio.get_running_loop().create_future()

        def settle(results: Sequence[SignResult]) -> None:
            if not answer.done():
                answer.set_result(results[0])

        self._engine.submit(LOCAL_CALLER, [item], settle, timeout_s=within.total_seconds())
        result = await answer
        if not isinstance(result, Signed):
            self._keys.pop(key.backend, None)  # it may have been disabled or destroyed: look again next time
            raise result.error
        verify_signature(load_der_public_key(key.spki_der), scheme, _MESSAGE, signature=result.signature)
