"""What the front end counts, and what it shows of the signer, which has no network of its own."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import datetime

from keyreeve_common.errors import KeyreeveError
from keyreeve_common.key_id import KeyId
from keyreeve_common.metrics import MetricSet, Sample, samples_from_json
from keyreeve_common.purposes import Purpose
from keyreeve_common.schemes import SignatureScheme

from keyreeve_keyserver.frames import Refused, SignResult
from keyreeve_keyserver.frontend.access import Access
from keyreeve_keyserver.frontend.admission import Admission
from keyreeve_keyserver.frontend.signer_link import SignerLink
from keyreeve_keyserver.frontend.tls_identity import TlsIdentity

_SIGNER_TIMEOUT_S = 2.0
_PURPOSES = {int(purpose): purpose.label for purpose in Purpose}
_SCHEMES = {int(scheme): scheme.iana_name for scheme in SignatureScheme}
OK = "ok"


class FrontEndMetrics(MetricSet):
    """Requests are counted once each: refused here by `refused`, answered by the signer by `finished`."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: Collection[object] = ()
        self.gauge("keyreeve_keyserver_streams", lambda: len(self.streams))

    def refused(self, purpose: int, code: str, *, times: int = 1) -> None:
        self.count("keyreeve_keyserver_requests_total", _PURPOSES.get(purpose, "unknown"), code, by=times)

    def submitted(self) -> None:
        self.count("keyreeve_keyserver_batches_total")

    def refused_by_signer(self, results: Iterable[tuple[int, SignResult]]) -> None:
        """Those of these results, each behind its purpose, that are refusals."""
        for purpose, result in results:
            if isinstance(result, Refused):
                self.refused(purpose, result.error.code.value)

    def signed(self, uses: Counter[tuple[KeyId, int, int]], seconds: float) -> None:
        """So many signatures of each key, purpose and scheme, `seconds` after they were handed to the signer."""
        schemes: Counter[int] = Counter()
        for (_, purpose, scheme), times in uses.items():
            self.refused(purpose, OK, times=times)
            schemes[scheme] += times
        for scheme, times in schemes.items():
            name = _SCHEMES.get(scheme, "unknown")
            self.observe("keyreeve_keyserver_request_seconds", name, seconds=seconds, times=times)

    def watch(
        self,
        link: SignerLink,
        access: Access,
        identity: TlsIdentity,
        *,
        admission: Admission,
        clock: Callable[[], datetime],
    ) -> None:
        """The gauges of these parts, read at each look."""
        self.gauge("keyreeve_keyserver_requests_in_flight", lambda: link.requests_in_flight)
        self.gauge("keyreeve_keyserver_signer_connected", lambda: int(link.ready.is_set()))
        self.gauge("keyreeve_keyserver_catalog_staleness_seconds", lambda: access.staleness_s)
        self.gauge("keyreeve_keyserver_quarantined_holders", lambda: access.holders_in_quarantine(clock()))
        self.gauges(
            "keyreeve_keyserver_queue_requests",
            lambda: [((name,), float(count)) for name, count in admission.outstanding().items()],
        )
        self.gauge("keyreeve_keyserver_svid_expiry_timestamp_seconds", lambda: _expiry(identity))


def _expiry(identity: TlsIdentity) -> float | None:
    return identity.installed.svid.not_after.timestamp() if identity.installed else None


class SignerMetrics:
    """The signer's own samples, asked for at each look. Called in the thread of the metrics server; made on the event loop."""

    def __init__(self, link: SignerLink) -> None:
        self._link = link
        self._loop = asyncio.get_running_loop()

    def __call__(self) -> Iterable[Sample]:
        if not self._link.ready.is_set():
            return ()
        asking = asyncio.run_coroutine_threadsafe(self._link.control("metrics", timeout=_SIGNER_TIMEOUT_S), self._loop)
        try:
            return samples_from_json(asking.result(_SIGNER_TIMEOUT_S + 1).get("samples"))
        except (KeyreeveError, FutureTimeout):  # it is going away, or hangs: its absence shows in signer_connected
            asking.cancel()
            return ()
