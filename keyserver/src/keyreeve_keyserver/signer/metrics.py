"""What the signer counts. It has no network: the front end asks for these numbers by the control operation `metrics` and shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sized

from keyreeve_common.errors import KeyreeveError
from keyreeve_common.metrics import MetricSet
from keyreeve_common.schemes import SignatureScheme

from keyreeve_keyserver.audit.ports import AuditLog, AuditStatus
from keyreeve_keyserver.backends.ports import Backend, BackendHealth, BackendState
from keyreeve_keyserver.hardening.lockdown import Protections


class SignerMetrics(MetricSet):
    def lane_done(self, backend: str, seconds: float) -> None:
        """One lane of a batch came back from its backend."""
        self.observe("keyreeve_signer_backend_seconds", backend, seconds=seconds)

    def signed(self, backend: str, schemes: Iterable[int]) -> None:
        """Signatures of these schemes, by code point."""
        for scheme, times in Counter(schemes).items():
            self.count("keyreeve_signer_signatures_total", backend, SignatureScheme(scheme).iana_name, by=times)

    def refused(self, error: KeyreeveError) -> None:
        self.count("keyreeve_signer_refusals_total", error.code.value)

    def watch(self, backends: Mapping[str, Backend], keys: Sized, audit: AuditLog, protections: Protections) -> None:
        """The gauges of these parts, read at each look."""

        def health() -> list[tuple[str, BackendHealth]]:
            return [(name, backend.health()) for name, backend in backends.items()]

        self.gauge("keyreeve_signer_keys_loaded", lambda: len(keys))
        self.gauge("keyreeve_signer_protections_off", lambda: len(protections.missing))
        if audit.enabled:
            self.gauge("keyreeve_signer_audit_up", lambda: int(audit.status().state == "ok"))
            self.gauge("keyreeve_signer_audit_records_total", lambda: audit.status().recorded)
            self.gauge("keyreeve_signer_audit_unpublished_records", lambda: _unpublished(audit.status()))
        self.gauges(
            "keyreeve_signer_backend_up",
            lambda: [((name,), float(found.state is BackendState.UP)) for name, found in health()],
        )
        self.gauges("keyreeve_signer_backend_workers", lambda: [((name,), found.workers) for name, found in health()])
        self.gauges("keyreeve_signer_backend_waiting", lambda: [((name,), found.waiting) for name, found in health()])
        self.gauges(
            "keyreeve_signer_engine_fallback",
            lambda: [((name,), float(bool(found.engine_detail))) for name, found in health() if found.engine],
        )
        self.gauges(
            "keyreeve_signer_engine_requests_total",
            lambda: [((name, engine), count) for name, found in health() for engine, count in found.by_engine.items()],
        )


def _unpublished(status: AuditStatus) -> int:
    return status.recorded - status.checkpointed
